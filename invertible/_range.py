"""How large values become in a run on a grid, and which container was handed values that are on it already."""

import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["handed", "is_handed", "is_unread", "note", "note_range", "nothing_read", "taken_down"]


class _Run(threading.local):
    """The run on a grid in each thread; no context variable, which torch.compile cannot trace."""

    def __init__(self) -> None:
        self.peaks: list[Tensor] | None = None
        self.handed: Any = None
        self.unread = False


_run = _Run()


def note(values: Iterable[Tensor]) -> None:
    """Takes down the least and the greatest element; without effect outside a run that is checked."""
    if _run.peaks is not None:
        for value in values:
            if value.numel():
                _run.peaks += torch.aminmax(value.detach())


def note_range(least: Tensor, greatest: Tensor) -> None:
    """Takes down what :func:`note` would find."""
    if _run.peaks is not None:
        _run.peaks += (least, greatest)


@contextmanager
def taken_down() -> Generator[list[Tensor]]:
    """Yields the list that :func:`note` fills during the calls inside."""
    before, peaks = _run.peaks, cast("list[Tensor]", [])
    _run.peaks = None if _run.unread else peaks
    try:
        yield peaks
    finally:
        _run.peaks = before


def is_unread() -> bool:
    """Whether tensors have no data now."""
    return _run.unread


@contextmanager
def nothing_read() -> Generator[None]:
    """Takes nothing down in the calls inside: their tensors have no data."""
    before, _run.unread, _run.peaks = (_run.unread, _run.peaks), True, None
    try:
        yield
    finally:
        _run.unread, _run.peaks = before


@contextmanager
def handed(layer: Any) -> Generator[None]:
    """Says that a container calls this layer with values that are on its grid already."""
    before, _run.handed = _run.handed, layer
    try:
        yield
    finally:
        _run.handed = before


def is_handed(layer: Any) -> bool:
    """Whether it was said of this layer. What a hook or a function calls meanwhile is none of it."""
    return _run.handed is layer
