"""Sums on a grid in one pass over memory, where functions are compiled anyway."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ._range import note_range
from ._tracing import transformed
from ._value import is_channels_last
from .grid import Grid

__all__ = ["FusedSum", "fuse_sums", "fused_sum"]


class FusedSum:
    """Widens, rounds, adds and finds the range as one compiled loop; eagerly each of these is a pass of its own.

    The bits are those of :meth:`Grid.add`: within the limit every step is exact, and torch's rounding is the same.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options: dict[str, Any] = {**options, "dynamic": True}
        self._made: dict[Any, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {}

    def serves(self, x: Tensor, shift: Tensor) -> bool:
        """Whether there is no gradient to take, and both lie in memory alike."""
        tracked = torch.is_grad_enabled() and (x.requires_grad or shift.requires_grad)
        alike = x.stride()[1:] == shift.stride()[1:]  # of a half of a tensor, only the first one differs
        return alike and not tracked and x.numel() > 0 and not transformed()

    def __call__(self, grid: Grid, x: Tensor, shift: Tensor, sign: int) -> Tensor:
        """Returns ``x`` plus ``sign`` times the rounded ``shift``."""
        # Torch allows 8 graphs for each code object: so each dtype and layout has one of its own, for all sizes. Sizes
        # of 1 are none of these to it, and neither is a place at the beginning of memory, as in the half of a tensor.
        key = (
            grid.bits,
            grid.dtype,
            sign,
            shift.dtype,
            x.ndim,
            is_channels_last(x),
            x.stride()[0] == shift.stride()[0],
            *(min(t.storage_offset(), 2) for t in (x, shift)),
            *(size == 1 for size in x.shape),
        )
        if key not in self._made:
            self._made[key] = torch.compile(_sum(grid.bits, grid.dtype, sign), **self._options)
        with torch.no_grad():  # the replay enables gradients, of nothing: to the compiler it would be another graph
            y, least, greatest = self._made[key](x.detach(), shift.detach())
        note_range(least, greatest)
        return y


def _sum(bits: int, dtype: torch.dtype, sign: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    scale, step = 2.0**bits, sign * 2.0**-bits

    def sum_on_grid(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = shift if shift.dtype == torch.float64 else shift.to(dtype)  # to narrow it first would round twice
        y = x + (wide * scale).round().to(dtype) * step
        return y, y.amin(), y.amax()

    own = FunctionType(sum_on_grid.__code__.replace(), globals(), closure=sum_on_grid.__closure__)
    return cast("Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]", own)


_sums: WeakKeyDictionary[nn.Module, FusedSum] = WeakKeyDictionary()


def fuse_sums(function: nn.Module, fused: FusedSum) -> None:
    """Says that what this function makes is to be added so."""
    _sums[function] = fused


def fused_sum(function: nn.Module) -> FusedSum | None:
    """How, if it was said; a copy of the function, which is not compiled, has nothing said of it."""
    return _sums.get(function)
