"""Which gradient engine runs the layers now: layers ask it, the engine sets it."""

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakSet

import torch

__all__ = ["METHODS", "Engine", "engine", "running", "served", "walked", "walks"]

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

_engine: ContextVar[Engine | None] = ContextVar("invertible_engine", default=None)


def engine() -> Engine | None:
    """The engine that runs the layers now; ``None`` where plain autograd does."""
    return None if torch.compiler.is_compiling() else _engine.get()


@contextmanager
def running(new: Engine | None) -> Generator[None]:
    """Sets the engine for the calls inside."""
    token = _engine.set(new)
    try:
        yield
    finally:
        _engine.reset(token)


def served(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hands a layer's method to the engine, if one runs; inside ``__call__``, so that hooks fire around it."""
    if function in _served or function in _walked:
        return function

    @functools.wraps(function)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        now = engine()
        if now is None:
            return function(self, *args, **options)
        if len(args) == 1 and set(options) <= {"condition"}:
            return now.step(self, function.__name__, function, args[0], options.get("condition"))
        with running(None):  # not a container's call: plain autograd is right for it
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
