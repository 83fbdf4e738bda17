"""Ctrl-C and the signals of a scheduler, as a request to stop between two steps."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["FAILED", "INTERRUPTED", "TERMINATED", "Interrupted", "Stop", "Terminated", "stopped_by_sigterm", "stopping"]

TERMINATED = 1
"""A signal asked for the end, SIGTERM or SIGUSR1: the run saves and may go on later."""

INTERRUPTED = 2
"""Somebody at the keyboard asked for the end, by Control-C."""

FAILED = 3
"""An error ended the work of some process."""


class Interrupted(Exception):  # noqa: N818 (not an error: the user asked for it)
    """The user pressed Ctrl-C; the run is saved.

    Example:
        >>> try:
        ...     raise Interrupted  # as Trainer.fit does
        ... except (Interrupted, Terminated) as stop:
        ...     print("saved after", type(stop).__name__)
        saved after Interrupted
    """


class Terminated(Exception):  # noqa: N818
    """A scheduler sent SIGTERM or SIGUSR1; the run is saved and can go on.

    Example:
        >>> try:
        ...     raise Terminated  # as Trainer.fit does
        ... except (Interrupted, Terminated) as stop:
        ...     print("saved after", type(stop).__name__)
        saved after Terminated
    """


@dataclass
class Stop:
    """What has been asked for: nothing (0), ``TERMINATED`` or ``INTERRUPTED``.

    Example:
        >>> stop = Stop()
        >>> stop.asked = TERMINATED  # as a signal does, under stopping()
        >>> bool(stop.asked), stop.asked == INTERRUPTED
        (True, False)
    """

    asked: int = 0


@contextmanager
def stopping() -> Generator[Stop]:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a request; a second Ctrl-C ends the program at once.

    Example:
        >>> with stopping() as stop:
        ...     for step in range(3):
        ...         if stop.asked:
        ...             break
        >>> step, stop.asked
        (2, 0)
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    kinds = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGUSR1: TERMINATED}
    before: dict[signal.Signals, Any] = {each: signal.getsignal(each) for each in kinds}

    def handle(number: int, _: object) -> None:
        stop.asked = max(stop.asked, kinds[signal.Signals(number)])
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for each in kinds:
        signal.signal(each, handle)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def stopped_by_sigterm() -> Generator[Callable[[], bool]]:
    """Lets SIGTERM do what Ctrl-C does, so that what was computed can be kept; it yields what tells whether it came.

    Example:
        >>> with stopped_by_sigterm() as came:
        ...     came()
        False
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may set handlers
        return

    def handle(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would come while things are being kept
        asked.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
