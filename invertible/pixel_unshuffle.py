"""Space to channels: downsampling that loses nothing."""

import math
from collections.abc import Sequence
from typing import Literal

from einops import rearrange
from torch import Tensor

from . import _check
from ._value import Value, is_channels_last
from .module import InvertibleModule

__all__ = ["PixelUnshuffle"]

_DIMS = {1: "length", 2: "height and width", 3: "depth, height and width"}


class PixelUnshuffle(InvertibleModule[Tensor, Tensor]):
    r"""Moves blocks of pixels into channels: :math:`r` times smaller in space, :math:`r^2` times more channels.

    With sub-pixel :math:`(i, j)` of the block at :math:`(h, w)`, in two dimensions and with one factor :math:`r`,

    .. math::
        y[b, k, h, w] = x[b, c, h r + i, w r + j], \qquad
        k = \begin{cases} c\,r^2 + i\,r + j & \text{channel-major} \\ (i\,r + j)\,C + c & \text{pixel-major.}
        \end{cases}

    ``"channel_major"`` equals :class:`torch.nn.PixelUnshuffle`, the inverse of Shi et al.'s sub-pixel convolution.
    ``"pixel_major"`` is the order of the published i-RevNet. A :class:`Split` that follows makes these two different
    networks: after ``PixelUnshuffle(2)`` of an RGB image, the first half holds red and half of green in the first
    order, and the upper row of pixels in all colours in the second.

    The output is a copy, except that with a factor of 1 or a result of one pixel it may share the input's storage.

    Source: Shi et al., 2016, https://arxiv.org/abs/1609.05158; i-RevNet, section 3.1, Figure 2,
    https://arxiv.org/abs/1802.07088

    Args:
        downscale_factor: in pixels; one for all spatial dimensions, or one for each.
        order: ``"channel_major"`` or ``"pixel_major"``.

    Shape:
        - Input: ``(batch, channels, *size)`` with one to three spatial dimensions, each divisible by its factor.
          Unlike torch's layer, a batch is required: of a three-dimensional tensor the last alone is space.
        - Output: ``(batch, channels * product of factors, *(size / factor))``

    Raises:
        TypeError: if a factor is not an integer, or the input is not a tensor.
        ValueError: if a factor is below 1, the order is unknown, or the input's size is not divisible.

    Example:
        >>> image = torch.arange(16.).view(1, 1, 4, 4)
        >>> PixelUnshuffle(2)(image)[0, :, 0, 0]
        tensor([0., 1., 4., 5.])
    """

    def __init__(
        self,
        downscale_factor: int | Sequence[int],
        *,
        order: Literal["channel_major", "pixel_major"] = "channel_major",
    ) -> None:
        super().__init__()
        if isinstance(downscale_factor, Sequence) and not isinstance(downscale_factor, str):
            factors = tuple(_check.integer("PixelUnshuffle", "downscale_factor", each) for each in downscale_factor)
            self.downscale_factor: int | tuple[int, ...] = factors
        else:
            factors = (_check.integer("PixelUnshuffle", "downscale_factor", downscale_factor),)
            self.downscale_factor = factors[0]
        self.order = order
        if not 1 <= len(factors) <= 3 or min(factors) < 1:
            rule = "downscale_factor must be at least 1, one for all or for each of one to three dimensions"
            raise ValueError(f"{_check.name(self)}: {rule}, got {downscale_factor}.")
        if order not in {"channel_major", "pixel_major"}:
            raise ValueError(f"{_check.name(self)}: order must be 'channel_major' or 'pixel_major', got {order!r}.")

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        factors = self._factors(_check.is_tensor(self, x))
        if any(size % factor for size, factor in zip(x.shape[2:], factors, strict=True)):
            by = self.downscale_factor
            raise _check.value_error(self, f"{_DIMS[len(factors)]} must be divisible by {by}", x)
        return self._rearrange(x, factors, down=True)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        factors = self._factors(_check.is_tensor(self, y))
        if y.shape[1] % math.prod(factors):
            raise _check.value_error(self, f"channels must be divisible by {math.prod(factors)}", y)
        return self._rearrange(y, factors, down=False)

    def _factors(self, x: Tensor) -> tuple[int, ...]:
        dims = x.ndim - 2
        if isinstance(self.downscale_factor, int):
            if not 1 <= dims <= 3:
                raise _check.value_error(self, "expected one to three spatial dimensions", x)
            return (self.downscale_factor,) * dims
        if len(self.downscale_factor) != dims:
            expected = len(self.downscale_factor)
            raise _check.value_error(self, f"expected {expected} spatial dimensions, one per factor", x)
        return self.downscale_factor

    def _rearrange(self, x: Tensor, factors: tuple[int, ...], *, down: bool) -> Tensor:
        space, offsets = "dhw"[-len(factors) :], "ijk"[: len(factors)]
        large = " ".join(f"({s} {o})" for s, o in zip(space, offsets, strict=True))
        small, pixel = " ".join(space), " ".join(offsets)
        channels = f"(c {pixel})" if self.order == "channel_major" else f"({pixel} c)"
        lengths = dict(zip(offsets, factors, strict=True))
        if is_channels_last(x):  # rearranged in its own layout, so that it keeps it
            x = x.movedim(1, -1)
            coarse, fine = f"b {small} {channels}", f"b {large} c"
            return rearrange(x, f"{fine} -> {coarse}" if down else f"{coarse} -> {fine}", **lengths).movedim(-1, 1)
        coarse, fine = f"b {channels} {small}", f"b c {large}"
        return rearrange(x, f"{fine} -> {coarse}" if down else f"{coarse} -> {fine}", **lengths)

    def extra_repr(self) -> str:
        order = "" if self.order == "channel_major" else f", order={self.order!r}"
        return f"downscale_factor={self.downscale_factor}{order}"
