"""The swapped map."""

from typing import Any, Generic, TypeVar

from torch import Tensor

from . import _check
from ._buffers import buffers_move
from ._grids import refuse_unfit
from ._running import call, walked
from ._value import Value
from .module import Exactness, InvertibleModule, check_layer

__all__ = ["Inverse"]

X = TypeVar("X", bound=Value)
Y = TypeVar("Y", bound=Value)


class Inverse(InvertibleModule[Y, X], Generic[X, Y]):
    r"""Runs a layer backwards: ``forward`` is its ``inverse``, and the reverse.

    .. math::
        y \mapsto f^{-1}(y)

    ``Inverse(net)(x)`` in training mode is the trained direction and moves the buffers of the functions inside,
    as ``net(x)`` does; ``Inverse(net).inverse`` then leaves them alone. Parameters are shared with the layer.

    Cost: that of the layer's other direction.

    Args:
        layer: a bijective layer.

    Shape:
        - Input: what the layer returns
        - Output: what the layer takes

    Raises:
        TypeError: if ``layer`` is not an :class:`InvertibleModule`.
        ValueError: if it is not bijective: its left inverse has no left inverse.

    Example:
        >>> upsample = Inverse(PixelUnshuffle(2))
        >>> upsample(torch.zeros(1, 12, 2, 2)).shape
        torch.Size([1, 3, 4, 4])
    """

    def __init__(self, layer: InvertibleModule[X, Y]) -> None:
        super().__init__()
        check_layer("Inverse", layer)
        if not layer.bijective:
            raise ValueError(f"Inverse: expected a bijective layer, got {_check.name(layer)}.")
        refuse_unfit(self, None, [("layer", layer)])
        self.layer = layer

    @property
    def bijective(self) -> bool:
        return self.layer.bijective

    @property
    def isometric(self) -> bool:
        return self.layer.isometric

    @property
    def exactness(self) -> Exactness:
        return self.layer.exactness

    @property
    def keeps_grid(self) -> bool:
        return self.layer.keeps_grid

    @property
    def stochastic(self) -> bool:
        return self.layer.stochastic

    @walked
    def forward(self, x: Y, *, condition: Value | None = None) -> X:
        with buffers_move(self, True):
            return self._call("inverse", x, condition)

    @walked
    def inverse(self, y: X, *, condition: Value | None = None) -> Y:
        with buffers_move(self, False):
            return self._call("forward", y, condition)

    @walked
    def forward_and_log_det(self, x: Y, *, condition: Value | None = None) -> tuple[X, Tensor]:
        """Returns the layer's ``inverse_and_log_det``."""
        with buffers_move(self, True):
            return self._call("inverse_and_log_det", x, condition)

    @walked
    def inverse_and_log_det(self, y: X, *, condition: Value | None = None) -> tuple[Y, Tensor]:
        """Returns the layer's ``forward_and_log_det``."""
        with buffers_move(self, False):
            return self._call("forward_and_log_det", y, condition)

    def _call(self, method: str, value: Value, condition: Value | None) -> Any:
        try:
            return call(self, self.layer, method, value, condition)
        except Exception as error:
            error.add_note(f"in Inverse, {method} of the layer inside")
            raise
