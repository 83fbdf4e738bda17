"""Scales one channel of a pair up and the other down."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check
from ._fused import FusedSum
from ._tracing import transformed
from ._value import is_channels_last, laid_out, zero_log_det
from .grid import Grid
from .transform import CouplingTransform, TransformOnGrid

__all__ = ["VolumePreserving"]

_LARGEST = 1e6


class VolumePreserving(CouplingTransform):
    r"""Scales channel 2i, divides channel 2i + 1 by the same scale, and shifts both; the log-determinant is exactly 0.

    .. math::
        (a, b) \mapsto (s a + t_a, \; b / s + t_b), \qquad
        s = \frac{1 + k u}{1 - k u}, \quad u = \frac{r}{\sqrt{1 + r^2}}, \quad k = \frac{m - 1}{m + 1}

    for the channels :math:`a, b` of a pair, the number :math:`r` that the function says, and :math:`m` =
    ``max_scale``: :math:`s` is in :math:`(1/m, m)`, 1 where :math:`r = 0`, and :math:`1/s` for :math:`-r`.

    The function's output has two numbers for each channel, first the scales :math:`r`, of which those at even channels
    are read and the others are not, and then the shifts.

    Without a :class:`Grid` it is computed as written, which takes two products where the way below takes three and
    cancels. On a grid it is four shears, each of which adds to one channel a rounded multiple of the other,

    .. math::
        b \mathrel{+}= a, \quad a \mathrel{+}= (s - 1)\, b, \quad b \mathrel{-}= a / s, \quad
        a \mathrel{+}= s (1 - s)\, b + t_a, \quad b \mathrel{+}= t_b,

    and is undone bit for bit by subtracting the same multiples in the opposite order; the values are those of the
    formula to within a few steps of the grid, the gradient is that of the shears without rounding. The sums in
    between are larger than what comes out and count for the grid's limit. The scale is made of operations that IEEE 754
    rounds correctly, and of no exponential, whose last bit depends on an element's place in memory.

    Every :math:`s` but 1 stretches one of two directions, and what a deep stack stretches, its inverse does, too:
    without a grid a small ``max_scale`` is safer. The volume is kept, unlike with :class:`Affine`.

    Cost: the scale, a product or a quotient, and a sum per element; on a grid five rounded sums per pair. The
    function has twice the channels.

    Source: the shears are the lifting steps of Daubechies & Sweldens (1998), section 7, of a diagonal matrix with
    determinant 1, https://doi.org/10.1007/BF02476026. GIN (Sorrenson et al., 2020), https://arxiv.org/abs/2001.04872,
    keeps the volume by scales whose logarithms sum to zero over all channels; here they do in each pair, since that is
    what shears can do. The form of the scale is ours.

    Args:
        max_scale: the limit of the scale and of its inverse, above 1 and at most 1e6: far above that, 1 - k u is 0 in
            float32.

    Shape:
        - Input: the stream ``(batch, channels, ...)``, channels even, and parameters ``(batch, 2 * channels, ...)``
        - Output: as the stream

    Raises:
        TypeError: if ``max_scale`` is not a number.
        ValueError: if ``max_scale`` is not above 1 and at most 1e6, or the number of channels is odd.

    Example:
        >>> transform = VolumePreserving()
        >>> y = transform(torch.tensor([[2., 3.]]), torch.tensor([[0.75, 0., 10., 20.]]))
        >>> y
        tensor([[13., 22.]])
        >>> transform.inverse(y, torch.tensor([[0.75, 0., 10., 20.]])).round(decimals=5)
        tensor([[2., 3.]])
    """

    parameters_per_element = 2

    def __init__(self, *, max_scale: float = 2.0) -> None:
        super().__init__()
        self.max_scale = _check.number("VolumePreserving", "max_scale", max_scale)
        if not 1 < self.max_scale <= _LARGEST:
            rule = f"max_scale must be above 1 and at most {_LARGEST:g}"
            raise ValueError(f"VolumePreserving: {rule}, got {max_scale!r}.")

    @property
    def keeps_grid(self) -> bool:
        own = VolumePreserving
        return type(self).forward is own.forward and type(self).inverse is own.inverse

    def check(self, x: Tensor) -> None:
        if x.shape[1] % 2:
            raise _check.value_error(self, "the number of channels must be even", x)

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        self.check(x)
        scale, shift = _read(x, parameters, self.max_scale)
        return (x * _interleaved(scale, 1 / scale) + shift).to(x.dtype)

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        self.check(y)
        scale, shift = _read(y, parameters, self.max_scale)
        return ((y - shift) * _interleaved(1 / scale, scale)).to(y.dtype)

    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, parameters), zero_log_det(x)

    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y, parameters), zero_log_det(y)

    def extra_repr(self) -> str:
        return "" if self.max_scale == 2 else f"max_scale={self.max_scale}"

    def _on_grid(self, grid: Grid, fused: FusedSum | None) -> TransformOnGrid:
        return _Shears(grid, self.max_scale)


@dataclass  # as that of Additive
class _Shears(TransformOnGrid):
    """The lifting steps, on a grid."""

    grid: Grid
    max_scale: float

    def __call__(self, x: Tensor, parameters: Tensor) -> Tensor:
        add, subtract = self.grid.add, self.grid.subtract
        a, b, s, (t_a, t_b) = self._parts(x, parameters)
        b = add(b, a)
        a = add(a, (s - 1) * b)
        b = subtract(b, a / s)
        a = add(a, s * (1 - s) * b + t_a)
        return _joined(x, a, add(b, t_b))

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        add, subtract = self.grid.add, self.grid.subtract
        a, b, s, (t_a, t_b) = self._parts(y, parameters)
        b = subtract(b, t_b)
        a = subtract(a, s * (1 - s) * b + t_a)
        b = add(b, a / s)
        a = subtract(a, (s - 1) * b)
        return _joined(y, a, subtract(b, a))

    def _parts(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The channels of all pairs, their scales and their shifts, in one layout: that of the stream."""
        scale, shift = _read(x, parameters, self.max_scale)
        a, b, s, t_a, t_b = (_like(x, part) for part in (x[:, 0::2], x[:, 1::2], scale, shift[:, 0::2], shift[:, 1::2]))
        return a, b, s, (t_a, t_b)


def _read(x: Tensor, parameters: Tensor, max_scale: float) -> tuple[Tensor, Tensor]:
    """The scale of each pair, and the shift of each channel, in single precision at least."""
    wide = parameters.to(torch.promote_types(torch.promote_types(x.dtype, parameters.dtype), torch.float32))
    # Beyond 1e9 nothing changes any more, and the square of what is far beyond is no number.
    r = wide[:, : x.shape[1] : 2].clamp(-1e9, 1e9)
    u = (max_scale - 1) / (max_scale + 1) * (r / (1 + r * r).sqrt())
    return (1 + u) / (1 - u), wide[:, x.shape[1] :]


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack((a, b), dim=2).flatten(1, 2)


def _joined(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _like(x, _interleaved(a, b))


def _like(x: Tensor, part: Tensor) -> Tensor:
    if transformed():
        return part
    return laid_out(part, dtype=part.dtype, channels_last=is_channels_last(x))
