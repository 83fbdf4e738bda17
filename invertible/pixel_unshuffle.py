"""Space to channels: downsampling that loses nothing."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from . import _check
from ._space import check_divisible, each, fitted, parts_of, per_dimension
from ._value import Value, is_channels_last
from .module import InvertibleModule

__all__ = ["PixelUnshuffle"]

_ORDERS = ("channel_major", "pixel_major", "checkerboard", "patch")


class PixelUnshuffle(InvertibleModule[Tensor, Tensor]):
    r"""Moves blocks of pixels into channels: :math:`r` times smaller in space, :math:`r^2` times more channels.

    With sub-pixel :math:`(i, j)` of the block at :math:`(h, w)`, in two dimensions and with one factor :math:`r`,

    .. math::
        y[b, k, h, w] = x[b, c, h r + i, w r + j], \qquad
        k = \begin{cases} c\,r^2 + i\,r + j & \text{channel-major} \\ (i\,r + j)\,C + c & \text{pixel-major} \\
        p(i, j)\,C + c & \text{checkerboard,} \end{cases}

    ``"channel_major"`` equals :class:`torch.nn.PixelUnshuffle`, the inverse of Shi et al.'s sub-pixel convolution.
    ``"pixel_major"`` is the order of the published i-RevNet. ``"checkerboard"`` is pixel-major, too, with those
    sub-pixels first where :math:`i + j` is even: :math:`p` is the position of :math:`(i, j)` among all, sorted by
    :math:`((i + j) \bmod 2, i, j)`. The first half of the channels is one colour of the checkerboard, and the second
    the other one. So all factors must be even, or the colours would change places from block to block.

    ``"patch"`` takes no block apart but the image: into :math:`r \times r` parts, one beside the other in the channels,

    .. math::
        y[b, (i\,r + j)\,C + c, h, w] = x[b, c, i H / r + h, j W / r + w].

    A :class:`Split` that follows makes these different networks: after ``PixelUnshuffle(2)`` of an RGB image, the
    first half holds red and half of green in the first order, the upper row of each block in all colours in the
    second, one diagonal of each block in the third, and the upper half of the image in the last.

    The output is a copy, except that with a factor of 1 or a result of one pixel it may share the input's storage.

    Source: Shi et al., 2016, https://arxiv.org/abs/1609.05158; i-RevNet, section 3.1, Figure 2,
    https://arxiv.org/abs/1802.07088; for the checkerboard RealNVP (Dinh et al., 2017), section 3.4 and Figure 3,
    https://arxiv.org/abs/1605.08803, whose masks choose the colours; for the patches InvertibleNetworks.jl, which
    counts them down the columns (and calls ``"checkerboard"`` what is pixel-major, counted that way).

    Args:
        downscale_factor: in pixels; one for all spatial dimensions, or one for each.
        order: ``"channel_major"``, ``"pixel_major"``, ``"checkerboard"`` or ``"patch"``.

    Shape:
        - Input: ``(batch, channels, *size)`` with one to three spatial dimensions, each divisible by its factor.
          Unlike torch's layer, a batch is required: of a three-dimensional tensor the last alone is space.
        - Output: ``(batch, channels * product of factors, *(size / factor))``

    Raises:
        TypeError: if a factor is not an integer, or the input is not a tensor.
        ValueError: if a factor is below 1, the order is unknown, the checkerboard has an odd factor, or the input's
            size is not divisible.

    Example:
        >>> image = torch.arange(16.).view(1, 1, 4, 4)
        >>> PixelUnshuffle(2)(image)[0, :, 0, 0]
        tensor([0., 1., 4., 5.])
    """

    def __init__(
        self,
        downscale_factor: int | Sequence[int],
        *,
        order: Literal["channel_major", "pixel_major", "checkerboard", "patch"] = "channel_major",
    ) -> None:
        super().__init__()
        self.downscale_factor = per_dimension("PixelUnshuffle", "downscale_factor", downscale_factor)
        factors = each(self.downscale_factor)
        self.order = order
        if not 1 <= len(factors) <= 3 or min(factors) < 1:
            rule = "downscale_factor must be at least 1, one for all or for each of one to three dimensions"
            raise ValueError(f"{_check.name(self)}: {rule}, got {downscale_factor}.")
        if order not in _ORDERS:
            words = f"{', '.join(map(repr, _ORDERS[:-1]))} or {_ORDERS[-1]!r}"
            raise ValueError(f"{_check.name(self)}: order must be {words}, got {order!r}.")
        if order == "checkerboard" and any(factor % 2 for factor in factors):
            rule = "a checkerboard needs even factors, for with odd ones its colours change places from block to block"
            raise ValueError(f"{_check.name(self)}: {rule}, got {downscale_factor}.")

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        factors = fitted(self, self.downscale_factor, _check.is_tensor(self, x))
        check_divisible(self, x, factors, self.downscale_factor)
        return self._rearrange(x, factors, down=True)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        factors = fitted(self, self.downscale_factor, _check.is_tensor(self, y))
        if y.shape[1] % math.prod(factors):
            raise _check.value_error(self, f"channels must be divisible by {math.prod(factors)}", y)
        return self._rearrange(y, factors, down=False)

    def _rearrange(self, x: Tensor, factors: tuple[int, ...], *, down: bool) -> Tensor:
        space, offsets = "dhw"[-len(factors) :], "ijk"[: len(factors)]
        pairs = zip(offsets, space, strict=True) if self.order == "patch" else zip(space, offsets, strict=True)
        large = " ".join(f"({outer} {inner})" for outer, inner in pairs)
        small, pixel = " ".join(space), " ".join(offsets)
        channels = f"(c {pixel})" if self.order == "channel_major" else f"({pixel} c)"
        lengths = dict(zip(offsets, factors, strict=True))
        if is_channels_last(x):  # rearranged in its own layout, so that it keeps it
            coarse, fine = f"b {small} {channels}", f"b {large} c"
            return self._moved(x.movedim(1, -1), coarse, fine, lengths, -1, down=down).movedim(-1, 1)
        return self._moved(x, f"b {channels} {small}", f"b c {large}", lengths, 1, down=down)

    def _moved(self, x: Tensor, coarse: str, fine: str, lengths: dict[str, int], axis: int, *, down: bool) -> Tensor:
        if self.order != "checkerboard":
            return rearrange(x, f"{fine} -> {coarse}" if down else f"{coarse} -> {fine}", **lengths)
        order = _by_colour(tuple(lengths.values()))
        if down:
            return _reordered(rearrange(x, f"{fine} -> {coarse}", **lengths), order, axis)
        back = sorted(range(len(order)), key=order.__getitem__)
        return rearrange(_reordered(x, back, axis), f"{coarse} -> {fine}", **lengths)

    def extra_repr(self) -> str:
        order = "" if self.order == "channel_major" else f", order={self.order!r}"
        return f"downscale_factor={self.downscale_factor}{order}"


def _by_colour(factors: tuple[int, ...]) -> list[int]:
    """For each group of channels of the checkerboard, which one it is in the pixel-major order."""
    pixels = list(itertools.product(*map(range, factors)))
    return sorted(range(len(pixels)), key=lambda k: sum(pixels[k]) % 2)


def _reordered(x: Tensor, order: Sequence[int], axis: int) -> Tensor:
    groups = parts_of(x, axis, (len(order), x.shape[axis] // len(order)), -2 if axis < 0 else 1)
    return torch.cat([groups[k] for k in order], axis)
