"""Which gradient engine runs the layers now: layers ask it, the engine sets it."""

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakSet

import torch

from ._noise import is_shaking, shaken
from ._range import handed
from .grid import refuse_other_grid

__all__ = ["METHODS", "Engine", "call", "engine_of", "engine_runs", "running", "served", "walked", "walks"]

METHODS = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det")
"""The methods of a layer that an engine can run."""

Method = TypeVar("Method", bound=Callable[..., Any])


class Engine(Protocol):
    """Runs one layer after another and sees to their gradients."""

    def step(self, layer: Any, method: str, function: Callable[..., Any], value: Any, condition: Any) -> Any:
        """Runs ``function(layer, value, condition=condition)``, the layer's ``method``."""
        ...


_served: WeakSet[Callable[..., Any]] = WeakSet()
_walked: WeakSet[Callable[..., Any]] = WeakSet()

_now: ContextVar[tuple[Engine, Any] | None] = ContextVar("invertible_engine", default=None)
"""The engine that runs, and the layer that it runs now: what a hook calls meanwhile is none of its business."""


def engine_of(layer: Any) -> Engine | None:
    """The engine that runs this layer now; ``None`` where plain autograd does."""
    now = None if torch.compiler.is_dynamo_compiling() else _now.get()
    return now[0] if now is not None and (now[1] is layer or now[1] is None) else None


def engine_runs() -> bool:
    """Whether any engine runs a layer now."""
    return _now.get() is not None


@contextmanager
def running(new: Engine | None, layer: Any = None) -> Generator[None]:
    """Sets the engine for a layer, or for all (``layer=None``), or sets none, for the calls inside."""
    token = _now.set(None if new is None else (new, layer))
    try:
        yield
    finally:
        _now.reset(token)


def call(container: Any, layer: Any, method: str, value: Any, condition: Any) -> Any:
    """Calls a container's layer, by the engine that runs the container, if one does."""
    if is_shaking():
        return _shaken(container, layer, method, value, condition)
    return _call_on_grid(container, layer, method, value, condition)


def _shaken(container: Any, layer: Any, method: str, value: Any, condition: Any) -> Any:
    result = _call_on_grid(container, layer, method, value, condition)
    return result if layer.isometric or walks(layer, method) else shaken(result, value)


def _call_on_grid(container: Any, layer: Any, method: str, value: Any, condition: Any) -> Any:
    function = layer if method == "forward" else getattr(layer, method)  # forward through hooks
    if layer.grid is not None or container.grid is not None:
        refuse_other_grid(container, layer)
        with handed(layer if container.grid is not None else None):
            return _call(container, layer, function, value, condition)
    return _call(container, layer, function, value, condition)


def _call(container: Any, layer: Any, function: Callable[..., Any], value: Any, condition: Any) -> Any:
    if torch.compiler.is_dynamo_compiling() or _now.get() is None:
        return function(value, condition=condition)
    with running(engine_of(container), layer):
        return function(value, condition=condition)


def served(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hands a layer's method to the engine, if one runs; inside ``__call__``, so that hooks fire around it."""
    if function in _served or function in _walked:
        return function

    @functools.wraps(function)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        now = engine_of(self)
        if now is None:
            return function(self, *args, **options)
        if len(args) == 1 and set(options) <= {"condition"}:
            return now.step(self, function.__name__, function, args[0], options.get("condition"))
        with running(None):  # a hook has changed the arguments: plain autograd is right for them
            return function(self, *args, **options)

    _served.add(method)
    return method


def walked(function: Method) -> Method:
    """Marks a container's method: the engine runs the layers inside, not the container as a whole."""
    _walked.add(function)
    return function


def walks(layer: Any, method: str) -> bool:
    """Whether this method only calls layers that the engine runs one by one."""
    return getattr(cast("Any", type(layer)), method) in _walked
