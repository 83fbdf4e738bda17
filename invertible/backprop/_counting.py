"""Counts what a computation on tensors without data would allocate, read, write and compute."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from invertible._products import Products

__all__ = ["Lister", "Numbers", "Watch", "storage_of"]

TRAFFIC = 20
"""Operations that a byte read or written counts as: about a machine's rate in single precision over its bandwidth."""


def storage_of(t: Tensor) -> int:
    """A number of the memory that a tensor is in."""
    return t.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def bytes_of(tensors: Iterable[Any]) -> int:
    """Those of the elements."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class Numbers:
    """Gives each thing a number that no other gets, even in the same place later, and knows which are still there."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._count = 0

    def of(self, place: int, thing: Any) -> int:
        """That of a thing, which is the only one in this place now."""
        if place not in self._known:
            self._known[place] = self._count, weakref.ref(thing, lambda _: self._known.pop(place))
            self._count += 1
        return self._known[place][0]

    def there(self) -> frozenset[int]:
        """Those of all things that somebody holds."""
        return frozenset(number for number, _ in self._known.values())


class Watch(TorchDispatchMode):
    """Counts the bytes that are allocated and freed, and the work."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.now = self.peak = 0
        """Bytes allocated in the calls inside and not freed, now and at the most."""
        self.sizes: dict[int, int] = {}
        """Those of each storage."""
        self.work = 0
        """Floating-point operations of products, and ``TRAFFIC`` for each byte that operations read or write."""
        self._alive: dict[int, weakref.ref[Any]] = {}

    def forget_peak(self) -> None:
        """Starts anew with what is there now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():  # a count has data; torch 2.11 would not read it here
                return func(*args)
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for t in made:
            if storage_of(t) not in given:  # a part of something older is nothing new
                self._add(t)
        self.peak = max(self.peak, self.now + sum(_converted(func, args, t) for t in made[:1]))
        if func._schema.is_mutable or any(storage_of(t) not in given for t in made):  # else a view
            self.work += TRAFFIC * (bytes_of(tree_leaves(args)) + bytes_of(made))
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.work += flops(*args, **(kwargs or {}), out_val=result)
        return result

    def _add(self, t: Tensor) -> None:
        storage, key = t.untyped_storage(), storage_of(t)
        if key in self.sizes:
            return
        self.sizes[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(_: Any) -> None:
            self.now -= self.sizes.pop(key)
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)


def _converted(func: Any, args: Any, result: Tensor) -> int:
    """Bytes of the copies that an operation on the CPU makes of arguments in another dtype than its result's."""
    if result.device.type != "cpu" or not result.is_floating_point() or torch.Tag.pointwise not in func.tags:
        return 0
    narrow = [t for t in args if isinstance(t, Tensor) and t.ndim and t.is_floating_point() and t.dtype != result.dtype]
    return sum(t.numel() for t in narrow) * result.element_size()


class Lister(Products):
    """Takes down the work and the bytes of each product."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []
        self._watch = watch
        self._results: list[tuple[Tensor, int]] = []

    def product(self, position: int, what: Any, run: Callable[[], Any]) -> Any:
        before = self._watch.work
        result = cast("Tensor", run())
        self.found.append((self._watch.work - before, bytes_of([result])))
        self._results.append((result, result._version))  # not detached, which here has a version of its own
        return result

    def written(self) -> bool:
        """Whether the function wrote into any of them."""
        return any(t._version != version for t, version in self._results)
