"""Between one stream and two: the first channels, and the others."""

import torch
from torch import Tensor, nn

from . import _check
from ._tracing import transformed
from ._value import Value, is_channels_last, laid_out
from .module import InvertibleModule

__all__ = ["Merge", "Split"]


class Split(InvertibleModule[Tensor, tuple[Tensor, Tensor]]):
    r"""Splits a tensor into two streams: the first and the second half of its channels, or the first c and the others.

    .. math::
        x \mapsto (x_1, x_2), \qquad x_1 = x_{:, :c}, \quad x_2 = x_{:, c:}

    The streams are views of the input and share its storage.

    Args:
        channels: of the first stream, c; ``None`` for half of them.

    Shape:
        - Input: ``(batch, C, ...)``, C even, or above ``channels``
        - Output: a pair of ``(batch, c, ...)`` and ``(batch, C - c, ...)``

    Raises:
        TypeError: if ``channels`` is not an integer, or the input is not a tensor; in ``inverse``, if it is not a pair
            of tensors of one dtype.
        ValueError: if ``channels`` is not positive, or leaves none for the second stream; without it, if the number of
            channels is odd. In ``inverse``, if the streams differ in batch, spatial size or device, or have other
            numbers of channels.

    Example:
        >>> Split()(torch.tensor([[1., 2., 3., 4.]]))
        (tensor([[1., 2.]]), tensor([[3., 4.]]))
        >>> Split(channels=1)(torch.tensor([[1., 2., 3., 4.]]))
        (tensor([[1.]]), tensor([[2., 3., 4.]]))
    """

    def __init__(self, *, channels: int | None = None) -> None:
        super().__init__()
        self.channels = _check_channels("Split", channels)

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return _split(self, x, self.channels)

    def inverse(self, y: tuple[Tensor, Tensor], *, condition: Value | None = None) -> Tensor:
        return _merge(self, y, self.channels)

    def extra_repr(self) -> str:
        return "" if self.channels is None else f"channels={self.channels}"


class Merge(InvertibleModule[tuple[Tensor, Tensor], Tensor]):
    r"""Joins two streams along the channels; the inverse map of :class:`Split`.

    .. math::
        (x_1, x_2) \mapsto (x_1 \mathbin\Vert x_2)

    The inverse must know where to split. So the streams must have the same number of channels, or ``channels`` says how
    many the first has. A :class:`Coupling` swaps the streams: after an odd number of them, the first is what was the
    second.

    Args:
        channels: of the first stream; ``None`` if both have the same number.

    Shape:
        - Input: a pair of ``(batch, c, ...)`` and ``(batch, C - c, ...)``
        - Output: ``(batch, C, ...)``

    Raises:
        TypeError: if ``channels`` is not an integer, or the input is not a pair of tensors of one dtype; in
            ``inverse``, if it is not a tensor.
        ValueError: if ``channels`` is not positive, or the streams differ in batch, spatial size or device, or have
            other numbers of channels. In ``inverse``, if ``channels`` leaves none for the second stream; without it,
            if the number of channels is odd.

    Example:
        >>> Merge()((torch.tensor([[1., 2.]]), torch.tensor([[3., 4.]])))
        tensor([[1., 2., 3., 4.]])
    """

    def __init__(self, *, channels: int | None = None) -> None:
        super().__init__()
        self.channels = _check_channels("Merge", channels)

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: tuple[Tensor, Tensor], *, condition: Value | None = None) -> Tensor:
        return _merge(self, x, self.channels)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return _split(self, y, self.channels)

    def extra_repr(self) -> str:
        return "" if self.channels is None else f"channels={self.channels}"


def _check_channels(who: str, channels: int | None) -> int | None:
    if channels is None:
        return None
    channels = _check.integer(who, "channels", channels)
    if channels < 1:
        raise ValueError(f"{who}: channels must be at least 1, got {channels}.")
    return channels


def _split(module: nn.Module, x: Tensor, channels: int | None) -> tuple[Tensor, Tensor]:
    x = _check.is_tensor(module, x)
    if channels is not None:
        if x.shape[1] <= channels:
            raise _check.value_error(module, f"expected more than {channels} channels", x)
        return x[:, :channels], x[:, channels:]
    if x.shape[1] % 2:
        fix = f" Unequal streams: {type(module).__name__}(channels=...)."
        raise _check.value_error(module, "the number of channels must be even", x, fix)
    x1, x2 = x.chunk(2, dim=1) if x.shape[1] else (x, x)
    return x1, x2


def _merge(module: nn.Module, y: tuple[Tensor, Tensor], channels: int | None) -> Tensor:
    y1, y2 = _check.are_streams(module, y)
    if channels is not None and (y1.shape[1] != channels or not y2.shape[1]):
        rule = f"expected {channels} channels in the first stream and at least one in the second"
        raise _check.value_error(module, rule, y)
    if channels is None and y1.shape[1] != y2.shape[1]:
        fix = f" Unequal streams: {type(module).__name__}(channels={y1.shape[1]})."
        raise _check.value_error(module, "both streams must have the same number of channels", y, fix)
    joined = torch.cat((y1, y2), dim=1)
    if transformed() or is_channels_last(joined) or not (is_channels_last(y1) and is_channels_last(y2)):
        return joined
    return laid_out(
        joined, dtype=joined.dtype, channels_last=True
    )  # of one sample, torch may take another stride for a format
