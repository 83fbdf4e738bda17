"""How far off the inverse is, image by image and block by block: section 4.2 of the i-RevNet paper."""

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from invertible import Coupling, Sequential
from zoo.analysis.figures import keep, progress_bar, show
from zoo.analysis.subject import Reversible, images_of, open_subject, reversible, spread
from zoo.arguments import positive
from zoo.errors import InputError
from zoo.inversion import InversionError, relative_errors
from zoo.plots import new_figure
from zoo.progress import say
from zoo.run import GRIDS

__all__ = ["MODES", "RoundOff", "draw_roundoff", "noises", "relative_inversion_errors"]

MODES = ("eval", "train")
"""With running statistics, and with those of each batch."""


@dataclass(frozen=True)
class RoundOff:
    r"""The relative errors of one set of images, on one grid, in one mode.

    Example:
        >>> found = RoundOff("noise", "none", "eval", errors=(1e-7, 3e-7), blocks=(0.0, 2e-7), stages=(0, 1), exact=0)
        >>> found.summary.maximum, found.by_stage
        (3e-07, [0.0, 2e-07])
    """

    images: str
    """What they are."""
    grid: str
    """A name in :data:`zoo.run.GRIDS`."""
    mode: str
    """``eval`` or ``train``."""
    errors: tuple[float, ...]
    r""":math:`\lVert \Phi^{-1}\Phi x - x \rVert / \lVert x \rVert` of each image."""
    blocks: tuple[float, ...]
    r"""For each block the mean relative error of its input, when it is recovered from the last features.

    The first is that of what the first block sees.
    """
    stages: tuple[int, ...]
    """The number of the first block of each stage."""
    exact: int
    """The number of images that came back bit for bit as they were rounded to the grid; without one, as they are."""

    @property
    def summary(self) -> InversionError:
        """The paper's ε, which is the mean, with median and maximum."""
        return InversionError.of(torch.tensor(self.errors, dtype=torch.float64))

    @property
    def by_stage(self) -> list[float]:
        """The errors of what the first block of each stage sees."""
        return [self.blocks[i] for i in self.stages]


@torch.no_grad()
def relative_inversion_errors(
    net: Reversible,
    batches: Iterable[Tensor],
    *,
    images: str = "images",
    grid: str = "none",
    mode: str = "eval",
    progress: Callable[[int], None] | None = None,
) -> RoundOff:
    r"""Runs images forward and backwards from the last features, and compares what comes back at each block.

    .. math::
        \epsilon(X) = \frac{1}{|X|} \sum_{x \in X} \frac{\lVert x - \Phi^{-1} \Phi x \rVert}{\lVert x \rVert}

    The network is copied, so that its mode, grid and statistics stay. In ``train`` the inverse uses the statistics of
    the batch, as it does in training; a batch of one image may have none.

    Source: i-RevNet, section 4.2, https://arxiv.org/abs/1802.07088

    Args:
        net: whose inverse.
        batches: what it sees.
        images: what these are, for the result.
        grid: a name in :data:`zoo.run.GRIDS`.
        mode: ``eval`` or ``train``.
        progress: is told the number of images of each batch that is done.

    Raises:
        ValueError: if there is no such grid or mode.
        InputError: if there is no image, a value leaves the grid, or the network has no inverse in this mode.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2)
        >>> found = relative_inversion_errors(net, noises(4, size=16), grid="exact")
        >>> found.summary.maximum, found.exact, found.stages, len(found.blocks)
        (0.0, 4, (0, 3, 6), 9)
    """
    if grid not in GRIDS or mode not in MODES:
        raise ValueError(
            f"relative_inversion_errors: grid must be one of {', '.join(GRIDS)} and mode one of {', '.join(MODES)}."
        )
    plain = copy.deepcopy(net).train(mode == "train")
    plain.backprop, plain.grid = None, GRIDS[grid]
    if mode == "train" and _stochastic(plain):
        raise InputError("in training mode this network has dropout, and no inverse")
    errors: list[Tensor] = []
    blocks: list[Tensor] = []
    exact = 0
    for x in batches:
        if mode == "train" and len(x) == 1 and max(x.shape[2:]) <= plain.total_stride:
            raise InputError("in training mode a batch of a single image this small has no statistics; change its size")
        recovered, inner = _there_and_back(plain.body, x)
        errors.append(relative_errors(recovered, x).cpu())
        blocks.append(inner.cpu())
        exact += int((recovered == plain.body.snap(x)).flatten(1).all(dim=1).sum())
        if progress:
            progress(len(x))
    if not errors:
        raise InputError("there is no image to invert")
    means = torch.cat(blocks, dim=1).mean(dim=1)
    stages = tuple(i for i, each in enumerate(_blocks(plain.body)) if i == 0 or each[1].downsample is not None)
    return RoundOff(images, grid, mode, tuple(torch.cat(errors).tolist()), tuple(means.tolist()), stages, exact)


