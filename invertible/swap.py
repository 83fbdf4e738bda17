"""Exchanges the two streams of a pair."""

from torch import Tensor

from . import _check
from ._value import Value
from .module import InvertibleModule

__all__ = ["Swap"]


class Swap(InvertibleModule[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]):
    r"""Exchanges the two streams of a pair.

    .. math::
        (x_1, x_2) \mapsto (x_2, x_1)

    The outputs are the inputs themselves; nothing is copied. :class:`Coupling` swaps already.

    Shape:
        - Input: a pair of tensors, of any shapes
        - Output: the pair, exchanged

    Raises:
        TypeError: if the input is not a pair of tensors.

    Example:
        >>> Swap()((torch.zeros(1, 1), torch.ones(1, 1)))
        (tensor([[1.]]), tensor([[0.]]))
    """

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: tuple[Tensor, Tensor], *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = _check.is_pair(self, x)
        return x2, x1

    def inverse(self, y: tuple[Tensor, Tensor], *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        y1, y2 = _check.is_pair(self, y)
        return y2, y1
