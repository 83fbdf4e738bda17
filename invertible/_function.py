"""Runs the function of a coupling so that it repeats its bits."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._compiled import is_compiled
from ._random import draws
from ._tracing import exporting, transformed
from ._value import Value, detached_leaf, graph_leaves, is_channels_last, leaves, map_value

__all__ = ["evaluate", "is_plain", "readable"]


def readable(function: nn.Module, x: Tensor) -> Tensor:
    """Values on a grid as the function reads them: in the dtype of its parameters, and contiguous.

    Kernels sum in the order of memory: of another layout they make other bits. Which one the values had cannot always
    be told on the way back: of one pixel, all formats are the same.
    """
    found = chain(function.parameters(), function.buffers())
    dtype = next((t.dtype for t in found if t.is_floating_point()), torch.get_default_dtype())
    read = x.to(dtype, memory_format=torch.contiguous_format)
    if read is x:
        read = x.view_as(x)  # a node of its own, in which all that the function gives back is summed first
    # In export nothing is run again, and a comparison of strides may fix the batch size.
    return read if exporting() or read.stride() == _strides(read.shape, range(read.ndim)) else _packed(read)


def evaluate(function: nn.Module, x: Tensor, condition: Value | None, *, exactly: bool = False) -> Any:
    """Returns ``function(x)``, or ``function(x, condition=condition)`` if there is one.

    A compiled function has a graph for each mode of autograd, and these round differently; attention in ``eval`` has
    another kernel without gradients. So a function that is compiled, or that must repeat its bits ``exactly``, always
    runs as it is trained: with gradients enabled, of inputs that require them and have a plain layout, and under
    autocast without its cache, as the replay must. Functions of torch's own layers run a single sample in ``eval``
    twice at once, for of one alone many kernels make other bits than of the same one among several.
    """
    single = exactly and not transformed() and condition is None and x.ndim and len(x) == 1
    if single and is_plain(function) and _leaves_samples_alone(function):
        result = evaluate(function, torch.cat((x, x)), None, exactly=True)
        return result[:1] if isinstance(result, Tensor) and result.ndim else result
    options = {} if condition is None else {"condition": condition}
    if not (exactly or is_compiled(function)) or transformed():
        return function(x, **options)
    if not torch.is_grad_enabled() and x.device.type == "cpu" and condition is None and is_plain(function):
        with _uncached_autocast("cpu"):
            return function(plain_layout(x))  # with gradients it would make the same bits and keep all in between
    parts: list[Any] = [x, *leaves(cast("Value", condition))]
    given = [t for t in parts if isinstance(t, Tensor)]
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in given):
        if not exactly:
            return function(plain_layout(x), **options)  # has no graph to train: another one
        with torch.inference_mode(False), torch.no_grad():
            normal = None if condition is None else map_value(_copied, condition)
            return evaluate(function, x.clone(), normal, exactly=True)
    made: list[Tensor] = []

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t  # a condition may hold anything
        t = plain_layout(t)
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


_PLAIN = {
    "activation",
    "batchnorm",
    "container",
    "conv",
    "dropout",
    "instancenorm",
    "linear",
    "normalization",
    "pooling",
}
"""Files of ``torch.nn.modules`` whose layers run the same kernels with and without gradients."""


def is_plain(function: nn.Module) -> bool:
    """Whether a function is made of such layers alone, and nothing else is called by any of them."""
    for part in function.modules():
        own = part.__dict__
        # On ARM, a depthwise convolution has a kernel for inference.
        plain = _is_plain_kind(type(part)) and own.get("groups", 1) == 1 and own.keys().isdisjoint(_CALLED)
        if not plain or is_compiled(part) or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return False
    return True


_CALLED = {"forward", "_conv_forward", "_check_input_dim", "_output_padding"}
"""What such a layer calls of itself, and a module may have replaced."""

_HARMLESS = {*vars(type("_", (), {})), "__annotations__", "__init__", "__parameters__", "extra_repr"}
"""What a class may define of its own all the same; each class has some."""


def _is_plain_kind(kind: type[nn.Module]) -> bool:
    """Whether a class is that of such a layer, or of one that replaces nothing of it but its making."""
    for i, base in enumerate(kind.__mro__):
        package, _, file = base.__module__.rpartition(".")
        if package == "torch.nn.modules":
            same = getattr(cast("Any", base).forward, "__module__", None) == base.__module__
            return same and file in _PLAIN and base is not nn.MultiheadAttention
        inherited = {name for after in kind.__mro__[i + 1 :] for name in vars(after)}
        if not (vars(base).keys() & inherited) <= _HARMLESS:
            return False
    return False


def _leaves_samples_alone(function: nn.Module) -> bool:
    """Whether no layer of a plain function mixes the samples of a batch."""
    mixing = (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.GLU)  # of any dimension
    parts = list(function.modules())
    stateless = any(getattr(part, "track_running_stats", True) is False for part in parts)  # norms by the batch
    return not stateless and not any(part.training or draws(part) or isinstance(part, mixing) for part in parts)


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def plain_layout(x: Tensor) -> Tensor:
    """Contiguous or channels last, with the strides of a new tensor: graphs are made for strides, not for formats."""
    if x.stride() == _strides(x.shape, range(x.ndim)):
        return x
    if not is_channels_last(x) or math.prod(x.shape[2:]) == 1:  # of one pixel both are the same
        return _packed(x)
    if x.stride() == _strides(x.shape, (0, *range(2, x.ndim), 1)):
        return x
    return x.clone(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _packed(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Those of a new tensor with these dimensions from the outermost to the innermost."""
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _uncached_autocast(kind: str) -> AbstractContextManager[Any]:
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
