"""Other shapes for the same elements."""

import math
from collections.abc import Sequence

from torch import Tensor

from . import _check
from ._value import Value
from .module import InvertibleModule

__all__ = ["Reshape"]


class Reshape(InvertibleModule[Tensor, Tensor]):
    r"""Gives each sample another shape: between images and vectors, for instance.

    .. math::
        y_{b, k} = x_{b, k}, \qquad k \text{ counts the elements of a sample, the last dimension fastest}

    The inverse has to know the shape that it goes back to, and so both are given. Where it can, it returns a view.

    Args:
        shape: of a sample, without the batch: channels, then space.
        new_shape: what it becomes; one number may be -1, for what is left.

    Shape:
        - Input: ``(batch, *shape)``
        - Output: ``(batch, *new_shape)``

    Raises:
        TypeError: if a size is not an integer, or the input not a tensor.
        ValueError: if a shape is empty or has a size below 1, the two differ in elements, or the input has another
            shape.

    Example:
        >>> flatten = Reshape((2, 1, 3), (-1,))
        >>> flatten(torch.zeros(4, 2, 1, 3)).shape
        torch.Size([4, 6])
        >>> flatten.inverse(torch.zeros(4, 6)).shape
        torch.Size([4, 2, 1, 3])
    """

    def __init__(self, shape: Sequence[int], new_shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = _sizes("shape", shape)
        new = [_check.integer("Reshape", "a size of new_shape", size) for size in new_shape]
        if new.count(-1) == 1:
            known = math.prod(size for size in new if size != -1)
            if known > 0:
                new[new.index(-1)] = math.prod(self.shape) // known
        self.new_shape = _sizes("new_shape", new)
        if math.prod(self.shape) != math.prod(self.new_shape):
            raise ValueError(
                f"Reshape: both shapes must have as many elements, got {self.shape} and {tuple(new_shape)}."
            )

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        return self._moved(x, self.shape, self.new_shape)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        return self._moved(y, self.new_shape, self.shape)

    def _moved(self, x: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
        x = _check.is_tensor(self, x)
        if tuple(x.shape[1:]) != old:
            raise _check.value_error(self, f"expected samples of shape {old}", x)
        return x.reshape(x.shape[0], *new)

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.new_shape}"


def _sizes(option: str, shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(_check.integer("Reshape", f"a size of {option}", size) for size in shape)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"Reshape: {option} must have one size at least, and each at least 1, got {sizes}.")
    return sizes
