"""Functions that are compiled each by itself, and run by one graph wherever they run."""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["compile_function", "compiled_call", "is_compiled", "set_compiled_call", "with_defaults"]


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
    return compiled_call(part) is not None or "_orig_mod" in part.__dict__.get("_modules", ())  # a traced one has none
