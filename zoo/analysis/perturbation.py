"""What comes back of values with noise added: of the features, or of the values at a block."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from zoo.analysis.blocks import block_names, features_at, inverse_from
from zoo.analysis.figures import keep, picture, show
from zoo.analysis.subject import Reversible, copy_without_grid, images_of, open_subject, reversible, spread
from zoo.arguments import positive, rate
from zoo.errors import InputError
from zoo.inversion import relative_errors
from zoo.plots import new_figure
from zoo.progress import say

__all__ = ["Perturbation", "draw_perturbation", "perturb"]

SIZES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the noise, over that of the values."""

SHOWN = 3
"""So many images are drawn."""


@dataclass(frozen=True)
class Perturbation:
    """Images that come back of values with noise added.

    Example:
        >>> images = torch.zeros(1, 2, 3, 8, 8, dtype=torch.float64)
        >>> Perturbation(None, (0.1,), images, torch.tensor([[0.05, 0.2]], dtype=torch.float64)).amplification
        tensor([[0.5000, 2.0000]], dtype=torch.float64)
    """

    block: str | None
    """The name of the layer whose values they are; ``None``: the features."""
    noise: tuple[float, ...]
    """The norm of the noise over that of the values of each image."""
    images: Tensor
    """``(sizes, batch, channels, height, width)``, in float64."""
    errors: Tensor
    """``(sizes, batch)``: the norm of what has changed in the image over that of the image."""

    @property
    def amplification(self) -> Tensor:
        """``(sizes, batch)``: the relative error of the image over that of the values."""
        return self.errors / torch.tensor(self.noise, dtype=torch.float64)[:, None]


@torch.no_grad()
def perturb(
    net: Reversible, x: Tensor, noise: Sequence[float] = SIZES, *, block: str | None = None, seed: int = 0
) -> Perturbation:
    r"""Adds Gaussian noise of these relative sizes to the values at a block, and inverts.

    .. math::
        x_r = \Phi_j^{-1}\left(v + r \lVert v \rVert \frac{g}{\lVert g \rVert}\right), \quad v = \Phi_j x, \qquad
        \text{amplification} = \frac{\lVert x_r - x \rVert}{r \lVert x \rVert}

    The direction g is one for each image, the same for all sizes. The network is copied and computes in ``eval``,
    without a grid, in float64: so round-off does not count. As r goes to 0, the mean over g of the squared
    amplification is :math:`\lVert \partial \Phi_j^{-1} \rVert_F^2 \lVert v \rVert^2 / (d \lVert x \rVert^2)`, for d
    values. Where the network is injective, part of the noise is off its range, and the inverse is the left one.

    Args:
        net: whose values.
        x: images ``(batch, channels, height, width)``.
        noise: the relative sizes r.
        block: the name of a layer of the body, as ``net.trace`` gives it; ``None``: the features.
        seed: of the noise.

    Raises:
        InputError: if a size is not positive and finite or there is none, no layer has this name, or the values or the
            pixels of an image are all 0.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2)
        >>> found = perturb(net, torch.rand(2, 3, 16, 16), [1e-3, 1])
        >>> found.images.shape, found.amplification.shape
        (torch.Size([2, 2, 3, 16, 16]), torch.Size([2, 2]))
    """
    check_noise(noise)
    last = block_names(net)[-1]
    name = block or last
    plain, x = copy_without_grid(net, torch.float64), x.detach().double()
    value = features_at(plain, x, name)
    streams = value if isinstance(value, tuple) else (value,)
    flat = torch.cat([stream.flatten(1) for stream in streams], dim=1)
    length = flat.norm(dim=1, keepdim=True)
    if not (length.all() and x.flatten(1).any(dim=1).all()):
        raise InputError("an image whose pixels or values are all 0 has no relative error; leave it out")
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(flat.shape, generator=generator, dtype=flat.dtype).to(flat.device)
    direction *= length / direction.norm(dim=1, keepdim=True)
    images: list[Tensor] = []
    for size in noise:
        parts = (flat + size * direction).split([stream[0].numel() for stream in streams], dim=1)
        moved = tuple(part.view(stream.shape) for part, stream in zip(parts, streams, strict=True))
        images.append(inverse_from(plain, moved if isinstance(value, tuple) else moved[0], name))
    errors = torch.stack([relative_errors(each, x) for each in images]).cpu()
    place = name.removeprefix("body.")
    return Perturbation(None if place == last else place, tuple(map(float, noise)), torch.stack(images), errors)


def check_noise(noise: Sequence[float]) -> None:
    """Refuses what are no sizes of noise.

    Raises:
        InputError: if there is none, or one is not positive and finite.
    """
    if not noise:
        raise InputError("a perturbation needs one size of the noise at least")
    for size in noise:
        if not 0 < size < math.inf:
            raise InputError(f"the noise must have a positive size, got {size:g}")


