"""Functions that are compiled each by itself, and run by one graph wherever they run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._value import Value, detached_leaf, leaves, map_value

__all__ = ["compile_function", "compiled_call", "evaluate", "is_compiled", "set_compiled_call", "with_defaults"]


def with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``torch.compile``, completed.

    Inductor would let the gradients come back in another layout than the streams have, and to add them is slow.
    """
    options = {"dynamic": False, **options}
    if options.get("backend", "inductor") == "inductor" and options.get("mode") is None:
        options["options"] = {"layout_optimization": False, **(options.get("options") or {})}
    return options


def compile_function(function: nn.Module, kinds: dict[Any, Callable[..., Any]], **options: Any) -> None:
    """Compiles a module in place, as ``function.compile(**options)`` does, with graphs shared by its kind.

    Torch allows 8 graphs per code object, and ``Module.compile`` has one for all modules there are. So each kind
    of function gets a code object of its own: what looks the same can share its graphs, and the limit counts shapes.
    A function of which other parameters are trained is another kind: torch 2.11 would not notice.
    """
    variants: dict[tuple[bool, ...], Callable[..., Any]] = {}

    def variant() -> Callable[..., Any]:
        trained = tuple(p.requires_grad for p in function.parameters())
        if trained not in variants:
            kind = FunctionType(_call.__code__.replace(), globals(), type(function).__name__)
            kind = kinds.setdefault((repr(function), trained), kind)
            variants[trained] = torch.compile(MethodType(kind, function), **options)
        return variants[trained]

    variant()  # complains of wrong options
    set_compiled_call(function, lambda *args, **named: variant()(*args, **named))


def _call(self: Any, *args: Any, **options: Any) -> Any:
    return self._call_impl(*args, **options)


def compiled_call(part: nn.Module) -> Callable[..., Any] | None:
    """What a module that was compiled in place runs instead of its own call."""
    return part.__dict__.get("_compiled_call_impl")


def set_compiled_call(part: nn.Module, call: Callable[..., Any] | None) -> None:
    """Sets or removes it."""
    part.__dict__["_compiled_call_impl"] = call


def is_compiled(part: nn.Module) -> bool:
    """Whether a module was compiled, in place or by ``torch.compile(module)``."""
    return compiled_call(part) is not None or "_orig_mod" in part.__dict__["_modules"]


def evaluate(function: nn.Module, x: Tensor, condition: Value | None) -> Any:
    """Returns ``function(x)``, or ``function(x, condition=condition)`` if there is one.

    A compiled function has a graph for each mode of autograd, and these round differently. So it always runs the one
    that is trained: with gradients enabled, of inputs that require them and have a dense layout, and under autocast
    without its cache, as the replay must.
    """
    options = {} if condition is None else {"condition": condition}
    if not is_compiled(function) or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return function(x, **options)
    parts: list[Any] = [x, *leaves(cast("Value", condition))]
    given = [t for t in parts if isinstance(t, Tensor)]
    if any(t.is_inference() for t in given):
        return function(x, **options)
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in chain(given, function.parameters()))
    x = _dense_leaf(x)
    options = {name: map_value(_dense_leaf, value) for name, value in options.items()}
    with torch.enable_grad(), _uncached_autocast(x.device.type):
        result = function(x, **options)
    return result if tracked or not isinstance(result, Tensor) else result.detach()


def _dense_leaf(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x  # a condition may hold anything
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if extent != x.numel():  # a slice of the channels, say
        x = x.clone()
    return x if torch.is_grad_enabled() and x.requires_grad else detached_leaf(x)


def _uncached_autocast(kind: str) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
