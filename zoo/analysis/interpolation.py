"""Images between two images, on the line between their features: Figure 5 of the i-RevNet paper."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from torch import Tensor

from invertible import StreamRangeError
from zoo._writing import whole
from zoo.analysis.figures import keep, picture, progress_bar, show
from zoo.analysis.subject import Reversible, images_of, open_subject, reversible
from zoo.arguments import positive
from zoo.data import Source
from zoo.errors import InputError, reason
from zoo.evaluation import evaluating
from zoo.plots import new_figure

__all__ = ["Interpolation", "draw_interpolations", "equal_steps", "interpolate", "write_animation"]

DRAWN = 30
"""So many pairs are drawn: one picture of all would become too large."""

COLUMNS = 25
"""So many of the images of a strip."""


@dataclass(frozen=True)
class Interpolation:
    """Images on the way from one to another.

    Example:
        >>> images = torch.tensor([0.0, 0.25, 1.0])[:, None, None, None].expand(3, 3, 8, 8)
        >>> Interpolation((0.0, 0.5, 1.0), images, images).distances
        [0.25, 0.75]
    """

    steps: tuple[float, ...]
    """t, the share of the first image's features."""
    images: Tensor
    """``(steps, channels, height, width)``, from the features."""
    pixels: Tensor
    """The same shape: the mixtures of the two images themselves."""

    @property
    def distances(self) -> list[float]:
        """From each image to the next, the root mean square over their values."""
        return _distances(self.images).tolist()


