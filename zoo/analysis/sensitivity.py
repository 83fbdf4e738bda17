"""Where the inverse amplifies: the condition of each block, and of the way back from the features to it."""

import argparse
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from torch import Tensor, nn

from invertible import Coupling, Parallel, Sequential
from zoo.analysis.figures import keep, progress_bar, show
from zoo.analysis.jacobian import Jacobian, largest_singular_values
from zoo.analysis.subject import Reversible, copy_without_grid, images_of, open_subject, reversible, spread
from zoo.arguments import positive
from zoo.plots import new_figure
from zoo.progress import say

__all__ = ["BlockSensitivity", "Sensitivity", "draw_sensitivity", "sensitivity_at", "sensitivity_cost"]

BLOCK = 8
"""Vectors that are multiplied with a Jacobian at once: its largest value alone comes from a basis of 8 blocks."""

DENSE = 256
"""Up to this dimension the largest value comes from the whole matrix."""


PROBES = 8
"""Random vectors for the root mean square of the values outside of that basis."""


FEW = 4096
"""Up to this dimension the work is too little for several threads."""


@dataclass(frozen=True)
class BlockSensitivity:
    """How a block, and the way back to what it sees, change with their arguments at one image.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1))
        >>> block = sensitivity_at(net, torch.rand(1, 3, 8, 8)).blocks[1]
        >>> block.name, block.begins_stage, block.dimension, block.condition == block.largest * block.inverse
        ('3', True, 192, True)
    """

    name: str
    """Of the coupling in the body, as in its ``state_dict``."""
    begins_stage: bool
    """Whether its values have another height and width than those of the block before it."""
    dimension: int
    """Of what it sees."""
    largest: float
    """The largest singular value of the block's Jacobian."""
    inverse: float
    """That of the Jacobian of its inverse: the smallest one's inverse, and a Lipschitz constant near this image."""
    condition: float
    """The product of both: the block's largest singular value over its smallest."""
    cumulative: float
    """The largest singular value of the map from the features back to what the block sees."""
    typical: float
    """The root mean square of that map's singular values, with as many zeros as the features have more dimensions: by
    it small perturbations of the features in random directions grow, on average."""


@dataclass(frozen=True)
class Sensitivity:
    """That of every block at one image.

    Example:
        >>> block = BlockSensitivity("2", True, 12, largest=2.0, inverse=4.0, condition=8.0, cumulative=9.0, typical=1)
        >>> found = Sensitivity((block,), residual=1e-6)
        >>> found.stages, max(each.condition for each in found.blocks)
        ([0], 8.0)
    """

    blocks: tuple[BlockSensitivity, ...]
    """In the order of the forward pass."""
    residual: float
    """The largest of the distances, relative to the value, within which each reported one is a singular value."""

    @property
    def stages(self) -> list[int]:
        """The number of the first block of each stage."""
        return [i for i, each in enumerate(self.blocks) if each.begins_stage]


