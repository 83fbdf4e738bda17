"""One layer for each stream."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._grids import refuse_unfit
from ._running import call, walked
from ._value import Value
from .module import Exactness, InvertibleModule, check_layer

__all__ = ["Parallel"]


class Parallel(InvertibleModule[tuple[Any, ...], tuple[Any, ...]]):
    r"""Applies one layer to each stream.

    .. math::
        (x_1, \dots, x_n) \mapsto (f_1(x_1), \dots, f_n(x_n))

    The weakest layer decides the properties; the log-determinants add up. All layers see the same ``condition``.

    Cost: that of the layers.

    Args:
        layers: one for each stream, at least one; the same layer may serve several.

    Shape:
        - Input: a tuple of as many values as there are layers
        - Output: a tuple of as many values

    Raises:
        TypeError: if a layer is not an :class:`InvertibleModule`, or the input is not a tuple.
        ValueError: if there is no layer, or the input has another number of streams.

    Example:
        >>> both = Parallel(PixelUnshuffle(2), Identity())
        >>> [stream.shape[1] for stream in both((torch.zeros(1, 3, 4, 4), torch.zeros(1, 5)))]
        [12, 5]
    """

    def __init__(self, *layers: InvertibleModule[Any, Any]) -> None:
        super().__init__()
        if not layers:
            raise ValueError("Parallel: expected at least one layer, got none.")
        for layer in layers:
            check_layer("Parallel", layer)
        refuse_unfit(self, None, [(str(index), layer) for index, layer in enumerate(layers)])
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[InvertibleModule[Any, Any]]:
        return iter(self._modules.values())  # pyright: ignore[reportReturnType]

    def __getitem__(self, index: int) -> InvertibleModule[Any, Any]:
        return list(self)[index]

    @property
    def bijective(self) -> bool:
        return all(layer.bijective for layer in self)

    @property
    def isometric(self) -> bool:
        return all(layer.isometric for layer in self)

    @property
    def exactness(self) -> Exactness:
        return max(layer.exactness for layer in self)

    @property
    def keeps_grid(self) -> bool:
        return all(layer.keeps_grid for layer in self)

    @property
    def stochastic(self) -> bool:
        return any(layer.stochastic for layer in self)

    @walked
    def forward(self, x: tuple[Any, ...], *, condition: Value | None = None) -> tuple[Any, ...]:
        return self._map("forward", x, condition)

    @walked
    def inverse(self, y: tuple[Any, ...], *, condition: Value | None = None) -> tuple[Any, ...]:
        return self._map("inverse", y, condition)

    @walked
    def forward_and_log_det(
        self, x: tuple[Any, ...], *, condition: Value | None = None
    ) -> tuple[tuple[Any, ...], Tensor]:
        """Maps each stream and returns the sum of the log-determinants per sample."""
        results = self._map("forward_and_log_det", x, condition)
        return tuple(value for value, _ in results), torch.stack([log_det for _, log_det in results]).sum(0)

    @walked
    def inverse_and_log_det(
        self, y: tuple[Any, ...], *, condition: Value | None = None
    ) -> tuple[tuple[Any, ...], Tensor]:
        """Maps each stream back and returns the sum of the inverse's log-determinants per sample."""
        results = self._map("inverse_and_log_det", y, condition)
        return tuple(value for value, _ in results), torch.stack([log_det for _, log_det in results]).sum(0)

    def _map(self, method: str, value: tuple[Any, ...], condition: Value | None) -> tuple[Any, ...]:
        if not isinstance(value, tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _check.type_error(self, f"expected a tuple of {len(self)} streams", value)
        if len(value) != len(self):
            raise _check.value_error(self, f"expected {len(self)} streams", value)
        results: list[Any] = []
        for index, (layer, stream) in enumerate(zip(self, value, strict=True)):
            try:
                results.append(call(self, layer, method, stream, condition))
            except Exception as error:
                error.add_note(f"in Parallel, stream {index} of {len(self)}, {method}")
                raise
        return tuple(results)
