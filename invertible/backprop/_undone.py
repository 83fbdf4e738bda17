"""Undoes what functions write to their own attributes while they run on tensors without data."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from invertible import _check

__all__ = ["undone"]

_CONTAINERS = (dict, list, set, deque)
_OPAQUE = (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
"""What has attributes that are none of a module's own."""


@contextmanager
def undone(parts: Sequence[nn.Module]) -> Generator[None]:
    """Puts back what modules hold, in containers and objects too, and refuses to leave tensors without data behind.

    Containers stay the same ones: others may hold them as well.
    """
    reached = [each for part in parts for each in _reached(part.__dict__, objects=1)]
    containers = list({id(each): each for each in reached if _is_container(each)}.values())
    before = [_contents(each) for each in containers]
    try:
        yield
    finally:
        for container, contents in zip(containers, before, strict=True):
            if not _same(_contents(container), contents):
                _put_back(container, contents)
    for part in parts:  # not where planning failed: its own error says more
        _refuse_left(part)


def _refuse_left(part: nn.Module) -> None:
    """Raises, if a place that can't be put back, as a slot of an object, holds a tensor without data."""
    for key, value in part.__dict__.items():
        if any(isinstance(each, FakeTensor) for each in _reached(value, objects=2)):
            raise RuntimeError(
                f"{_check.name(part)}: while planning, it ran on tensors without data and kept one in its attribute "
                f"{key!r}, from where it can't be removed. Make the module anew, and let it keep tensors in a dict."
            )


def _reached(value: Any, objects: int) -> Iterator[Any]:
    """Yields what a value leads to: through containers, and through so many objects inside each other."""
    todo, seen = [(value, objects)], set[int]()
    while todo:
        each, more = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, (*_CONTAINERS, tuple, frozenset)):
            todo += [(inner, more) for inner in _contents(each)]
        elif more and not isinstance(each, _OPAQUE):
            todo += [(inner, more - 1) for inner in _attributes(each)]


def _attributes(value: Any) -> list[Any]:
    """The dictionary of an object's attributes, and those that are not in it."""
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()) if isinstance(name, str)]
    found = [getattr(value, name, None) for name in slots if name != "__dict__"]
    return [*found, value.__dict__] if hasattr(value, "__dict__") else found


def _is_container(value: Any) -> bool:
    return isinstance(value, _CONTAINERS)


def _contents(container: Any) -> list[Any]:
    """The elements; of a dictionary keys and values in turn."""
    if isinstance(container, dict):
        return [each for pair in cast("dict[Any, Any]", container).items() for each in pair]
    return list(container)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _put_back(container: Any, contents: Sequence[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        cast("dict[Any, Any]", container).update(zip(contents[::2], contents[1::2], strict=True))
    elif isinstance(container, set):
        cast("set[Any]", container).update(contents)
    else:
        container.extend(contents)
