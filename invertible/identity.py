"""The layer that changes nothing."""

from typing import Any

from ._value import Value
from .module import InvertibleModule

__all__ = ["Identity"]


class Identity(InvertibleModule[Any, Any]):
    r"""Returns its input, whatever the value: :math:`y = x`.

    Shape:
        - Input: any value
        - Output: the same object

    Raises:
        TypeError: from the log-determinants and ``off_range``, if the input is no tensor, nor a tuple of tensors.
        ValueError: from these, if a tensor has no batch and channels.

    Example:
        >>> x = torch.ones(1, 3)
        >>> Identity()(x) is x
        True
    """

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: Any, *, condition: Value | None = None) -> Any:
        return x

    def inverse(self, y: Any, *, condition: Value | None = None) -> Any:
        return y
