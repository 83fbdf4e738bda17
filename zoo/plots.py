"""The pictures of a training run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ["curves", "moving_average", "new_figure", "reconstructions"]


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draws loss and accuracy over the steps, of several runs in one picture, like Figure 3 of the i-RevNet paper.

    The training loss is the mean over the last 100 steps, or over those of a row of the log where these are more.

    Args:
        runs: for each name the rows of its ``metrics.jsonl``, see :func:`zoo.journal.rows_of`.
        path: of the PNG file.
    """
    figure = new_figure(9, 3.6)
    loss, accuracy = figure.subplots(1, 2)
    for number, (name, rows) in enumerate(runs.items()):
        colour, prefix = f"C{number}", f"{name}: " if len(runs) > 1 else ""
        training = [row for row in rows if row["kind"] == "train" and row["loss"] is not None]
        validation = [row for row in rows if row["kind"] == "validation"]
        steps = [row["step"] for row in training]
        loss.plot(steps, moving_average(training, "loss"), color=colour, alpha=0.6, label=f"{prefix}training")
        accuracy.plot(steps, moving_average(training, "top1"), color=colour, alpha=0.6, label=f"{prefix}training")
        for axes, key in ((loss, "loss"), (accuracy, "top1")):
            average = "ema_" if validation and f"ema_{key}" in validation[0] else ""
            shown = [math.nan if row[average + key] is None else row[average + key] for row in validation]
            what = "validation, averaged weights" if average else "validation"
            at = [row["step"] for row in validation]
            axes.plot(at, shown, "--", marker=".", color=colour, label=prefix + what)
    loss.set(xlabel="step", ylabel="cross entropy (nats)", yscale="log")
    accuracy.set(xlabel="step", ylabel="top-1 accuracy (%)")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    _save(figure, path)


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


def reconstructions(images: Tensor, recovered: Tensor, path: Path) -> None:
    """Draws images, what the inverse recovered, and the absolute difference, amplified so that it can be seen.

    Args:
        images: ``(batch, 3, height, width)`` in [0, 1]; one column each.
        recovered: the same shape.
        path: of the PNG file.
    """
    difference = (recovered.double() - images.double()).abs()
    largest = float(difference.max())
    factor = float(f"{1 / largest:.0e}") if largest else 1.0  # one digit, so that the row's title is exact
    rows = {
        "original": images,
        "reconstruction": recovered,
        f"difference × {factor:.0e}" if largest else "difference: none": difference * factor,
    }
    columns = len(images)
    figure = new_figure(max(1.1 * columns, 3) + 0.4, 3 * 1.1 + 0.9)
    grid = figure.subplots(3, columns, squeeze=False)
    for axes_row, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(axes_row, pictures, strict=True):
            axes.imshow(picture.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
        axes_row[0].set_title(name, loc="left", fontsize=9)
    figure.suptitle(f"largest difference of a pixel value in [0, 1]: {largest:.1e}", fontsize=9)
    _save(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, on white, so that it is readable on a dark page, too."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: it keeps figures, and wants a display
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