@contextmanager
def _few_threads(x: Tensor) -> Generator[None]:
    """One thread for small images on a CPU.

    Where other programs run, too, two wait for each other longer than they work: 30 s for what takes one 1.6 s, at
    3,072 dimensions on two busy cores.
    """
    before = torch.get_num_threads()
    if x.device.type == "cpu" and x.numel() <= FEW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def sensitivity_at(
    net: Reversible, image: Tensor, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Sensitivity:
    r"""The condition number of each block at an image, and how much the inverse amplifies up to there.

    With :math:`B_j` the block, :math:`v_j` what it sees and :math:`R_j` the map from the features back to
    :math:`v_j`,

    .. math::
        \kappa_j = \sigma_{\max}(\partial B_j) \, \sigma_{\max}(\partial B_j^{-1}), \qquad
        c_j = \sigma_{\max}(\partial R_j), \qquad
        t_j = \lVert \partial R_j \rVert_F / \sqrt{d},

    d being the dimension of the features. For an additive coupling, :math:`(x, \tilde x) \mapsto (\tilde x, x + F
    \tilde x)`, both values are :math:`(a + \sqrt{a^2 + 4}) / 2` with :math:`a = \sigma_{\max}(\partial F)`, so that
    :math:`\kappa_j` is their square. The network is copied and computes in ``eval``, without a grid, in float32. Values
    are those of the whole matrix up to 256 dimensions, and of :func:`largest_singular_values` beyond.

    An injective network's :math:`R_j` is the left inverse, off its range too.

    Source: none of its own; section 4.1 of i-RevNet asks the question of the whole network,
    https://arxiv.org/abs/1802.07088

    Args:
        net: whose blocks: the couplings of its body, in whatever containers they are.
        image: ``(1, channels, height, width)``.
        seed: of the random vectors.
        progress: is told how many of the blocks are done, and how many there are.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1)).eval()
        >>> found = sensitivity_at(net, torch.rand(1, 3, 8, 8))
        >>> [each.name for each in found.blocks], found.stages
        (['2', '3'], [0, 1])
        >>> all(each.condition >= 1 for each in found.blocks)
        True
    """
    x = image.detach().float()
    with _few_threads(x):
        return _sensitivity(copy_without_grid(net, x.dtype), x, seed, progress)


def _sensitivity(plain: Reversible, x: Tensor, seed: int, progress: Callable[[int, int], None] | None) -> Sensitivity:
    couplings = {name: part for name, part in plain.body.named_modules() if isinstance(part, Coupling)}
    inputs = dict(_walk(plain.body, "forward", x))
    features = plain.features(x)
    blocks: list[BlockSensitivity] = []
    residuals: list[float] = []
    before: tuple[int, ...] = ()
    for name, value in inputs.items():
        coupling = couplings[name]
        output = coupling(value)
        back = partial(_recovered, plain.body, name)
        ahead, inverse, whole = (
            _extent(function, point, seed)
            for function, point in ((coupling, value), (coupling.inverse, output), (back, features))
        )
        size = tuple(output[0].shape[2:])
        figures = (ahead.largest, inverse.largest, ahead.largest * inverse.largest, whole.largest, whole.typical)
        dimension = sum(stream.numel() for stream in value)
        blocks.append(BlockSensitivity(name, size != before, dimension, *figures))
        residuals += [ahead.residual, inverse.residual, whole.residual]
        before = size
        if progress:
            progress(len(blocks), len(inputs))
    return Sensitivity(tuple(blocks), max(residuals, default=0.0))


@dataclass(frozen=True)
class _Extent:
    """Of a Jacobian: its largest singular value, the root mean square of all, and the value's relative residual."""

    largest: float
    typical: float
    residual: float


def _extent(function: Callable[[Any], Any], point: Any, seed: int) -> _Extent:
    """Of a map at a point, both of whose values may be pairs."""
    shapes = [part.shape for part in _parts(point)]

    def packed(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes], dim=1)
        streams = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return _pack(function(streams if isinstance(point, tuple) else streams[0]))

    x = _pack(point)
    small = x.numel() <= DENSE
    # Few products are made of each, so that it does not pay to linearize.
    jacobian = Jacobian(packed, x, block=DENSE if small else BLOCK, linearize=False)
    if small:
        values = torch.linalg.svdvals(jacobian.dense().double())
        energy, largest, residual = float(values.square().sum()), float(values[0]), 0.0
    else:
        found = largest_singular_values(jacobian, 1, probes=PROBES, seed=seed)
        energy, largest, residual = found.energy, float(found.values[0]), float(found.residuals[0] / found.values[0])
    return _Extent(largest, (energy / jacobian.columns) ** 0.5, residual)