@torch.no_grad()
def interpolate(net: Reversible, x0: Tensor, x1: Tensor, steps: Sequence[float]) -> Interpolation:
    r"""Returns :math:`x_t = \Phi^{-1}(t \Phi x_0 + (1 - t) \Phi x_1)` for each step t, in ``eval``.

    On the grid ``"exact"`` the ends, t = 1 and t = 0, are the images bit for bit: for that the features are computed in
    a batch as large as the one that is inverted, of which each image has the same place.

    Source: i-RevNet, section 4.2 and Figure 5, https://arxiv.org/abs/1802.07088

    Args:
        net: whose features.
        x0: an image ``(channels, height, width)``.
        x1: another one, of the same shape.
        steps: any numbers; beyond 0 ... 1 the line goes on.

    Raises:
        InputError: if the images are of different shapes, there is no step, or a step is so large that values are not
            finite or leave the network's grid.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2)
        >>> net.grid = "exact"
        >>> found = interpolate(net, torch.ones(3, 16, 16), torch.zeros(3, 16, 16), [0, 0.5, 1])
        >>> bool((found.images[0] == 0).all()), bool((found.images[2] == 1).all())
        (True, True)
    """
    if x0.shape != x1.shape:
        raise InputError(f"the images must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
    if not steps:
        raise InputError("an interpolation needs one step at least")
    t = torch.tensor(list(steps), dtype=torch.float64, device=x0.device)[:, None, None, None]
    pixels = (t * x0 + (1 - t) * x1).to(x0.dtype)
    try:
        with evaluating(net):
            first, second = (net.features(x.expand_as(pixels)) for x in (x0, x1))
            images = net.inverse((t * first + (1 - t) * second).to(first.dtype))
    except StreamRangeError as error:
        beyond = f"the activations reach {error.peak:.0e} in the interpolation, and the grid ends at {error.limit:g}"
        raise InputError(f"{beyond}; steps nearer to 0 ... 1 may stay on it") from None
    if not (images.isfinite().all() and pixels.isfinite().all()):
        raise InputError(f"the images at the steps {', '.join(f'{each:g}' for each in steps)} are not finite")
    return Interpolation(tuple(map(float, steps)), images, pixels)


def equal_steps(net: Reversible, x0: Tensor, x1: Tensor, count: int, *, rounds: int = 16) -> list[float]:
    """Steps from 1 to 0 for which each image of :func:`interpolate` is as far from the next as all others.

    The paper's authors adapted the steps by hand. Here the distances are measured, and the steps divided anew as if
    each image went to the next at a constant speed, in several rounds, of which the best counts.

    Args:
        net: whose features.
        x0: an image, at the beginning of the path, as in the paper's figure.
        x1: another one, at its end.
        count: of the steps, 2 at least.
        rounds: how often they are divided anew.

    Raises:
        InputError: if there are fewer than 2 steps, or :func:`interpolate` refuses the images.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1))
        >>> steps = equal_steps(net, torch.ones(3, 8, 8), torch.zeros(3, 8, 8), 3)
        >>> steps[0], steps[-1], 0 < steps[1] < 1
        (1.0, 0.0, True)
    """
    if count < 2:
        raise InputError(f"from one image to another there are at least 2 steps, got {count}")
    steps = np.linspace(1, 0, count)
    best, least = steps, math.inf
    for _ in range(rounds):
        lengths = _distances(interpolate(net, x0, x1, steps.tolist()).images).cpu().numpy()
        if not lengths.all():  # between images that are the same
            break
        if lengths.max() / lengths.min() < least:
            best, least = steps, float(lengths.max() / lengths.min())
        along = np.concatenate([[0.0], np.cumsum(lengths)])
        steps = np.interp(np.linspace(0, along[-1], count), along, steps)
        steps[0], steps[-1] = 1, 0
    return best.tolist()


def _distances(images: Tensor) -> Tensor:
    return images.double().diff(dim=0).square().flatten(1).mean(1).sqrt()


def draw_interpolations(found: Sequence[Interpolation]) -> Figure:
    """Figure 5: for each pair a strip from the features, and below it one of mixed pixels.

    Of more than 25 steps it shows 25, the first and the last among them.

    Args:
        found: of images in [0, 1]; what is beyond is clipped.

    Example:
        >>> images = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 8, 8)
        >>> figure = draw_interpolations([Interpolation((0.0, 0.5, 1.0), images, images)])
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['t = 0.00', 't = 0.50', 't = 1.00']
    """
    columns = min(max(len(each.steps) for each in found), COLUMNS)
    figure = new_figure(0.8 * columns + 0.6, 1.95 * len(found) + 0.2)
    strips = figure.subplots(2 * len(found), columns, squeeze=False)
    for axes in strips.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    for i, each in enumerate(found):
        count = len(each.steps)
        shown = np.linspace(0, count - 1, min(count, COLUMNS)).round().astype(int)
        for row, (name, images) in enumerate((("features", each.images), ("pixels", each.pixels))):
            for axes, step in zip(strips[2 * i + row], shown, strict=False):
                axes.imshow(picture(images[step]), interpolation="nearest")
                if not row:
                    axes.set_title(f"t = {each.steps[step]:.2f}", fontsize=7)
            strips[2 * i + row][0].set_ylabel(name, fontsize=8)
    return figure


def write_animation(found: Interpolation, path: Path, *, pixels: int = 128, milliseconds: int = 120) -> None:
    """Writes an animated GIF, there and back: from the features on the left, mixed pixels on the right.

    Args:
        found: of images in [0, 1].
        path: of the file.
        pixels: the least height of an image in it.
        milliseconds: of each image.

    Raises:
        InputError: if it can't be written.

    Example:
        >>> import tempfile
        >>> found = Interpolation((1.0, 0.0), torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_animation(found, path := Path(folder) / "pair.gif")
        ...     path.read_bytes()[:6]
        b'GIF89a'
    """
    factor = -(-pixels // found.images.shape[2])
    frames: list[Image.Image] = []
    for pair in zip(found.images, found.pixels, strict=True):
        both = np.concatenate([picture(image) for image in pair], axis=1)
        frames.append(Image.fromarray(both.repeat(factor, 0).repeat(factor, 1)))
    frames += frames[-2:0:-1]
    options: dict[str, Any] = {"append_images": frames[1:], "duration": milliseconds, "loop": 0}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            frames[0].save(partial, "GIF", save_all=True, **options)
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from None


def default_pairs(source: Source, count: int) -> list[tuple[int, int]]:
    """The first images of the classes 0 and 1, of 1 and 2, ..., and of the last and 0, then the second ones.

    Example:
        >>> from types import SimpleNamespace
        >>> default_pairs(SimpleNamespace(labels=np.array([0, 0, 1, 1])), 3)
        [(0, 2), (2, 0), (1, 3)]
    """
    labels = np.asarray(source.labels)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    found: list[tuple[int, int]] = []
    for turn in range(max(map(len, members))):
        firsts = [int(each[turn % len(each)]) for each in members]
        found += zip(firsts, [*firsts[1:], firsts[0]], strict=True)
    return found[:count]


def chosen_pairs(source: Source, pair: Sequence[Sequence[int]] | None, count: int) -> list[tuple[int, int]]:
    """Those given, or those of :func:`default_pairs`; if all images are of one class, each and the next.

    Raises:
        InputError: if a number is none of an image, a pair is of one image, or there is only one.
    """
    total = len(source)
    for a, b in pair or ():
        for i in (a, b):
            if not 0 <= i < total:
                raise InputError(f"the validation images have the numbers 0 ... {total - 1}, got {i}")
        if a == b:
            raise InputError(f"a pair needs two images, got {a} twice")
    if pair:
        return [(a, b) for a, b in pair]
    if total < 2:
        raise InputError("a pair needs two images, and there is one")
    if len(set(source.labels)) < 2:
        return [(i, (i + 1) % total) for i in range(min(count, total))]
    return default_pairs(source, count)


def add_pairs(parser: argparse.ArgumentParser, first: str, second: str) -> None:
    """The options for pairs of images, of which one has two numbers of these names."""
    about = f"of different classes (default: 4); the picture has the first {DRAWN}"
    parser.add_argument("--pairs", type=positive, metavar="N", default=4, help=about)
    about = "numbers of two validation images"
    parser.add_argument("--pair", type=int, nargs=2, action="append", metavar=(first, second), help=about)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    add_pairs(parser, "I", "J")
    parser.add_argument("--count", type=positive, metavar="N", default=9, help="images in a strip (default: 9)")
    parser.add_argument(
        "--steps", type=float, nargs="+", metavar="T", help="values of t (default: such that distances are equal)"
    )
    parser.add_argument("--gif", action="store_true", help="write an animation of each pair, too")


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis interpolation --help``."""
    subject = open_subject(given.checkpoint, device=given.device, size=given.size)
    net = reversible(subject)
    data, name = images_of(given.data)
    pairs = chosen_pairs(data.validation, given.pair, given.pairs)
    found: list[Interpolation] = []
    numbers: list[dict[str, Any]] = []
    with progress_bar("interpolating") as progress:
        for done, pair in enumerate(pairs):
            x0, x1 = next(subject.batches(data.validation, pair, 2))
            each = interpolate(net, x0, x1, given.steps or equal_steps(net, x0, x1, given.count))
            shown = Interpolation(each.steps, subject.restored(each.images), subject.restored(each.pixels))
            found.append(shown)
            numbers.append(_numbers(shown, each, (x0, x1), [data.validation.name(i) for i in pair]))
            progress(done + 1, len(pairs))
    figure = draw_interpolations(found[:DRAWN])
    paths = keep(given.output, "interpolation", figure, {"pairs": numbers}, subject=subject, data=name, seed=given.seed)
    if given.gif:
        for i, each in enumerate(found):
            paths.append(given.output / f"interpolation-{i + 1}.gif")
            write_animation(each, paths[-1])
    header = ["pair", "path, RMS of a value", "straight line", "next to next", "beyond [0, 1]", "error at the ends"]
    rows = [
        [
            " ".join(str(i) for i in pair),
            f"{sum(each['distances']):.3f}",
            f"{each['straight']:.3f}",
            f"{min(each['distances']):.3f} ... {max(each['distances']):.3f}" if each["distances"] else "-",
            f"{100 * each['beyond']:.1f} %",
            "-" if each["end_error"] is None else f"{each['end_error']:.1e}" if each["end_error"] else "0",
        ]
        for pair, each in zip(pairs, numbers, strict=True)
    ]
    show(console, f"{subject.model}: between the features of two images", header, rows, paths)


def _numbers(
    shown: Interpolation, found: Interpolation, ends: tuple[Tensor, Tensor], names: list[str]
) -> dict[str, Any]:
    """Of images in [0, 1]; the error at the ends is of what the network sees, the largest of a value."""
    errors = [
        float((image.double() - ends[1 - int(t)].double()).abs().amax())
        for t, image in zip(found.steps, found.images, strict=True)
        if t in {0.0, 1.0}
    ]
    straight = torch.stack([shown.pixels[0], shown.pixels[-1]])
    return {
        "images": names,
        "steps": shown.steps,
        "distances": shown.distances,
        "straight": float(_distances(straight)[0]),
        "beyond": float(((shown.images < 0) | (shown.images > 1)).double().mean()),
        "end_error": max(errors, default=None),
    }
