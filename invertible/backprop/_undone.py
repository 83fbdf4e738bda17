"""Undoes what functions change while they run on tensors without data: their own attributes, and random states."""

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast
from weakref import ProxyTypes

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from invertible import _check

__all__ = ["same_random", "undone"]

_CONTAINERS = (dict, list, set, deque)
_KINDS: tuple[Any, ...] = (OrderedDict, *_CONTAINERS)
"""Where the methods are that change containers: the first one that fits."""
_OPAQUE = (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
"""What has attributes that are none of a module's own."""


@contextmanager
def undone(parts: Sequence[nn.Module]) -> Generator[None]:
    """Puts back what modules hold, in containers and objects too, and refuses to leave tensors without data behind.

    Containers, tensors and arrays stay the same ones: others may hold them as well.
    """
    reached = [each for part in parts for each in _reached(part.__dict__, objects=1)]
    containers = list({id(each): each for each in reached if _is_container(each)}.values())
    before = [_contents(each) for each in containers]
    # Parameters and buffers are not at work while planning.
    own = {id(t) for part in parts for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))}
    tensors = {id(each): each for each in reached if id(each) not in own and _is_plain(each)}.values()
    values = [(t, t._version, t.detach().clone()) for t in tensors]
    arrays = [(each, each.copy()) for each in {id(each): each for each in reached if _is_array(each)}.values()]
    try:
        yield
    finally:
        for tensor, version, value in values:
            if tensor._version != version:
                tensor.detach().copy_(value)
        for array, value in arrays:
            if array.tobytes() != value.tobytes():
                array[...] = value
        for container, contents in zip(containers, before, strict=True):
            if not _same(_contents(container), contents):
                _put_back(container, contents)
    for part in parts:  # not where planning failed: its own error says more
        _refuse_left(part)


@contextmanager
def same_random() -> Generator[None]:
    """Puts back the states of the random generators that a function may draw from or seed."""
    numpy = sys.modules.get("numpy.random")  # not imported: nobody draws from it
    there = torch.cuda.is_initialized()
    python, torchs = random.getstate(), torch.get_rng_state()
    numpys = numpy.get_state(legacy=False) if numpy is not None else None
    devices = torch.cuda.get_rng_state_all() if there else []
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torchs)
        if numpy is not None:
            numpy.set_state(numpys)
        if there:
            torch.cuda.set_rng_state_all(devices)


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
        if id(each) in seen or type(each) in ProxyTypes:  # to ask a dead proxy for anything raises
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


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that can have been changed in place: inference tensors can't."""
    return isinstance(value, Tensor) and not isinstance(value, (nn.Parameter, FakeTensor)) and not value.is_inference()


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _contents(container: Any) -> list[Any]:
    """The elements; of a dictionary keys and values in turn."""
    if isinstance(container, dict):
        return [each for pair in cast("dict[Any, Any]", container).items() for each in pair]
    return list(container)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _put_back(container: Any, contents: Sequence[Any]) -> None:
    """By the methods of the built-in kinds: a subclass, as Counter, may mean something else by its own."""
    kind = next(kind for kind in _KINDS if isinstance(container, kind))
    kind.clear(container)
    if hasattr(kind, "items"):
        for key, value in zip(contents[::2], contents[1::2], strict=True):
            kind.__setitem__(container, key, value)
    elif hasattr(kind, "add"):
        kind.update(container, contents)
    else:
        kind.extend(container, contents)
