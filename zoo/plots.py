"""The pictures of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ["curves", "reconstructions"]


def curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws loss and accuracy over the epochs.

    Args:
        rows: of ``metrics.jsonl``, at least one.
        path: of the PNG file.
    """
    figure = _figure(9, 3.6)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    loss.plot(epochs, [row["train_loss"] for row in rows], label="training, as optimised", marker=".")
    loss.plot(epochs, [row["loss"] for row in rows], label="validation", marker=".")
    loss.set(xlabel="epoch", ylabel="cross entropy (nats)", yscale="log")
    accuracy.plot(epochs, [row["train_top1"] for row in rows], label="training, augmented", marker=".")
    accuracy.plot(epochs, [row["top1"] for row in rows], label="validation", marker=".")
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    _save(figure, path)


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
    figure = _figure(max(1.1 * columns, 3) + 0.4, 3 * 1.1 + 0.9)
    grid = figure.subplots(3, columns, squeeze=False)
    for axes_row, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(axes_row, pictures, strict=True):
            axes.imshow(picture.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
        axes_row[0].set_title(name, loc="left", fontsize=9)
    figure.suptitle(f"largest difference of a pixel value in [0, 1]: {largest:.1e}", fontsize=9)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: it keeps figures, and wants a display
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
