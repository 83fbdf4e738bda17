"""Fixed-point grids in floating-point formats: between layers, sums without rounding."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from . import _check
from ._range import note
from ._tracing import transformed
from ._value import is_channels_last, laid_out

__all__ = ["Grid", "StreamRangeError"]

_SIGNIFICAND = {torch.float64: 53, torch.float32: 24}
"""Bits of precision, the hidden one included."""


class StreamRangeError(ArithmeticError):
    """A value between the layers reached the limit of the grid, beyond which sums are rounded."""

    peak: float
    """The largest absolute value of the run."""
    limit: float
    """What all absolute values must be below."""


@dataclass(frozen=True, repr=False)
class Grid:
    r"""The multiples of :math:`2^{-\mathrm{bits}}`, held in a floating-point format: on it additions do not round.

    .. math::
        y = x + 2^{-b} \operatorname{round}(2^b F) \qquad\Longleftrightarrow\qquad
        x = y - 2^{-b} \operatorname{round}(2^b F)

    With a significand of :math:`p` bits (53 for float64, 24 for float32), all multiples below
    :math:`2^{p - b}` in size are representable, so that both sums are exact and the inverse is bit for bit, however
    deep the network. A run checks that all its values are; F itself is computed in its parameters' dtype, or under
    autocast, and widened before it is rounded. Ties go to the even multiple. The gradient passes as if nothing were
    rounded ("straight through").

    Two have names: ``"exact"`` is ``Grid(40, torch.float64)``, with a step of 9.1e-13 and a limit of 8192;
    ``"exact32"`` is ``Grid(16, torch.float32)``, with a step of 1.5e-5 and a limit of 256, in half the memory.

    Args:
        bits: of the fraction; the step is ``2 ** -bits``.
        dtype: of the values between the layers, ``torch.float64`` or ``torch.float32``.
        on_range: ``"raise"`` reads the largest value once per run, which synchronises a GPU, and raises a
            :class:`StreamRangeError` if it is beyond the limit; ``"record"`` reads nothing and leaves it at
            ``net.peak``. Grids that differ in this only are equal.

    Raises:
        TypeError: if ``bits`` is not an integer, or ``dtype`` is another one.
        ValueError: if ``bits`` is negative or leaves nothing before the point, or ``on_range`` is another word.

    Example:
        >>> grid = Grid(2)
        >>> grid.round(torch.tensor([0.3, -0.1, 1.0]))
        tensor([0.2500, 0.0000, 1.0000], dtype=torch.float64)
        >>> grid.step
        0.25
    """

    bits: int
    dtype: torch.dtype = torch.float64
    on_range: Literal["raise", "record"] = field(default="raise", kw_only=True, compare=False)

    def __post_init__(self) -> None:
        _check.integer("Grid", "bits", self.bits)
        if self.dtype not in _SIGNIFICAND:
            raise TypeError(f"Grid: dtype must be torch.float64 or torch.float32, got {self.dtype!r}.")
        if not 0 <= self.bits < _SIGNIFICAND[self.dtype]:
            rule = f"bits must be from 0 to {_SIGNIFICAND[self.dtype] - 1} for {self.dtype}"
            raise ValueError(f"Grid: {rule}, got {self.bits}.")
        if self.on_range not in {"raise", "record"}:
            raise ValueError(f'Grid: on_range must be "raise" or "record", got {self.on_range!r}.')

    def __repr__(self) -> str:
        option = "" if self.on_range == "raise" else f", on_range={self.on_range!r}"
        return f"Grid({self.bits}, {self.dtype}{option})"

    @property
    def step(self) -> float:
        """The distance between two neighbours."""
        return 2.0**-self.bits

    @property
    def limit(self) -> float:
        """What every absolute value must be below: there is a multiple at the limit, but rounding leads there, too."""
        return 2.0 ** (_SIGNIFICAND[self.dtype] - self.bits)

    def round(self, x: Tensor) -> Tensor:
        """Returns the nearest multiples in the grid's dtype, without minus zeros; the gradient passes unchanged.

        Values beyond the limit stay multiples, but not all multiples are there.
        """
        if not x.is_floating_point():
            raise TypeError(f"Grid: expected a floating-point tensor, got dtype {x.dtype}. Scale images: x / 255.")
        steps = self._steps(x.detach())
        # Minus zero would come back as zero: other bits. (A compiler might drop the addition of zero.)
        if transformed():
            nearest = torch.where(steps == 0, 0.0, steps * self.step)
        else:
            nearest = torch.add(steps.new_zeros(()), steps, alpha=self.step, out=steps)
        return self._straight_through(x, nearest) if _tracked(x) else nearest

    def add(self, x: Tensor, shift: Tensor) -> Tensor:
        """Returns ``x`` plus the rounded ``shift``, exactly if ``x`` is on the grid and the sum within the limit.

        For layers that keep the grid: the sum's size is taken down for the range check of the run.
        """
        y = self._sum(x, shift, 1)
        note((y,))
        return y

    def subtract(self, y: Tensor, shift: Tensor) -> Tensor:
        """Returns ``y`` minus the rounded ``shift``, as :meth:`add` does."""
        x = self._sum(y, shift, -1)
        note((x,))
        return x

    def _sum(self, x: Tensor, shift: Tensor, sign: int) -> Tensor:
        steps = self._steps(shift.detach())
        # The function's layout must not become the stream's.
        if not _tracked(x, shift):
            steps = _like(x, steps)
            if x.is_contiguous() or is_channels_last(x):
                return torch.add(x, steps, alpha=sign * self.step, out=steps)  # into the memory that is there
            return torch.add(x, steps, alpha=sign * self.step)  # a part of an image: as it is laid out with gradients
        return torch.add(x, _like(x, self._straight_through(shift, steps * self.step)), alpha=sign)

    def _steps(self, x: Tensor) -> Tensor:
        """How many steps from zero, to the nearest integer, in new memory: without error before the rounding."""
        if x.dtype == self.dtype:
            return (x * 2.0**self.bits).round_()
        if x.dtype == torch.float64:  # to narrow it first would round twice
            return (x * 2.0**self.bits).round_().to(self.dtype)
        return x.to(self.dtype).mul_(2.0**self.bits).round_()

    def _straight_through(self, x: Tensor, nearest: Tensor) -> Tensor:
        x = x.view_as(x)
        if x.requires_grad and not transformed():
            # Kernels sum in the order of memory: in one layout, the gradients have the same bits by every strategy.
            x.register_hook(partial(_laid_out, x.dtype, is_channels_last(x)))  # pyright: ignore[reportUnknownMemberType]
        wide = x.to(self.dtype)
        return wide + (nearest - wide).detach()  # exact: both differences and the sum are representable


def _like(stream: Tensor, x: Tensor) -> Tensor:
    """The same values in the stream's memory format."""
    if transformed() or x.ndim not in (4, 5):
        return x
    return laid_out(x, dtype=x.dtype, channels_last=is_channels_last(stream))


