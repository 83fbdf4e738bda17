"""The costly results of a function, its matrix products and convolutions: kept in one run, given back in another."""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Keeper", "Player", "Products", "around_functions", "watched"]

_aten: Any = torch.ops.aten

_PRODUCTS = frozenset(
    {_aten.convolution.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
)
"""Operations whose work grows faster than their bytes."""


class Products(TorchDispatchMode):
    """Sees the products of a function, one after another."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.count = 0

    def product(self, position: int, what: Any, run: Callable[[], Any]) -> Any:
        """Returns the result of the product at this position."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def run() -> Any:
            return func(*args, **(kwargs or {}))

        if func not in _PRODUCTS:
            return run()
        self.count += 1
        what = (func, *((a.shape, a.dtype) for a in args if isinstance(a, Tensor)))
        return self.product(self.count - 1, what, run)


class Keeper(Products):
    """Keeps the products at some positions."""

    def __init__(self, positions: frozenset[int]) -> None:
        super().__init__()
        self.positions = positions
        self.what: dict[int, Any] = {}
        self._found: list[tuple[Tensor, int]] = []

    def product(self, position: int, what: Any, run: Callable[[], Any]) -> Any:
        result = run()
        if position in self.positions:
            self.what[position] = what
            self._found.append((result, result._version))  # not detached, which here has a version of its own
        return result

    def kept(self) -> list[Tensor]:
        """What was found, for the caller to hold; nothing if the function wrote into any of it."""
        found, self._found = self._found, []
        return [t.detach() for t, _ in found] if all(t._version == version for t, version in found) else []


class Player(Products):
    """Gives back what a keeper has kept, in place of computing it again."""

    def __init__(self, keeper: Keeper, kept: Sequence[Tensor]) -> None:
        super().__init__()
        self._what = keeper.what
        self._kept = dict(zip(keeper.what, kept, strict=True)) if kept else {}

    def product(self, position: int, what: Any, run: Callable[[], Any]) -> Any:
        same = position in self._kept and self._what[position] == what
        return self._kept[position].detach() if same else run()


class _Around(threading.local):
    """The mode in each thread; no context variable, which torch.compile cannot trace."""

    def __init__(self) -> None:
        self.mode: Products | None = None


_around = _Around()


def around_functions() -> AbstractContextManager[Any]:
    """To be entered around the function of a coupling."""
    if torch.compiler.is_compiling() or _around.mode is None:
        return nullcontext()
    return cast("AbstractContextManager[Any]", _around.mode)


@contextmanager
def watched(mode: Products) -> Generator[None]:
    """Lets a mode see what functions compute in the calls inside, and nothing else."""
    before, _around.mode = _around.mode, mode
    try:
        yield
    finally:
        _around.mode = before
