"""Functions that are compiled each by itself, and run by one graph wherever they run."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._tracing import transformed
from ._value import Value, detached_leaf, graph_leaves, is_channels_last, leaves, map_value

__all__ = ["compile_function", "compiled_call", "evaluate", "is_compiled", "set_compiled_call", "with_defaults"]


def with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``torch.compile``, completed.

    Inductor would let the gradients come back in another layout than the streams have, and to add them is slow.
    """
    options = {"dynamic": False, **options}
    mode = options.get("mode")
    special: dict[str, Any] = options.get("options") or {}
    if mode in {"reduce-overhead", "max-autotune"} or special.get("triton.cudagraphs"):
        raise ValueError(
            "compile_functions: CUDA graphs would reuse the memory of a function's output while it is needed, "
            f'got mode={mode!r}, options={special!r}. Take mode="max-autotune-no-cudagraphs", or capture whole steps.'
        )
    if options.get("backend", "inductor") == "inductor" and mode is None:
        options["options"] = {"layout_optimization": False, **special}
    return options


def compile_function(function: nn.Module, kinds: dict[Any, Callable[..., Any]], **options: Any) -> None:
    """Compiles a module in place, as ``function.compile(**options)`` does, with graphs shared by its kind.

    Torch allows 8 graphs per code object, and ``Module.compile`` has one for all modules there are. So each kind
    of function gets a code object of its own: what looks the same can share its graphs, and the limit counts shapes.
    A function of which other parameters are trained is another kind: torch 2.11 would not notice.
    """
    variants: dict[tuple[bool, ...], Callable[..., Any]] = {}
    held: list[dict[str, nn.Parameter | None]] = [part.__dict__["_parameters"] for part in function.modules()]
    tensors = [*function.parameters(), *function.buffers()]
    look = (repr(function), *(None if is_lazy(value) else tuple(value.shape) for value in tensors))

    def variant() -> Callable[..., Any]:
        trained = tuple(p.requires_grad for parameters in held for p in parameters.values() if p is not None)
        if trained not in variants:
            kind = FunctionType(_call.__code__.replace(), globals(), type(function).__name__)
            kind = kinds.setdefault((look, trained), kind)
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
    that is trained: with gradients enabled, of inputs that require them and have a plain layout, and under autocast
    without its cache, as the replay must.
    """
    options = {} if condition is None else {"condition": condition}
    if not is_compiled(function) or transformed():
        return function(x, **options)
    parts: list[Any] = [x, *leaves(cast("Value", condition))]
    given = [t for t in parts if isinstance(t, Tensor)]
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in given):
        return function(_plain_layout(x), **options)  # has no graph to train: another one
    made: list[Tensor] = []

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t  # a condition may hold anything
        t = _plain_layout(t)
        if not (torch.is_grad_enabled() and t.requires_grad):
            t = detached_leaf(t)
            made.append(t)
        return t

    x = leaf(x)
    options = {name: map_value(leaf, value) for name, value in options.items()}
    with torch.enable_grad(), _uncached_autocast(x.device.type):
        result = function(x, **options)
    if not isinstance(result, Tensor):
        return result
    known = {id(t) for t in made}
    tracked = torch.is_grad_enabled() and (
        any(t.requires_grad for t in chain(given, function.parameters()))
        or any(id(t) not in known for t in graph_leaves([result]))  # a trained tensor that is no parameter
    )
    return result if tracked else result.detach()


def _plain_layout(x: Tensor) -> Tensor:
    """Contiguous or channels last, with the strides of a new tensor: graphs are made for strides, not for formats."""
    if x.stride() == _strides(x.shape, range(x.ndim)):
        return x
    if not is_channels_last(x) or math.prod(x.shape[2:]) == 1:  # of one pixel both are the same
        return x.clone(memory_format=torch.contiguous_format)
    if x.stride() == _strides(x.shape, (0, *range(2, x.ndim), 1)):
        return x
    return x.clone(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Those of a new tensor with these dimensions from the outermost to the innermost."""
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _uncached_autocast(kind: str) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