def draw_perturbation(found: Perturbation, originals: Tensor) -> Figure:
    """A strip of pictures for each size of the noise, and the errors of all images over the sizes.

    Args:
        found: of images in [0, 1]; what is beyond is clipped in the picture.
        originals: the images without noise, ``(batch, 3, height, width)`` in [0, 1].

    Example:
        >>> errors = torch.tensor([[1e-3, 2e-3], [0.1, 0.3]])
        >>> found = Perturbation(None, (1e-3, 0.1), torch.rand(2, 2, 3, 8, 8), errors)
        >>> figure = draw_perturbation(found, torch.rand(2, 3, 8, 8))
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['image', 'noise 0.001', 'noise 0.1']
    """
    columns = [originals, *found.images]
    rows = min(SHOWN, len(originals))
    figure = new_figure(max(1.05 * len(columns) + 0.4, 6), 1.1 * rows + 3.4)
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.1 * rows + 0.3, 3.1])
    above, below = parts[:, 0]
    strips = above.subplots(rows, len(columns), squeeze=False)
    titles = ["image", *(f"noise {size:g}" for size in found.noise)]
    for column, (title, images) in enumerate(zip(titles, columns, strict=True)):
        strips[0][column].set_title(title, fontsize=8)
        for row in range(rows):
            strips[row][column].imshow(picture(images[row]), interpolation="nearest")
            strips[row][column].set_axis_off()
    axes = below.subplots()
    sizes, errors = zip(*sorted(zip(found.noise, found.errors.numpy(), strict=True)), strict=True)
    finite = np.where(np.isfinite(errors), errors, np.nan)
    axes.fill_between(sizes, finite.min(axis=1), finite.max(axis=1), color="C0", alpha=0.25, label="all images")
    axes.plot(sizes, np.median(finite, axis=1), "-o", markersize=4, color="C0", label="median")
    axes.plot(sizes, sizes, "k:", label="as large as the noise")
    axes.set(xscale="log", yscale="log", ylabel="relative error of the image")
    axes.set_xlabel(f"noise, relative to {_place(found)}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument(
        "--noise", type=rate, nargs="+", metavar="R", default=list(SIZES), help="relative sizes (default: 1e-6 ... 1)"
    )
    parser.add_argument("--block", metavar="NAME", help="of the layer whose values it is added to (default: the last)")
    parser.add_argument("--images", type=positive, metavar="N", default=16, help="spread over the data's (default: 16)")


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis perturbation --help``."""
    subject = open_subject(given.checkpoint, device=given.device, size=given.size)
    net = reversible(subject)
    data, name = images_of(given.data)
    chosen = spread(len(data.validation), given.images)
    x = next(subject.batches(data.validation, chosen, len(chosen)))
    seen = x.flatten(1).any(dim=1).cpu()  # of an image that is all 0 no error is relative
    if not seen.all():
        say(console, f"{int((~seen).sum())} of {len(chosen)} images are black and left out")
        chosen, x = [i for i, keeps in zip(chosen, seen.tolist(), strict=True) if keeps], x[seen.to(x.device)]
        if not chosen:
            raise InputError("a perturbation needs an image that is not black")
    found = perturb(net, x, given.noise, block=given.block, seed=given.seed)
    shown = subject.restored(found.images)
    pictures = Perturbation(found.block, found.noise, shown, found.errors)
    half = 0.5 / 255  # of a step of 8 bits: black becomes a little less than black by any noise
    beyond = ((shown < -half) | (shown > 1 + half)).flatten(1).double().mean(dim=1).tolist()
    numbers = {
        "block": found.block,
        "images": [data.validation.name(i) for i in chosen],
        "noise": found.noise,
        "errors": _finite(found.errors),
        "amplification": _finite(found.amplification),
        "beyond": beyond,
    }
    figure = draw_perturbation(pictures, subject.restored(x))
    paths = keep(given.output, "perturbation", figure, numbers, subject=subject, data=name, seed=given.seed)
    header = ["noise", "relative error, median", "largest", "amplification, median", "largest", "beyond [0, 1]"]
    rows = [
        [f"{size:g}", *(f"{figure:.3g}" for figure in _middle_and_end(error, gain)), f"{100 * share:.1f} %"]
        for size, error, gain, share in zip(found.noise, found.errors, found.amplification, beyond, strict=True)
    ]
    show(console, f"{subject.model}: noise in {_place(found)} of {len(chosen)} images", header, rows, paths)


def _place(found: Perturbation) -> str:
    return "the features" if found.block is None else f"the values at {found.block}"


def _middle_and_end(*figures: Tensor) -> list[float]:
    return [float(figure) for each in figures for figure in (each.quantile(0.5), each.max())]


def _finite(table: Tensor) -> list[list[Any]]:
    """JSON has no infinity."""
    return [[figure if math.isfinite(figure) else None for figure in row] for row in table.tolist()]
