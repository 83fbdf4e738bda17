"""What runs as one: a layer, or several if the strategy keeps the input of every k-th only."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from invertible._running import walks

from ._chain import chain_of

__all__ = ["calls"]

RunLayer = Callable[[int, Any, str, Any, Any], Any]
"""Runs a layer at a position by a method, of value and condition."""


def calls(
    net: Any, layers: Iterable[tuple[int, Any]], method: str, run_layer: RunLayer
) -> Iterator[Callable[[Any, Any], Any]]:
    """Yields functions of value and condition that together run these layers of ``net``."""
    chain = chain_of(net)
    if chain is None or chain.every == 1:
        yield from (partial(run_layer, position, layer, method) for position, layer in layers)
        return
    group: list[tuple[int, Any]] = []

    def segment() -> Callable[[Any, Any], Any]:
        run = partial(_run_group, tuple(group), method, run_layer)
        return partial(chain.segment, [layer for _, layer in group], method, run)

    for position, layer in layers:
        entered = walks(layer, method)
        if group and (entered or len(group) == chain.every):
            yield segment()
            group = []
        if entered:
            yield partial(run_layer, position, layer, method)
        else:
            group.append((position, layer))
    if group:
        yield segment()


def _run_group(group: tuple[tuple[int, Any], ...], method: str, run_layer: RunLayer, value: Any, condition: Any) -> Any:
    total: Tensor | None = None
    for position, layer in group:
        value = run_layer(position, layer, method, value, condition)
        if method.endswith("log_det"):
            value, log_det = value
            total = log_det if total is None else total + log_det
    return value if total is None else (value, total)
