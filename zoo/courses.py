"""The course of a training run, as Figure 3 of the i-RevNet paper draws it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import InputError
from zoo.journal import rows_of

__all__ = ["Course", "course_of", "courses_of", "moving_average"]


@dataclass(frozen=True)
class Course:
    """Loss and accuracy over the steps.

    Example:
        >>> rows = [{"kind": "train", "step": 100, "loss": 2.0, "top1": 30.0}]
        >>> course = course_of([*rows, {"kind": "validation", "step": 100, "loss": 1.5, "top1": 40.0}])
        >>> course.steps, course.loss, course.validation_top1, course.averaged
        ((100,), (2.0,), (40.0,), False)
    """

    steps: tuple[int, ...]
    """Where the training's rows end."""
    loss: tuple[float, ...]
    """The training's cross entropy in nats, a moving average."""
    top1: tuple[float, ...]
    """Its accuracy in percent, the same."""
    validation_steps: tuple[int, ...]
    """After which the network was evaluated."""
    validation_loss: tuple[float | None, ...]
    """Cross entropy in nats; ``None`` where it was not finite."""
    validation_top1: tuple[float, ...]
    """Accuracy in percent."""
    averaged: bool
    """Whether it was the average of the weights that was evaluated."""


def course_of(rows: Sequence[Mapping[str, Any]], *, window: int = 100) -> Course:
    """The course of a run.

    The training loss is the mean over the last 100 steps, or over those of a row of the log where these are more.

    Source: i-RevNet, section 3.2 and Figure 3, https://arxiv.org/abs/1802.07088

    Args:
        rows: of its ``metrics.jsonl``, see :func:`zoo.journal.rows_of`.
        window: of the moving average, in steps.

    Raises:
        InputError: if a row has other fields.

    Example:
        >>> rows = [{"kind": "train", "step": step, "loss": 3.0, "top1": 10.0} for step in (50, 100)]
        >>> course_of(rows).loss
        (3.0, 3.0)
    """
    try:
        training = [row for row in rows if row["kind"] == "train" and row["loss"] is not None]
        validation = [row for row in rows if row["kind"] == "validation"]
        average = any("ema_loss" in row for row in validation)
        of = ["ema_" if "ema_loss" in row else "" for row in validation]  # it may begin after the first epochs
        return Course(
            tuple(row["step"] for row in training),
            tuple(moving_average(training, "loss", window)),
            tuple(moving_average(training, "top1", window)),
            tuple(row["step"] for row in validation),
            tuple(row[f"{prefix}loss"] for prefix, row in zip(of, validation, strict=True)),
            tuple(row[f"{prefix}top1"] for prefix, row in zip(of, validation, strict=True)),
            average,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"a line is no row of a training run: {error}") from None


def courses_of(folders: Sequence[Path]) -> dict[str, Course]:
    """The courses of several runs, by names that tell them apart: their folders' paths, without what these share.

    Raises:
        InputError: if one holds no run, or its log can't be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     runs = [Path(folder, name) for name in ("a", "b")]
        ...     for run in runs:
        ...         run.mkdir()
        ...         _ = (run / "metrics.jsonl").write_text('{"kind": "train", "step": 9, "loss": 2.0, "top1": 30.0}')
        ...     {name: course.loss for name, course in courses_of(runs).items()}
        {'a': (2.0,), 'b': (2.0,)}
    """
    whole = {folder.resolve(): folder for folder in folders}
    common = Path(os.path.commonpath(whole))
    if common in whole:  # one of them, or the only one
        common = common.parent
    found: dict[str, Course] = {}
    for path, folder in whole.items():
        rows = rows_of(folder)
        try:
            found[str(path.relative_to(common))] = course_of(rows)
        except InputError as error:
            raise InputError(f"cannot draw the run in {folder}: {error}") from None
    return found


def moving_average(rows: Sequence[Mapping[str, Any]], key: str, window: int = 100) -> list[float]:
    """At each row the mean over the last ``window`` steps, of means over the steps since the row before.

    Example:
        >>> rows = [{"step": 50, "loss": 3.0}, {"step": 100, "loss": 1.0}, {"step": 150, "loss": 5.0}]
        >>> moving_average(rows, "loss")
        [3.0, 2.0, 3.0]
    """
    found: list[float] = []
    starts = [0, *(row["step"] for row in rows)]
    for i, row in enumerate(rows):
        first = i
        while first > 0 and row["step"] - starts[first - 1] <= window:
            first -= 1
        parts = [(starts[j + 1] - starts[j], rows[j][key]) for j in range(first, i + 1)]
        found.append(sum(length * value for length, value in parts) / sum(length for length, _ in parts))
    return found
