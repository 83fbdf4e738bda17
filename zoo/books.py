"""What a run counts, and writes into its folder."""

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from zoo.checkpoints import write
from zoo.data import Batch
from zoo.distributed import World
from zoo.environment import environment
from zoo.errors import DivergedError, InputError
from zoo.journal import Board, Journal
from zoo.learner import Outcome
from zoo.run import Run

__all__ = ["Books"]


@dataclass
class Tally:
    """What has been counted since a row was written."""

    sums: Tensor
    """Loss, hits, images: of this process."""
    steps: int = 0
    seconds: float = 0.0
    """Of training."""
    waiting: float = 0.0
    """Of these, for data."""
    drift: float | None = None
    """The largest."""

    def clear(self) -> None:
        """Starts anew."""
        self.sums.zero_()
        self.steps, self.seconds, self.waiting, self.drift = 0, 0.0, 0.0, None


class Books:
    """The counts of a run, the same in all processes, and its log, which the main one writes.

    Args:
        run: the configuration.
        folder: where the run is kept.
        images: of the training data.
        device: where losses are.
        world: the processes.

    Example:
        >>> import tempfile
        >>> from zoo.journal import rows_of
        >>> from zoo.recipes import RECIPES
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     books = Books(Run(RECIPES["digits"]), Path(folder), images=4, device=torch.device("cpu"), world=World())
        ...     books.claim()
        ...     books.open(step=0)
        ...     outcome = Outcome(torch.tensor([5.0, 3.0, 4.0], dtype=torch.float64), finite=True, drift=0.0)
        ...     books.count(outcome, [], step=1, seconds=0.5, waiting=0.1)
        ...     _ = books.close_row({"step": 1, "epoch": 1}, peak=None)
        ...     books.close()
        ...     row = rows_of(Path(folder))[0]
        >>> row["loss"], row["top1"], row["images_per_second"]
        (1.25, 75.0, 8.0)
    """

    def __init__(self, run: Run, folder: Path, images: int, device: torch.device, world: World) -> None:
        self.run, self.folder, self.images, self.device, self.world = run, folder, images, device, world
        self.skipped = 0
        """Steps from which nothing was learnt, because the loss was not finite."""
        self.bad: dict[str, str] = {}
        """Training images that could not be read, and why."""
        self.seconds = 0.0
        """Of training so far, evaluation apart."""
        self.drift: float | None = None
        """The largest relative error of a reconstructed value, over all steps; ``None`` if none was reconstructed."""
        self.row, self.epoch = (Tally(torch.zeros(3, dtype=torch.float64, device=device)) for _ in range(2))
        self._in_row = 0  # skipped steps
        self._new_bad: list[tuple[str, str]] = []  # of this process
        self._position = 0  # of the journal
        self._journals: list[Any] = []
        self._lock: IO[bytes] | None = None

    @property
    def claimed(self) -> bool:
        """Whether the folder is this run's alone: in the main process."""
        return self._lock is not None

    def claim(self) -> None:
        """Takes the folder's lock, so that no other run writes to it; a process that ends, however, lets it go.

        Raises:
            InputError: if another run has it, or the folder can't be written to.
        """
        if self.claimed:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error}") from None

    def open(self, step: int) -> None:
        """Begins to write: in the main process, when the folder was claimed.

        Raises:
            InputError: if the folder can't be written to.
        """
        try:
            self.run.save(self.folder / "config.json", environment(self.device))
            self._journals = [Journal(self.folder / "metrics.jsonl", self._position)]
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error}") from None
        if self.run.tensorboard:
            self._journals.append(Board(self.folder / "tensorboard", step))

    def _locked(self) -> IO[bytes]:
        file = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"another run is writing to {self.folder} now; wait, or take another --output") from None
        return file

    def close(self) -> None:
        """Ends the writing."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        for each in self._journals:
            each.close()
        self._journals = []

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds a row to the log."""
        try:
            for each in self._journals:
                each.write(row)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error}") from None

    def count(self, outcome: Outcome, parts: Sequence[Batch], *, step: int, seconds: float, waiting: float) -> None:
        """Counts a step of this process.

        Raises:
            DivergedError: if too many steps in a row were not taken.
        """
        self._new_bad += [each for part in parts for each in part.bad]
        self.seconds += seconds
        self.drift = _larger(self.drift, outcome.drift)
        for tally in (self.row, self.epoch):
            tally.sums += outcome.sums
            tally.steps += 1
            tally.seconds, tally.waiting = tally.seconds + seconds, tally.waiting + waiting
            tally.drift = _larger(tally.drift, outcome.drift)
        self._in_row = 0 if outcome.finite else self._in_row + 1
        if outcome.finite:
            return
        self.skipped += 1
        images = self.world.gathered([index for part in parts for _, index in part.addresses])
        self.write({"kind": "skipped", "step": step, "images": [index for each in images for index in each]})
        if self._in_row >= self.run.max_skipped:
            many = f"{self._in_row} steps in a row, the last is" if self._in_row > 1 else "a step,"
            why = f" ({outcome.trouble})" if outcome.trouble else ""
            raise DivergedError(f"the loss was not finite in {many} step {step}{why}; try a lower --lr")

    def close_row(self, head: Mapping[str, Any], peak: int | None) -> dict[str, Any]:
        """Writes a row of training, and starts a new one. A collective, as all that follows."""
        means, count = self._means(self.row)
        seconds = self.row.seconds
        row = {
            "kind": "train",
            **head,
            "loss": means[0],
            "top1": means[1],
            "drift": self.row.drift,
            "skipped": self.skipped,
            "bad_images": len(self.bad),
            "seconds": seconds,
            "images_per_second": count / seconds if seconds else 0.0,
            "waiting": self.row.waiting / seconds if seconds else 0.0,
            "peak_bytes": peak,
        }
        self.write(row)
        self.row.clear()
        return row

    def close_epoch(self, head: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a row of validation, with the means of training since the last one."""
        means, count = self._means(self.epoch)
        seconds = self.epoch.seconds
        row = {
            "kind": "validation",
            **head,
            "train_loss": means[0],
            "train_top1": means[1],
            "drift": self.epoch.drift,
            **results,
            "seconds": seconds,
            "images_per_second": count / seconds if seconds else 0.0,
        }
        self.write(row)
        self.epoch.clear()
        return row

    def gather_bad(self) -> None:
        """Counts the training images that could not be read, and writes them down."""
        before = len(self.bad)
        for each in self.world.gathered(self._new_bad):
            self.bad |= {name: why for name, why in each if name not in self.bad}
        self._new_bad = []
        if self._journals and len(self.bad) > before:
            lines = [json.dumps({"name": name, "error": why}) + "\n" for name, why in sorted(self.bad.items())]
            write(self.folder / "bad_images.jsonl", "".join(lines).encode())

    @property
    def too_many_bad(self) -> bool:
        """Whether more training images could not be read than ``max_bad`` allows."""
        return len(self.bad) > self.run.max_bad * self.images

    def refuse_bad(self) -> None:
        """Ends the run if too many training images could not be read.

        Raises:
            InputError: if they are more than ``max_bad`` allows.
        """
        if self.too_many_bad:
            first = next(iter(self.bad.values()))
            share = f"{len(self.bad)} of {self.images} training images can't be read"
            raise InputError(f"{first} ({share}, and --max-bad allows a share of {self.run.max_bad:g})")

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        self.gather_bad()
        if self._journals:
            self._position = self._journals[0].position()
        return {
            "skipped": self.skipped,
            "in_row": self._in_row,
            "bad": self.bad,
            "seconds": self.seconds,
            "drift": self.drift,
            "row": self._kept(self.row),
            "epoch": self._kept(self.epoch),
            "position": self._position,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state` gave."""
        self.skipped, self._in_row, self.bad = state["skipped"], state["in_row"], dict(state["bad"])
        self.seconds, self.drift, self._position = state["seconds"], state["drift"], state["position"]
        for tally, kept in ((self.row, state["row"]), (self.epoch, state["epoch"])):
            each = [sums.to(tally.sums.device) for sums in kept["sums"]]
            if len(each) == self.world.size:
                tally.sums.copy_(each[self.world.rank])
            elif self.world.main:  # of another number of processes
                tally.sums.copy_(torch.stack(each).sum(0))
            tally.steps, tally.drift = kept["steps"], kept["drift"]
            tally.seconds, tally.waiting = kept["seconds"], kept["waiting"]

    def _means(self, tally: Tally) -> tuple[tuple[float | None, float | None], float]:
        """Loss and accuracy in percent, ``None`` if nothing was learnt; and the number of images."""
        loss, hits, count = self.world.summed(tally.sums).tolist()
        return (loss / count, 100 * hits / count) if count else (None, None), count

    def _kept(self, tally: Tally) -> dict[str, Any]:
        sums = self.world.gathered(tally.sums.cpu().clone())
        kept = {"steps": tally.steps, "drift": tally.drift, "seconds": tally.seconds, "waiting": tally.waiting}
        return {"sums": sums, **kept}


def _larger(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else max(a, b)