def _stochastic(net: Reversible) -> bool:
    """Whether it is a random map in training mode."""
    modes = [(part, part.training) for part in net.modules()]
    net.train()
    try:
        return net.body.stochastic
    finally:
        for part, training in modes:
            part.training = training


def _blocks(body: Sequential) -> list[tuple[int, Coupling]]:
    """The couplings, with their positions."""
    return [(i, layer) for i, layer in enumerate(body) if isinstance(layer, Coupling)]


def _there_and_back(body: Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """What comes back, and of what each block saw the relative error of each image: ``(blocks, batch)``."""
    inputs: list[Any] = []
    last: Any = body.snap(x)
    for _, value in body.trace(x):
        inputs.append(last)
        last = value
    _check_range(body, [*inputs, last])
    back = [value for _, value in body.trace_inverse(last)][::-1]
    found = [relative_errors(_merged(back[i]), _merged(inputs[i])) for i, _ in _blocks(body)]
    return back[0], torch.stack(found)


def _check_range(body: Sequential, values: list[Any]) -> None:
    """What ``trace`` leaves to its caller, for it knows no end of the run."""
    if body.grid is not None:
        peak = max(float(_merged(value).abs().amax()) for value in values)
        if not peak < body.grid.limit:
            beyond = f"the activations reach {peak:.0e} in the inversion"
            raise InputError(f"{beyond}, and the grid ends at {body.grid.limit:g}; leave it out of --grids")


def _merged(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.cat([_merged(each).flatten(1) for each in value], dim=1)


def noises(
    count: int, *, size: int, batch: int = 64, seed: int = 0, device: str | torch.device = "cpu"
) -> Iterator[Tensor]:
    """Images of independent uniform noise in [0, 1], in batches ``(batch, 3, size, size)``.

    Example:
        >>> [len(x) for x in noises(100, size=8)]
        [64, 36]
    """
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, count, batch):
        yield torch.rand(min(batch, count - first), 3, size, size, generator=generator).to(device)


def draw_roundoff(found: Sequence[RoundOff]) -> Figure:
    """A histogram of the images' errors, and the errors of what each block saw; what is 0 is not drawn but said.

    Example:
        >>> found = RoundOff("noise", "none", "eval", errors=(1e-7, 3e-7), blocks=(1e-8, 2e-7), stages=(0, 1), exact=0)
        >>> figure = draw_roundoff([found])
        >>> figure.axes[0].get_legend().texts[0].get_text()
        'noise, grid none, eval'
    """
    figure = new_figure(9.6, 4.2)
    histogram, depth = figure.subplots(1, 2)
    shown = [each for each in found if any(map(_drawable, each.errors))]
    logs = {i: np.log10([error for error in each.errors if _drawable(error)]) for i, each in enumerate(shown)}
    low, high = (min(map(np.min, logs.values())), max(map(np.max, logs.values()))) if logs else (-16.0, -15.0)
    bins = 10 ** np.linspace(np.floor(low), np.ceil(high + 1e-9), 60)
    for i, each in enumerate(shown):
        colour, line = f"C{i % 10}", "-" if each.mode == "eval" else "--"
        label = f"{each.images}, grid {each.grid}, {each.mode}"
        histogram.hist(10 ** logs[i], bins=bins, histtype="step", color=colour, linestyle=line, label=label)
        if any(map(_drawable, each.blocks)):
            values = [value if _drawable(value) else np.nan for value in each.blocks]
            depth.plot(range(1, len(values) + 1), values, line, marker=".", color=colour, label=label)
    for stage in found[0].stages if found else ():
        depth.axvline(stage + 0.5, color="grey", linewidth=0.8, linestyle=":")
    histogram.set(xlabel="relative error of an image", ylabel="images", xscale="log")
    depth.set(
        xlabel="block (dotted: a stage begins)",
        ylabel="mean relative error of its input",
        yscale="log" if shown else "linear",
    )
    zero = [f"{each.images}, grid {each.grid}, {each.mode}" for each in found if not any(each.errors)]
    if zero:
        figure.suptitle("without any error: " + "; ".join(zero), fontsize=7)
    for axes in (histogram, depth):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    return figure


def _drawable(error: float) -> bool:
    """Whether it has a logarithm: there is none of 0, nor of the relative error of an image of zeros."""
    return 0 < error < math.inf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument(
        "--noises", type=positive, metavar="N", default=200, help="images of noise (default: 200; the paper: 10000)"
    )
    parser.add_argument("--images", type=positive, metavar="N", help="of the validation images (default: all)")
    parser.add_argument("--batch-size", type=positive, metavar="N", default=64, help="images at once (default: 64)")
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=["none", "exact32", "exact"])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="(default: both; without train if it has dropout)")


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis roundoff --help``."""
    subject = open_subject(given.checkpoint, device=given.device, size=given.size)
    net = reversible(subject)
    data, name = images_of(given.data)
    total = len(data.validation)
    chosen, size = spread(total, given.images or total), given.batch_size
    noise = {"size": subject.recipe.evaluation_size, "batch": size, "seed": given.seed, "device": subject.device}
    sets: Mapping[str, Callable[[], Iterable[Tensor]]] = {
        "noise": lambda: noises(given.noises, **noise),
        name: lambda: subject.batches(data.validation, chosen, size),
    }
    modes = given.modes or [mode for mode in MODES if mode == "eval" or not _stochastic(net)]
    if not given.modes and _stochastic(net):
        say(console, f"{subject.model} has dropout, and so no inverse in training mode: eval only")
    settings = [(what, grid, mode) for what in sets for grid in given.grids for mode in modes]
    found: list[RoundOff] = []
    done, everything = [0], len(given.grids) * len(modes) * (given.noises + len(chosen))
    with progress_bar("inverting") as progress:

        def count(images: int) -> None:
            done[0] += images
            progress(done[0], everything)

        for what, grid, mode in settings:
            found.append(
                relative_inversion_errors(net, sets[what](), images=what, grid=grid, mode=mode, progress=count)
            )
    numbers = {"sets": [asdict(each) | {"summary": asdict(each.summary)} for each in found]}
    figure = draw_roundoff(found)
    paths = keep(given.output, "roundoff", figure, numbers, subject=subject, data=name, seed=given.seed)
    header = ["images", "grid", "mode", "ε, the mean", "median", "largest", "bit for bit", "where stages begin"]
    rows: list[list[str]] = []
    for each in found:
        summary = each.summary
        figures = [_figure(value) for value in (summary.mean, summary.median, summary.maximum)]
        stages = " ".join(_figure(value) for value in each.by_stage)
        rows.append([each.images, each.grid, each.mode, *figures, f"{each.exact} of {len(each.errors)}", stages])
    show(console, f"{subject.model}: relative error of the inverse", header, rows, paths)


def _figure(value: float) -> str:
    return f"{value:.1e}" if value else "0"