def _parts(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _pack(value: Any) -> Tensor:
    return torch.cat([part.flatten(1) for part in _parts(value)], dim=1)


def _walk(layer: nn.Module, method: str, value: Any, name: str = "") -> Generator[tuple[str, Any], None, Any]:
    """Runs a body forward or backwards, and yields name and input of each coupling, in containers too.

    Unlike ``trace`` it enters a ``Parallel``, whose streams an invertible U-Net has.
    """
    prefix = f"{name}." if name else ""
    if isinstance(layer, Sequential):
        children = list(layer.named_children())
        for key, inner in children if method == "forward" else reversed(children):
            value = yield from _walk(inner, method, value, prefix + key)
        return value
    if isinstance(layer, Parallel):
        results: list[Any] = []
        for (key, inner), stream in zip(layer.named_children(), value, strict=True):
            results.append((yield from _walk(inner, method, stream, prefix + key)))
        return tuple(results)
    result = getattr(layer, method)(value)
    if isinstance(layer, Coupling):
        yield name, value if method == "forward" else result
    return result


def _recovered(body: Sequential, name: str, features: Tensor) -> Any:
    """What this coupling saw, from the features back, and no further."""
    return next(value for found, value in _walk(body, "inverse", features) if found == name)


@torch.no_grad()
def sensitivity_cost(net: Reversible, image: Tensor, *, seed: int = 0) -> float:
    """Estimates the seconds of :func:`sensitivity_at`, by the time that the whole inverse takes.

    The ways back to all blocks are half as long, on average; all blocks together, ahead and back, cost two of it.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1))
        >>> 0 < sensitivity_cost(net, torch.rand(1, 3, 8, 8)) < 60
        True
    """
    x = image.detach().float()
    plain = copy_without_grid(net, x.dtype)
    features = plain.features(x)
    blocks = sum(isinstance(part, Coupling) for part in plain.body.modules())
    begun = time.perf_counter()
    with _few_threads(x):
        _extent(plain.inverse, features, seed)  # whose figures are read, so that a device is waited for
    return (time.perf_counter() - begun) * (2 + (blocks + 1) / 2)


def draw_sensitivity(found: Sequence[Sensitivity]) -> Figure:
    """By depth: the condition of each block, and how much the way back from the features to it amplifies.

    Example:
        >>> block = BlockSensitivity("2", True, 12, largest=2.0, inverse=4.0, condition=8.0, cumulative=9.0, typical=1)
        >>> figure = draw_sensitivity([Sensitivity((block,), residual=1e-6)])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['condition number of the block', 'amplification, features to its input']
    """
    figure = new_figure(9.6, 3.8)
    condition, back = figure.subplots(1, 2)
    for i, each in enumerate(found):
        colour, marker = f"C{i % 10}", "osv^D"[i % 5]
        depth, label = range(1, len(each.blocks) + 1), f"image {i + 1}"
        options = {"marker": marker, "markersize": 4, "color": colour}
        condition.plot(depth, [block.condition for block in each.blocks], "-", label=label, **options)
        back.plot(depth, [block.cumulative for block in each.blocks], "-", label=f"{label}, worst", **options)
        back.plot(depth, [block.typical for block in each.blocks], ":", label=f"{label}, typical", **options)
    for axes in (condition, back):
        for stage in found[0].stages if found else ():
            axes.axvline(stage + 0.5, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel="block (dashed: a stage begins)")
        low, high = axes.dataLim.intervaly
        if high > 20 * low:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(found) <= 5:
            axes.legend(frameon=False, fontsize=7)
    condition.set_ylabel("condition number of the block")
    back.set_ylabel("amplification, features to its input")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--images", type=positive, metavar="N", default=2, help="spread over the data's (default: 2)")


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis sensitivity --help``."""
    subject = open_subject(given.checkpoint, device=given.device, size=given.size)
    net = reversible(subject)
    data, name = images_of(given.data)
    chosen = spread(len(data.validation), given.images)
    images = list(subject.batches(data.validation, chosen, 1))
    say(console, f"about {sensitivity_cost(net, images[0]):.0f} s for each of {len(images)} images")
    found: list[Sensitivity] = []
    for i, image in enumerate(images):
        with progress_bar(f"image {i + 1}/{len(images)}") as progress:
            found.append(sensitivity_at(net, image, seed=given.seed, progress=progress))
    numbers = {"images": [data.validation.name(i) for i in chosen], "found": [asdict(each) for each in found]}
    figure = draw_sensitivity(found)
    paths = keep(given.output, "sensitivity", figure, numbers, subject=subject, data=name, seed=given.seed)
    header = ["block", "number", "dimension", "condition number", "inverse", "features to its input", "typical"]
    title = f"{subject.model}: the worst blocks first, the largest figures of {len(found)} images"
    show(console, title, header, worst_blocks(found), paths)


def worst_blocks(found: Sequence[Sensitivity], count: int = 10) -> list[list[str]]:
    """The rows of the table: those of the largest condition numbers, and of all images the largest of each figure."""
    rows: list[tuple[float, list[str]]] = []
    for i, same in enumerate(zip(*(each.blocks for each in found), strict=True)):
        keys = ("condition", "inverse", "cumulative", "typical")
        figures = [max(getattr(block, key) for block in same) for key in keys]
        first = same[0]
        name = f"{first.name}, begins a stage" if first.begins_stage else first.name
        shown = [f"{figure:.3g}" for figure in figures]
        rows.append((figures[0], [name, f"{i + 1} of {len(found[0].blocks)}", str(first.dimension), *shown]))
    return [row for _, row in sorted(rows, key=lambda each: -each[0])[:count]]
