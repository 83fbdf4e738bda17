"""Wavelets: one spatial dimension after another into low and high frequencies, and back."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._space import parts_of
from .grid import Grid

__all__ = ["Lift", "analysed", "lifted", "synthesised", "unlifted"]

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Lift:
    """A lifting step: what it adds to every second sample depends on the others only, so that it can be undone."""

    target: int
    """Which samples change: 0 for the even ones, 1 for the odd ones."""
    sign: int
    """Whether it adds or subtracts."""
    weight: float
    """Of the other samples."""
    reach: int = 0
    """0: the other one of the pair; 1 or -1: and that of the next or the previous pair, mirrored at the border."""
    tie: float = 0.0
    """What is added before rounding, in steps of a grid, so that ties go where the integer transform has them."""


def lifted(pair: Pair, lifts: Iterable[Lift], dim: int, grid: Grid | None) -> Pair:
    """Even and odd samples after the steps; on a grid, what is added is rounded to it."""
    samples = list(pair)
    for lift in lifts:
        samples[lift.target] = _stepped(samples, lift, lift.sign, dim, grid)
    return samples[0], samples[1]


def unlifted(pair: Pair, lifts: Sequence[Lift], dim: int, grid: Grid | None) -> Pair:
    """Undoes :func:`lifted`: the steps in reverse, with the other sign."""
    samples = list(pair)
    for lift in reversed(lifts):
        samples[lift.target] = _stepped(samples, lift, -lift.sign, dim, grid)
    return samples[0], samples[1]


def _stepped(samples: Sequence[Tensor], lift: Lift, sign: int, dim: int, grid: Grid | None) -> Tensor:
    target, shift = samples[lift.target], samples[1 - lift.target]
    if lift.reach:
        shift = shift + _neighbour(shift, dim, lift.reach)
    if lift.weight != 1:
        shift = shift * lift.weight
    if grid is None:
        return target + shift if sign > 0 else target - shift
    if lift.tie:
        shift = shift + lift.tie * grid.step
    return grid.add(target, shift) if sign > 0 else grid.subtract(target, shift)


def _neighbour(x: Tensor, dim: int, reach: int) -> Tensor:
    """The next sample or the previous one, at the border the last or the first: there the signal is mirrored."""
    length = x.shape[dim]
    if not length:
        return x
    if reach > 0:
        return torch.cat((x.narrow(dim, 1, length - 1), x.narrow(dim, length - 1, 1)), dim)
    return torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 0, length - 1)), dim)


def analysed(x: Tensor, dims: Sequence[int], split: Callable[[Pair, int], Pair]) -> list[Tensor]:
    """The bands of ``x``, of which the dimension that is split last varies fastest."""
    bands = [x]
    for dim in dims:
        pairs = [parts_of(band, dim, (band.shape[dim] // 2, 2), dim + 1) for band in bands]
        bands = [band for even, odd in pairs for band in split((even, odd), dim)]
    return bands


def synthesised(bands: Sequence[Tensor], dims: Sequence[int], join: Callable[[Pair, int], Pair]) -> Tensor:
    """Undoes :func:`analysed`."""
    for dim in reversed(dims):
        pairs = [join(pair, dim) for pair in zip(bands[::2], bands[1::2], strict=True)]
        bands = [torch.stack(pair, dim + 1).flatten(dim, dim + 1) for pair in pairs]
    return bands[0]
