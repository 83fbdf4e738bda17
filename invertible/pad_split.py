"""From one stream to two wider ones, by zero channels."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _check
from ._value import Value
from .module import InvertibleModule

__all__ = ["PadSplit"]


class PadSplit(InvertibleModule[Tensor, tuple[Tensor, Tensor]]):
    r"""Splits a tensor into two streams and pads each with zero channels: an injective map.

    .. math::
        x \mapsto (x_{:, :h} \mathbin\Vert 0, \; x_{:, h:} \mathbin\Vert 0), \qquad h = \lceil C_{in} / 2 \rceil

    With :class:`PixelUnshuffle` before it, this is the splitting operator :math:`\tilde S` of the i-RevNet. The
    inverse drops the padding, whatever it holds; :meth:`off_range` measures it. The authors' released code pads at
    the end and splits then: its second stream is all zeros, where batch norm divides by the root of its epsilon,
    which deadens the first block and spoils the round trip.

    Source: i-RevNet (Jacobsen et al., 2018), section 3.1, https://arxiv.org/abs/1802.07088

    Args:
        in_channels: channels of the input, at least 1.
        out_channels: channels of both streams together, even, at least ``in_channels``. Equal: the layer is
            bijective. A stream that needs no padding is a view of the input.

    Shape:
        - Input: ``(batch, in_channels, ...)``
        - Output: a pair of ``(batch, out_channels / 2, ...)``

    Raises:
        TypeError: if a number of channels is not an integer, or the input not a tensor; in ``inverse``, if it is
            not a pair of tensors of one dtype.
        ValueError: if ``out_channels`` is odd or too small, or an input has another number of channels.

    Example:
        >>> PadSplit(3, 6)(torch.tensor([[1., 2., 3.]]))
        (tensor([[1., 2., 0.]]), tensor([[3., 0., 0.]]))
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels = _check.integer("PadSplit", "in_channels", in_channels)
        self.out_channels = out_channels = _check.integer("PadSplit", "out_channels", out_channels)
        if in_channels < 1:
            raise ValueError(f"{_check.name(self)}: in_channels must be at least 1, got {in_channels}.")
        if out_channels % 2:
            raise ValueError(f"{_check.name(self)}: out_channels must be even, got {out_channels}.")
        if out_channels < in_channels:
            rule = "out_channels must be at least in_channels"
            raise ValueError(f"{_check.name(self)}: {rule}, got {out_channels} for {in_channels}.")

    @property
    def bijective(self) -> bool:
        return self.in_channels == self.out_channels

    @property
    def isometric(self) -> bool:
        return True

    @property
    def _real_channels(self) -> tuple[int, int]:
        first = (self.in_channels + 1) // 2
        return first, self.in_channels - first

    def forward(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        x = _check.is_tensor(self, x)
        if x.shape[1] != self.in_channels:
            raise _check.value_error(self, f"expected {self.in_channels} channels", x)
        first, _ = self._real_channels
        return self._pad(x[:, :first]), self._pad(x[:, first:])

    def inverse(self, y: tuple[Tensor, Tensor], *, condition: Value | None = None) -> Tensor:
        y1, y2 = _check.are_streams(self, y)
        half = self.out_channels // 2
        if (y1.shape[1], y2.shape[1]) != (half, half):
            raise _check.value_error(self, f"expected {half} channels in each stream", y)
        first, second = self._real_channels
        return torch.cat((y1[:, :first], y2[:, :second]), dim=1)

    def _pad(self, stream: Tensor) -> Tensor:
        missing = self.out_channels // 2 - stream.shape[1]
        after = (0, 0) * (stream.ndim - 2) + (0, missing)
        return pad(stream, after) if missing else stream

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"
