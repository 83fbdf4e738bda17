"""Contenders in processes of their own, timed in turn, and what may be said of the ratios."""

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


class Contender:
    """A process that runs one command after another when asked, so that contenders can take turns."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> Any:
        """Sends a command and waits for the answer."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("no pipes")
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args} has ended")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def serve(answers: dict[str, Any]) -> None:
    """Answers the commands on standard input, each by a function, until it ends."""
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def rounds(contenders: dict[str, Contender], command: str, count: int) -> dict[str, list[Any]]:
    """Asks everyone once per round, so that all meet the same load; the order turns from round to round."""
    names = list(contenders)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for i in range(count):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(contenders[name].ask(command))
        print(f"\r  round {i + 1} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """The median and the limits of its 95 % bootstrap interval."""
    draw = random.Random(seed)  # noqa: S311 (no secret)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples))
    return statistics.median(values), medians[round(0.025 * resamples)], medians[round(0.975 * resamples) - 1]