def _laid_out(dtype: torch.dtype, channels_last: bool, grad: Tensor | None) -> Tensor | None:
    return None if grad is None else laid_out(grad, dtype=dtype, channels_last=channels_last)


def _tracked(*tensors: Tensor) -> bool:
    return transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def refuse_other_grid(container: Any, layer: Any) -> None:
    """Refuses a layer whose values are on another grid than its container's, which some other container has set.

    A container without a grid may hold a ``Sequential`` that has one of its own: that rounds what enters it.
    """
    if (
        layer.grid is container.grid
        or layer.grid == container.grid
        or (container.grid is None and layer._own_grid is not None)
    ):
        return
    raise ValueError(
        f"{type(container).__name__}: a layer must be on the grid of its container, {container.grid}, got "
        f"{_check.name(layer)} on {layer.grid}, which is that of another container. Set the same grid for both."
    )


PRESETS = {"exact": Grid(40, torch.float64), "exact32": Grid(16, torch.float32)}


def grid_of(value: object) -> Grid | None:
    """A grid by its name; a grid or ``None`` as it is."""
    if value is None or isinstance(value, Grid):
        return value
    if isinstance(value, str):
        if value in PRESETS:
            return PRESETS[value]
        raise ValueError(f'Sequential: grid must be "exact", "exact32", a Grid or None, got {value!r}.')
    raise TypeError(f'Sequential: grid must be "exact", "exact32", a Grid or None, got {value!r}.')
