"""Contenders in processes of their own, timed in turn, and what may be said of the ratios."""

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

LIFE = 8
"""Rounds until all processes start anew: where a process's memory happens to lie moves its times by 5 %."""

MEMORY_STAYS = {"MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
"""For glibc: freed memory stays with the process. Else page faults are a tenth of a step, in one start and not in the
next. What the caller has set goes first."""


class Contender:
    """A process that runs one command after another when asked, so that contenders can take turns."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.process: subprocess.Popen[str] | None = None

    def restart(self) -> None:
        """Starts the process, anew if there is one."""
        self.close()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**MEMORY_STAYS, **os.environ},
        )

    def ask(self, command: str) -> Any:
        """Sends a command and waits for the answer."""
        if self.process is None:
            self.restart()
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("no pipes")
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args} has ended")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self.process is not None:
            if self.process.stdin is not None:
                self.process.stdin.close()
            self.process.wait()
            self.process = None


def serve(answers: dict[str, Any]) -> None:
    """Answers the commands on standard input, each by a function, until it ends."""
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def rounds(contenders: dict[str, Contender], command: str, count: int) -> dict[str, list[Any]]:
    """Asks everyone once per round, so that all meet the same load; the order turns from round to round.

    Every ``LIFE`` rounds all start anew, the first time too, and answer once more to be warm.
    """
    names = list(contenders)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for i in range(count):
        if i % LIFE == 0:
            for each in contenders.values():
                each.restart()
                each.ask(command)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(contenders[name].ask(command))
        print(f"\r  round {i + 1} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """The median of the rounds and the limits of its 95 % bootstrap interval: lives are drawn, and rounds in each."""
    draw = random.Random(seed)  # noqa: S311 (no secret)
    lives = [values[i : i + LIFE] for i in range(0, len(values), LIFE)]

    def resampled() -> float:
        return statistics.median(
            v for life in draw.choices(lives, k=len(lives)) for v in draw.choices(life, k=len(life))
        )

    medians = sorted(resampled() for _ in range(resamples))
    return statistics.median(values), medians[round(0.025 * resamples)], medians[round(0.975 * resamples) - 1]
