"""How a layer's input and gradients come from its output."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from invertible._buffers import say_of_buffers
from invertible._function import is_plain
from invertible._running import METHODS
from invertible._value import detached_leaf, map_value
from invertible.module import InvertibleModule

from ._node import Derivation, Rule, Step

__all__ = ["has_products", "opposite", "rule_of"]

_OPPOSITE = {
    "forward": "inverse",
    "inverse": "forward",
    "forward_and_log_det": "inverse",
    "inverse_and_log_det": "forward",
}


def opposite(layer: InvertibleModule[Any, Any], method: str) -> Callable[[Any, Any], Any]:
    """The other direction of a layer's method, of value and condition; hooks don't fire."""
    function = getattr(type(layer), _OPPOSITE[method])
    return lambda value, condition: function(layer, value, condition=condition)


def rule_of(layer: InvertibleModule[Any, Any], method: str) -> tuple[Rule, bool]:
    """The layer's own rule if it has one, else the generic one; and whether it may replay random numbers."""
    if _has_own_rule(type(layer)):
        # What is inside and invertible, such as a coupling's S, runs backwards in the rule.
        return _fused(layer, method), not any(getattr(part, "stochastic", False) for part in layer.children())
    return _generic(opposite(layer, method)), False


def has_products(layer: InvertibleModule[Any, Any]) -> bool:
    """Whether products inside a layer can be kept: its function must compute the same with gradients and without.

    It must be the only one inside: those of couplings in a coupling's S run in another order on the way back, so that
    positions would be others.
    """
    functions = cast("Any", layer)._functions()
    parts = list(layer.modules())[1:]
    inner = cast("list[Any]", [part for part in parts if isinstance(part, InvertibleModule)])
    alone = not any(part._functions() for part in inner)
    return _has_own_rule(type(layer)) and len(functions) == 1 and is_plain(functions[0]) and alone


@functools.cache
def _has_own_rule(kind: type[InvertibleModule[Any, Any]]) -> bool:
    """Whether a class has a fused rule that no subclass has outdated, by another ``forward`` for instance."""
    order = kind.__mro__

    def owner(name: str) -> int:
        return next(i for i, each in enumerate(order) if name in vars(each))

    own = owner("fused_rule")
    return order[own] is not InvertibleModule and all(own <= owner(method) for method in METHODS)


def _fused(layer: InvertibleModule[Any, Any], method: str) -> Rule:
    def rule(step: Step, y: Any, grad: Any, grad_log_det: Tensor | None, condition: Any) -> Derivation:
        with step.replay.again(), torch.enable_grad():
            return layer.fused_rule(method, y, grad, grad_log_det, condition=condition)

    return rule


def _generic(back: Callable[[Any, Any], Any]) -> Rule:
    """Runs the layer backwards for its input, which moves no buffer either way, then forwards for the graph."""

    def rule(step: Step, y: Any, grad: Any, grad_log_det: Tensor | None, condition: Any) -> Derivation:
        with step.replay.again(), say_of_buffers(False), torch.no_grad():
            x = back(y, condition)
        x = map_value(detached_leaf, x)
        with step.replay.again(), torch.enable_grad():
            result = step.run(x, condition)
        cotangents: list[Any] = [*_flat(grad), *([grad_log_det] if step.log_det else [])]
        return x, step.accept(result), cotangents

    return rule


def _flat(grad: Any) -> list[Tensor | None]:
    if isinstance(grad, tuple):
        return [g for part in cast("tuple[Any, ...]", grad) for g in _flat(part)]
    return [grad]
