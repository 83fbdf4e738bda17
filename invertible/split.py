"""Between one stream and two: halves of the channels."""

import torch
from torch import Tensor, nn

from . import _check
from ._value import Value
from .module import InvertibleModule

__all__ = ["Merge", "Split"]


class Split(InvertibleModule[Tensor, tuple[Tensor, Tensor]]):
    r"""Splits a tensor into two streams: the first and the second half of its channels.

    .. math::
        x \mapsto (x_1, x_2), \qquad x_1 = x_{:, :C/2}, \quad x_2 = x_{:, C/2:}

    The streams are views of the input and share its storage.

    Shape:
        - Input: ``(batch, channels, ...)``, channels even
        - Output: a pair of ``(batch, channels / 2, ...)``

    Raises:
        TypeError: if the input is not a tensor; in ``inverse``, if it is not a pair of tensors of one dtype.
        ValueError: if the number of channels is odd; in ``inverse``, if the streams differ in shape or device.

    Example:
        >>> Split()(torch.tensor([[1., 2., 3., 4.]]))
        (tensor([[1., 2.]]), tensor([[3., 4.]]))
    """

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return _split(self, x)

    def inverse(self, y: tuple[Tensor, Tensor], *, condition: Value | None = None) -> Tensor:
        return _merge(self, y)


class Merge(InvertibleModule[tuple[Tensor, Tensor], Tensor]):
    r"""Joins two streams along the channels; the inverse map of :class:`Split`.

    .. math::
        (x_1, x_2) \mapsto (x_1 \mathbin\Vert x_2)

    The streams must have the same number of channels, for the inverse splits in the middle.

    Shape:
        - Input: a pair of ``(batch, channels, ...)``
        - Output: ``(batch, 2 * channels, ...)``

    Raises:
        TypeError: if the input is not a pair of tensors of one dtype; in ``inverse``, if it is not a tensor.
        ValueError: if the streams differ in shape or device; in ``inverse``, if the number of channels is odd.

    Example:
        >>> Merge()((torch.tensor([[1., 2.]]), torch.tensor([[3., 4.]])))
        tensor([[1., 2., 3., 4.]])
    """

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: tuple[Tensor, Tensor], *, condition: Value | None = None) -> Tensor:
        return _merge(self, x)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return _split(self, y)


def _split(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = _check.is_tensor(module, x)
    if x.shape[1] % 2:
        raise _check.value_error(module, "the number of channels must be even", x)
    x1, x2 = x.chunk(2, dim=1) if x.shape[1] else (x, x)
    return x1, x2


def _merge(module: nn.Module, y: tuple[Tensor, Tensor]) -> Tensor:
    y1, y2 = _check.are_streams(module, y)
    if y1.shape[1] != y2.shape[1]:
        raise _check.value_error(module, "both streams must have the same number of channels", y)
    return torch.cat((y1, y2), dim=1)
