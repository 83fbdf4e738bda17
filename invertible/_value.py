"""What flows between layers: a tensor, or a nested tuple of tensors."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, Union, cast

import torch
from torch import Tensor

__all__ = [
    "Value",
    "alike",
    "describe",
    "detached_leaf",
    "graph_leaves",
    "is_channels_last",
    "laid_out",
    "leaves",
    "map_value",
    "zero_log_det",
]

Value: TypeAlias = Union[Tensor, tuple["Value", ...]]  # noqa: UP007 (an alias that names itself)
"""A tensor, or a (possibly nested) tuple of tensors: the streams of a reversible network."""


def leaves(value: Value) -> Iterator[Tensor]:
    """Yields the tensors of a value, in order."""
    if isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def map_value(function: Callable[[Tensor], Tensor], value: Value) -> Value:
    """Applies a function to every tensor of a value and keeps the nesting."""
    if isinstance(value, tuple):
        return alike(value, (map_value(function, part) for part in value))
    return function(value)


def alike(kind: Any, parts: Iterable[Any]) -> Any:
    """A tuple of the same kind: a condition may be a named one."""
    return kind._make(parts) if hasattr(kind, "_make") else tuple(parts)


def detached_leaf(x: Tensor) -> Tensor:
    """The same values at the start of a graph of their own."""
    x = x.detach()
    return x.requires_grad_() if x.is_floating_point() or x.is_complex() else x


def graph_leaves(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields what the graphs of these tensors lead to: parameters, and other tensors that gradients would go to."""
    todo: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        variable = None if node.next_functions else getattr(node, "variable", None)
        if variable is not None:
            yield variable
        new = {after for after, _ in node.next_functions if after is not None and after not in seen}
        seen |= new
        todo += new


def describe(value: object) -> str:
    """Says what a value is, in the words that error messages use."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        parts = cast("tuple[object, ...]", value)
        return "a tuple of " + (", ".join(describe(part) for part in parts) or "nothing")
    return f"an object of type {type(value).__name__}"


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels are innermost in memory, in a view of such a tensor too."""
    return x.ndim in (4, 5) and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def laid_out(x: Tensor, *, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """The same values in a dtype and a memory format."""
    if not channels_last:
        # In a dtype that it has already, a transposed tensor of three dimensions would stay as it is.
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous()
    return x.to(dtype, memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def zero_log_det(value: Value) -> Tensor:
    """Returns a zero per sample, in the value's own precision."""
    x = next(leaves(value))
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return x.new_zeros(x.shape[0], dtype=dtype)
