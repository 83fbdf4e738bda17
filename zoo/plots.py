"""The pictures of a training run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from zoo.courses import Course

__all__ = ["draw_curves", "new_figure", "reconstructions", "save"]


def draw_curves(courses: Mapping[str, Course]) -> Figure:
    """Draws loss and accuracy over the steps, of several runs in one picture, like Figure 3 of the i-RevNet paper.

    Args:
        courses: by the names that the runs have in it; one alone needs none.

    Example:
        >>> course = Course((10, 20), (2.3, 1.1), (10.0, 60.0), (20,), (1.2,), (55.0,), averaged=False)
        >>> figure = draw_curves({"lr 0.1": course, "lr 0.2": course})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['cross entropy (nats)', 'top-1 accuracy (%)']
        >>> [text.get_text() for text in figure.axes[0].get_legend().texts][:2]
        ['lr 0.1: training', 'lr 0.1: validation']
    """
    figure = new_figure(9, 3.6)
    loss, accuracy = figure.subplots(1, 2)
    for number, (name, course) in enumerate(courses.items()):
        colour, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
        prefix = f"{name}: " if len(courses) > 1 else ""
        validation = "validation, averaged weights" if course.averaged else "validation"
        for axes, during, after in (
            (loss, course.loss, [math.nan if each is None else each for each in course.validation_loss]),
            (accuracy, course.top1, course.validation_top1),
        ):
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
            every = (number, max(len(during) // 6, 1))  # so that runs are told apart in print, too
            axes.plot(course.steps, during, markevery=every, alpha=0.6, label=f"{prefix}training", **style)
            axes.plot(course.validation_steps, after, "--", markerfacecolor="white", label=prefix + validation, **style)
    loss.set(xlabel="step", ylabel="cross entropy (nats)", yscale="log")
    accuracy.set(xlabel="step", ylabel="top-1 accuracy (%)")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


_MARKERS = "os^Dv*"


def reconstructions(images: Tensor, recovered: Tensor, path: Path) -> None:
    """Draws images, what the inverse recovered, and the absolute difference, amplified so that it can be seen.

    Args:
        images: ``(batch, 3, height, width)`` in [0, 1]; one column each.
        recovered: the same shape.
        path: of the PNG file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "reconstructions.png"
        ...     reconstructions(x := torch.rand(1, 3, 8, 8), x + 1e-3, path)
        ...     path.read_bytes()[1:4]
        b'PNG'
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
    save(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, on white, so that it is readable on a dark page, too.

    Example:
        >>> new_figure(6, 4).get_size_inches().tolist()
        [6.0, 4.0]
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: it keeps figures, and wants a display
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file, into a folder that is made if it is not there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(new_figure(2, 1), path := Path(folder) / "pictures/empty.png")
        ...     path.read_bytes()[1:4]
        b'PNG'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
