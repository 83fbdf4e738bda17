"""Noise in the last bit of what layers return, to see how far rounding moves a result."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._value import leaves, map_value

__all__ = ["estimating", "is_estimating", "is_shaking", "shaken", "shaking"]


class _Noise(threading.local):
    """What draws the noise in each thread; no context variable, which torch.compile cannot trace."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None
        self.estimating = False


_noise = _Noise()


@contextmanager
def shaking(device: torch.device) -> Generator[None]:
    """Adds noise to what each layer inside a container returns that computes something."""
    before = _noise.generator
    _noise.generator = torch.Generator(device).manual_seed(0)  # not torch's own: the functions may draw from that
    try:
        yield
    finally:
        _noise.generator = before


@contextmanager
def estimating() -> Generator[None]:
    """Says that the calls inside only measure an error: a value at the end of a layer's range is drawn into it."""
    before, _noise.estimating = _noise.estimating, True
    try:
        yield
    finally:
        _noise.estimating = before


def is_estimating() -> bool:
    """Whether an error is measured."""
    return _noise.estimating


def is_shaking() -> bool:
    """Whether noise is to be added."""
    return _noise.generator is not None


def shaken(value: Any, given: Any = ()) -> Any:
    """A value with every fourth element at random moved by up to a step; what was given as it is stays so.

    On average that is as much as rounding does, which moves all elements by less: but by less they can't be moved.
    """
    known = {id(t) for t in leaves(given)}
    return map_value(lambda t: t if id(t) in known else _shaken(t, _noise.generator), value)


def _shaken(t: Tensor, generator: torch.Generator | None) -> Tensor:
    if not t.is_floating_point():
        return t
    noise, choice = (torch.rand(t.shape, dtype=t.dtype, device=t.device, generator=generator) for _ in range(2))
    moved = torch.addcmul(t, t.abs(), noise - 0.5, value=torch.finfo(t.dtype).eps)
    return torch.where(choice < 1 / 4, moved, t)
