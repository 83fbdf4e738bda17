"""Singular values of a network's differential at an image: Figure 4 of the i-RevNet paper."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from zoo.analysis.figures import keep, progress_bar, show
from zoo.analysis.jacobian import Jacobian, basis_size, largest_singular_values
from zoo.analysis.parts import Parts, key_of
from zoo.analysis.subject import Reversible, copy_without_grid, images_of, open_subject, reversible, spread
from zoo.arguments import positive
from zoo.environment import free_memory
from zoo.errors import InputError
from zoo.plots import new_figure
from zoo.progress import say

__all__ = ["DENSE", "Spectrum", "SpectrumCost", "draw_spectra", "parts_of", "singular_values", "spectrum_cost"]

DENSE = 4096
"""Up to this dimension all values are computed, from the whole matrix, unless a number of them is asked for."""


@dataclass(frozen=True)
class Spectrum:
    r"""Singular values of :math:`\partial\Phi` at one image.

    Example:
        >>> found = Spectrum((2.0, 1.0), (), 2, 5.0, 0.0, 0.0, None)
        >>> found.condition, found.share(1), found.carrying(0.9)
        (2.0, 0.8, 2)
    """

    largest: tuple[float, ...]
    """Descending; all of them, if they were computed from the whole matrix."""
    smallest: tuple[float, ...]
    """Ascending, from the inverse network; none if all values are known."""
    dimension: int
    """How many there are."""
    energy: float
    """The sum of all their squares."""
    energy_error: float
    """Its standard error; 0 if all values are known."""
    residual: float
    """The largest of the distances, relative to the value, within which each of the largest is a singular value."""
    log_determinant: float | None
    """The sum of the logarithms of all values, if all are known and the map is bijective: 0 for additive couplings."""

    @property
    def complete(self) -> bool:
        """Whether all values are known."""
        return len(self.largest) == self.dimension

    @property
    def condition(self) -> float | None:
        """The largest value over the smallest, if that is known."""
        least = self.largest[-1] if self.complete else self.smallest[0] if self.smallest else 0.0
        return self.largest[0] / least if least else None

    def cumulative(self) -> list[float]:
        """The share of the energy in the first 1, 2, ... values."""
        return (torch.tensor(self.largest, dtype=torch.float64).square().cumsum(0) / self.energy).tolist()

    def share(self, count: int) -> float | None:
        """The share of the energy in the first values, if so many are known."""
        return self.cumulative()[count - 1] if 1 <= count <= len(self.largest) else None

    def carrying(self, share: float) -> int | None:
        """How many values carry this share of the energy, if so many are known."""
        return next((i + 1 for i, found in enumerate(self.cumulative()) if found >= share - 1e-12), None)


@torch.no_grad()
def singular_values(
    net: Reversible,
    image: Tensor,
    *,
    k: int | None = None,
    smallest: int | None = None,
    double: bool = False,
    block: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> Spectrum:
    r"""The singular values of :math:`\partial\Phi` at an image, for :math:`\Phi` = ``net.features`` in ``eval``.

    The network is copied and computes without a grid. In a dimension up to 4,096, or with k the dimension, all
    values come from the whole matrix; else the k largest by
    :func:`largest_singular_values`, and the smallest as inverses of the largest of
    :math:`\partial(\Phi^{-1})`, if the network is bijective.

    Source: i-RevNet, section 4.1 and Figure 4, https://arxiv.org/abs/1802.07088

    Args:
        net: whose features.
        image: ``(1, channels, height, width)``.
        k: how many of the largest; ``None``: all up to 4,096, and 1000 beyond.
        smallest: how many of the smallest where not all are computed; ``None``: 50, or k if that is less.
        double: compute in float64.
        block: vectors that are multiplied with the Jacobian at once.
        seed: of the random vectors.
        progress: is told how much is done, and of how much.
        folder: where what is finished is kept, and found by the same computation, which then ends with the same bits as
            if nothing had cut it off: Ctrl-C, or anything else that came after two minutes. It stays there until
            ``parts_of(...).remove()``.

    Raises:
        InputError: if k is not in 1 ... the dimension, or the smallest are asked of a network that is not bijective.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2).eval()
        >>> found = singular_values(net, torch.rand(1, 3, 16, 16))
        >>> found.complete, abs(found.log_determinant) < 0.1
        (True, True)
    """
    x = image.detach().to(torch.float64 if double else torch.float32)
    dimension = x.numel()
    check_count(k, dimension)
    check_count(smallest or None, dimension, "smallest")
    if smallest and not net.body.bijective:
        raise InputError("the smallest singular values come from the inverse of a bijective network; this is injective")
    settings: dict[str, Any] = {"k": k, "smallest": smallest, "double": double, "block": block, "seed": seed}
    parts = None if folder is None else parts_of(net, image, folder, **settings)
    known = None if parts is None else finished(parts)
    if known is not None:
        return known
    plain = copy_without_grid(net, x.dtype)
    jacobian = Jacobian(plain.features, x, block=block)
    if is_dense(k, dimension):
        values = torch.linalg.svdvals(jacobian.dense(progress)).double().cpu()
        log_determinant = float(values.log().sum()) if plain.body.bijective else None
        energy = float(values.square().sum())
        found = Spectrum(tuple(values.tolist()), (), dimension, energy, 0.0, 0.0, log_determinant)
    else:
        shared: dict[str, Any] = {"seed": seed, "progress": progress, "parts": parts}
        largest = largest_singular_values(jacobian, k or 1000, **shared, part="largest")
        small = min(50, k or 1000) if smallest is None else smallest
        least: tuple[float, ...] = ()
        if small and plain.body.bijective:
            inverse = Jacobian(plain.inverse, plain.features(x), block=block)
            least = tuple((1 / largest_singular_values(inverse, small, **shared, part="smallest").values).tolist())
        residual = float((largest.residuals / largest.values).amax())
        values = tuple(largest.values.tolist())
        found = Spectrum(values, least, dimension, largest.energy, largest.energy_error, residual, None)
    if parts is not None:
        parts.save("spectrum", {}, **asdict(found))
        parts.remove("values-")
    return found


def parts_of(
    net: Reversible,
    image: Tensor,
    folder: Path,
    *,
    k: int | None = None,
    smallest: int | None = None,
    double: bool = False,
    block: int = 32,
    seed: int = 0,
) -> Parts:
    """What :func:`singular_values` keeps in a folder when it is called with the same arguments."""
    key = key_of(
        net=net, image=image, analysis="spectrum", k=k, smallest=smallest, double=double, block=block, seed=seed
    )
    return Parts(folder, key)


def finished(parts: Parts) -> Spectrum | None:
    """What is known of an image, if all of it is."""
    kept = parts.load("spectrum")
    if kept is None:
        return None
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in kept[1].items()}
    return Spectrum(**fields)


def check_count(k: int | None, dimension: int, name: str = "k") -> None:
    """Refuses what is no number of singular values.

    Raises:
        InputError: if it is not in 1 ... the dimension.
    """
    if k is not None and not 1 <= k <= dimension:
        raise InputError(f"{name} must be in 1 ... {dimension}, the dimension of the image, got {k}")


def is_dense(k: int | None, dimension: int) -> bool:
    """Whether all values are computed, from the whole matrix."""
    return k == dimension or (k is None and dimension <= DENSE)


@dataclass(frozen=True)
class SpectrumCost:
    """What a spectrum takes, estimated."""

    memory: int
    """Bytes."""
    seconds: float
    """For each image."""


@torch.no_grad()
def spectrum_cost(
    net: Reversible, image: Tensor, *, k: int | None, double: bool = False, block: int = 32
) -> SpectrumCost:
    """Estimates memory and time of :func:`singular_values`: from its sizes, and from products that are timed.

    Memory is that of the two bases, or of the whole matrix and what its decomposition works on, and of 16 values of
    each stream for each vector of a block.

    Example:
        >>> import zoo
        >>> spectrum_cost(zoo.create("irevnet_small", blocks=(1, 1)), torch.rand(1, 3, 8, 8), k=None).memory
        835584
    """
    x = image.detach().to(torch.float64 if double else torch.float32)
    plain, dimension = copy_without_grid(net, x.dtype), x.numel()
    jacobian = Jacobian(plain.features, x, block=block)
    v = torch.randn(min(block, dimension), dimension, dtype=x.dtype, device=x.device)
    u = jacobian.times(v)  # the first is slower
    ahead = _seconds(lambda: jacobian.times(v), x.device)
    back = _seconds(lambda: jacobian.transposed_times(u), x.device)
    square = torch.randn(512, 512, dtype=x.dtype, device=x.device)
    per_operation = _seconds(lambda: square @ square, x.device) / (2 * 512**3)
    work = 16 * block * max(dimension, jacobian.rows)
    if is_dense(k, dimension):
        values = 3 * dimension * jacobian.rows
        seconds = ahead * dimension / block + 8 * dimension**2 * jacobian.rows * per_operation
    else:
        size = basis_size(jacobian, k or 1000)
        values = size * (dimension + jacobian.rows) + 3 * size**2
        products = (ahead + back) * size / block
        seconds = products + (10 * size**2 * (dimension + jacobian.rows) + 20 * size**3) * per_operation
    return SpectrumCost((values + work) * x.element_size(), seconds)


def largest_fitting(net: Reversible, image: Tensor, k: int, free: int, *, double: bool, block: int = 32) -> int:
    """The largest k up to this one, in steps of a tenth, whose spectrum fits into the memory; 0 if none does."""
    dimension, size = image.numel(), 8 if double else 4
    rows = dimension if net.body.bijective else net.features(image).numel()
    while k:
        basis = min(max(3 * k, 8 * block), dimension)
        if (basis * (dimension + rows) + 3 * basis**2 + 16 * block * rows) * size <= free:
            return k
        k = k * 9 // 10
    return 0


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The least of three times, for what runs beside takes some."""
    times: list[float] = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times.append(time.perf_counter())
    return min(after - before for before, after in pairwise(times[1:]))


