"""To sizes that can be halved, by zeros at the end of space."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from . import _check
from ._space import each, fitted, per_dimension
from ._value import Value
from .module import InvertibleModule

__all__ = ["Pad"]


class Pad(InvertibleModule[Tensor, Tensor]):
    r"""Pads images with zeros at the end of each spatial dimension, up to a multiple: an injective map.

    .. math::
        y_{:, :, h, w} = \begin{cases} x_{:, :, h, w} & h < H, \; w < W \\ 0 & \text{else,} \end{cases} \qquad
        h < m \lceil H / m \rceil, \quad w < m \lceil W / m \rceil

    It goes before what halves an image, such as :class:`PixelUnshuffle`, where its size is not divisible. The inverse
    has to know where the image ends, and so the layer is made for images of one size and refuses others: nothing in
    the output tells, and a layer that remembered its last input would invert another batch wrongly. The inverse
    returns a view of what is inside, whatever the padding holds; :meth:`off_range` measures that. An image whose size
    is a multiple is returned as it is, and the layer is bijective.

    Source: iUNets (Etmann et al., 2020), https://arxiv.org/abs/2005.05220, whose code pads inside the network; the
    layer of its own, with the size declared, is ours.

    Args:
        size: of the images, in pixels; one for all spatial dimensions, or one for each.
        multiple_of: what the size becomes a multiple of; one for all spatial dimensions, or one for each.

    Shape:
        - Input: ``(batch, channels, *size)`` with one to three spatial dimensions
        - Output: ``(batch, channels, *padded)``

    Raises:
        TypeError: if an option is not an integer, or the input not a tensor.
        ValueError: if an option is below 1, or the two differ in length, or the input has another size.

    Example:
        >>> Pad((1, 3), multiple_of=2)(torch.ones(1, 1, 1, 3))
        tensor([[[[1., 1., 1., 0.],
                  [0., 0., 0., 0.]]]])
    """

    def __init__(self, size: int | Sequence[int], *, multiple_of: int | Sequence[int]) -> None:
        super().__init__()
        self.size = per_dimension("Pad", "size", size)
        self.multiple_of = per_dimension("Pad", "multiple_of", multiple_of)
        for option, value in (("size", self.size), ("multiple_of", self.multiple_of)):
            if not 1 <= len(each(value)) <= 3 or min(each(value)) < 1:
                rule = f"{option} must be at least 1, one for all or for each of one to three dimensions"
                raise ValueError(f"{_check.name(self)}: {rule}, got {value}.")
        lengths = {len(value) for value in (self.size, self.multiple_of) if isinstance(value, tuple)}
        if len(lengths) > 1:
            raise ValueError(f"{_check.name(self)}: size and multiple_of must be for as many dimensions.")

    @property
    def bijective(self) -> bool:
        sizes, multiples = each(self.size), each(self.multiple_of)
        count = max(len(sizes), len(multiples))
        return not any(s % m for s, m in zip(_spread(sizes, count), _spread(multiples, count), strict=True))

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        size, padded = self._sizes(x)
        if tuple(x.shape[2:]) != size:
            raise _check.value_error(self, f"expected images of size {size}", x)
        if size == padded:
            return x
        missing = [(0, large - small) for small, large in zip(size, padded, strict=True)]
        return functional.pad(x, [n for pair in reversed(missing) for n in pair])

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        size, padded = self._sizes(y)
        if tuple(y.shape[2:]) != padded:
            raise _check.value_error(self, f"expected padded images of size {padded}", y)
        for dim, length in enumerate(size, start=2):
            y = y.narrow(dim, 0, length)
        return y

    def _sizes(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of image and padded image."""
        x = _check.is_tensor(self, x)
        size = fitted(self, self.size, x, "size")
        multiples = fitted(self, self.multiple_of, x, "multiple")
        return size, tuple(-(-s // m) * m for s, m in zip(size, multiples, strict=True))

    def extra_repr(self) -> str:
        return f"size={self.size}, multiple_of={self.multiple_of}"


def _spread(option: tuple[int, ...], count: int) -> tuple[int, ...]:
    return option * count if len(option) == 1 else option
