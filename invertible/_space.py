"""Options for each spatial dimension, and what is said of sizes that don't fit."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from . import _check

__all__ = ["DIMENSIONS", "check_divisible", "each", "fitted", "parts_of", "per_dimension"]

DIMENSIONS = {1: "length", 2: "height and width", 3: "depth, height and width"}
"""What the spatial dimensions are called, by their number."""


def per_dimension(who: str, option: str, value: int | Sequence[int]) -> int | tuple[int, ...]:
    """Returns an option that is an integer for all spatial dimensions, or a tuple with one for each."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_check.integer(who, option, part) for part in value)
    return _check.integer(who, option, value)


def each(option: int | tuple[int, ...]) -> tuple[int, ...]:
    """The integers of such an option."""
    return (option,) if isinstance(option, int) else option


def fitted(module: nn.Module, option: int | tuple[int, ...], x: Tensor, what: str = "factor") -> tuple[int, ...]:
    """The option for each spatial dimension of ``x``; refuses a number of them that does not fit."""
    dims = x.ndim - 2
    if isinstance(option, int):
        if not 1 <= dims <= 3:
            raise _check.value_error(module, "expected one to three spatial dimensions", x)
        return (option,) * dims
    if len(option) != dims:
        raise _check.value_error(module, f"expected {len(option)} spatial dimensions, one per {what}", x)
    return option


def check_divisible(module: nn.Module, x: Tensor, factors: tuple[int, ...], by: int | tuple[int, ...]) -> None:
    """Refuses an image whose size is not divisible by its factors."""
    if any(size % factor for size, factor in zip(x.shape[2:], factors, strict=True)):
        raise _check.value_error(module, f"{DIMENSIONS[len(factors)]} must be divisible by {by}", x)


def parts_of(x: Tensor, dim: int, sizes: tuple[int, int], kind: int) -> tuple[Tensor, ...]:
    """Views of ``x`` after a dimension is taken apart into two: one for each index of that at ``kind``."""
    return cast("Tensor", x.unflatten(dim, sizes)).unbind(kind)