def draw_spectra(spectra: Sequence[Spectrum]) -> Figure:
    """Figure 4: singular values over the largest, and the energy of the first ones, one line for each image.

    Example:
        >>> [axes.get_yscale() for axes in draw_spectra([Spectrum((2.0, 1.0), (), 2, 5.0, 0.0, 0.0, None)]).axes]
        ['log', 'linear']
    """
    figure = new_figure(9, 3.6)
    values, energy = figure.subplots(1, 2)
    for i, each in enumerate(spectra):
        first, colour = each.largest[0], f"C{i % 10}"
        counts = range(1, len(each.largest) + 1)
        values.plot(counts, [value / first for value in each.largest], color=colour, label=f"image {i + 1}")
        if each.smallest:
            last = range(each.dimension, each.dimension - len(each.smallest), -1)
            values.plot(last, [value / first for value in each.smallest], ":", color=colour)
        energy.plot(counts, [100 * share for share in each.cumulative()], color=colour, label=f"image {i + 1}")
    values.set(xlabel="number of the singular value", ylabel="value / the largest", yscale="log")
    energy.set(xlabel="number of singular values", ylabel="share of the energy (%)", xscale="log", ylim=(0, 102))
    for share in (80, 97):
        energy.axhline(share, color="grey", linewidth=0.8, linestyle=":")
    for axes in (values, energy):
        axes.grid(alpha=0.3)
        if len(spectra) <= 10:
            axes.legend(frameon=False)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--images", type=positive, metavar="N", default=2, help="spread over the data's (default: 2)")
    parser.add_argument(
        "--k", type=positive, metavar="N", help=f"largest values (default: all up to {DENSE}, 1000 beyond)"
    )
    parser.add_argument("--smallest", type=positive, metavar="N", help="smallest values (default: 50, where not all)")
    parser.add_argument("--double", action="store_true", help="compute in float64")


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis spectrum --help``."""
    subject = open_subject(given.checkpoint, device=given.device, size=given.size)
    net = reversible(subject)
    data, name = images_of(given.data)
    chosen = spread(len(data.validation), given.images)
    images = list(subject.batches(data.validation, chosen, 1))
    check_count(given.k, images[0].numel())
    check_count(given.smallest, images[0].numel(), "smallest")
    options: dict[str, Any] = {"k": given.k, "smallest": given.smallest, "double": given.double, "seed": given.seed}
    folder = given.output / "spectrum.parts"
    parts = [parts_of(net, image, folder, **options) for image in images]
    done = sum(finished(each) is not None for each in parts)
    if done:
        say(console, f"{done} of {len(images)} images are finished already, in {folder}")
    if done < len(images):
        say_cost(console, net, images[0], given.k, len(images) - done, double=given.double, device=subject.device)
    found: list[Spectrum] = []
    try:
        for i, image in enumerate(images):
            with progress_bar(f"image {i + 1}/{len(images)}") as progress:
                found.append(singular_values(net, image, **options, progress=progress, folder=folder))
    except KeyboardInterrupt:
        if not any(each.any_left for each in parts):
            raise
        kept = f"what is finished is kept in {folder}, and the same command goes on with it"
        raise KeyboardInterrupt(kept) from None
    numbers = {"images": [data.validation.name(i) for i in chosen], "spectra": [asdict(each) for each in found]}
    paths = keep(given.output, "spectrum", draw_spectra(found), numbers, subject=subject, data=name, seed=given.seed)
    for each in parts:
        each.remove()
    header = ["", *(f"image {i + 1}" for i in range(len(found)))]
    show(
        console,
        f"{subject.model}: singular values at an image of {found[0].dimension} values",
        header,
        _rows(found),
        paths,
    )


def say_cost(
    console: Console, net: Reversible, image: Tensor, k: int | None, images: int, *, double: bool, device: torch.device
) -> None:
    """Says what the spectra will take, before they begin.

    Raises:
        InputError: if they do not fit into the memory; it offers a smaller k.
    """
    free = free_memory(device)
    cost = spectrum_cost(net, image, k=k, double=double)
    what = f"{cost.memory / 2**30:.2f} GiB"
    say(console, f"about {what} and {cost.seconds:.0f} s for each of {images} images")
    if free is not None and cost.memory > free:
        fits = largest_fitting(net, image, k or min(1000, image.numel()), free, double=double)
        offer = f"--k {fits} fits" if fits else "not even one singular value fits"
        raise InputError(f"the spectrum takes about {what}, and {free / 2**30:.2f} GiB are free; {offer}")


def _rows(found: Sequence[Spectrum]) -> list[list[str]]:
    def number(value: float | None, form: str = ".3g") -> str:
        return "-" if value is None else format(value, form)

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    dimension = found[0].dimension
    parts = {"0.66 % of the values": 1_000, "6.6 % of the values": 10_000}  # of the paper's 150,528
    rows = [
        ["largest", *(number(each.largest[0]) for each in found)],
        ["smallest", *(number(min((*each.largest, *each.smallest))) if _knows_end(each) else "-" for each in found)],
        ["condition number", *(number(each.condition) for each in found)],
        ["energy", *(number(each.energy, ".5g") for each in found)],
    ]
    for what, count in parts.items():
        own = max(round(count / 150_528 * dimension), 1)
        rows.append([f"energy in {own}, {what}", *(percent(each.share(own)) for each in found)])
    for share in (0.8, 0.97):
        rows.append([f"values with {share:.0%} of it", *(number(each.carrying(share), "d") for each in found)])
    return [
        *rows,
        ["largest residual", *(number(each.residual, ".1e") for each in found)],
        ["sum of log σ, 0 if additive", *(number(each.log_determinant, ".1e") for each in found)],
    ]


def _knows_end(each: Spectrum) -> bool:
    return each.complete or bool(each.smallest)
