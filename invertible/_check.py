"""Builds the error messages of the layers, each of the form ``who: rule, got what.`` and, where it helps, a fix."""

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._value import Value, describe, leaves


def name(module: nn.Module) -> str:
    """``ClassName(options)``; never ``repr``, which prints a container's whole tree."""
    return f"{type(module).__name__}({module.extra_repr()})"


def type_error(module: nn.Module, rule: str, got: object, fix: str = "") -> TypeError:
    """The error for a value of the wrong kind."""
    return TypeError(f"{name(module)}: {rule}, got {describe(got)}.{fix}")


def value_error(module: nn.Module, rule: str, got: object, fix: str = "") -> ValueError:
    """The error for a value of the right kind that breaks a rule."""
    return ValueError(f"{name(module)}: {rule}, got {describe(got)}.{fix}")


def is_tensor(module: nn.Module, value: object) -> Tensor:
    """Returns ``value`` if it is a tensor with at least a batch and channels."""
    if not isinstance(value, Tensor):
        fix = " Join it first: Sequential(..., Merge(), ...)." if isinstance(value, tuple) else ""
        raise type_error(module, "expected a tensor", cast("object", value), fix)
    if value.ndim < 2:
        raise value_error(module, "expected a tensor of shape (batch, channels, ...)", value)
    return value


def is_value(module: nn.Module, value: object) -> None:
    """Refuses what is no tensor with a batch, nor a tuple of such."""
    if isinstance(value, tuple) and value:
        for part in cast("tuple[object, ...]", value):
            is_value(module, part)
    elif not isinstance(value, Tensor):
        raise type_error(module, "expected a tensor, or a tuple of tensors", cast("object", value))
    elif value.ndim < 2:
        raise value_error(module, "expected a tensor of shape (batch, channels, ...)", value)


def is_pair(module: nn.Module, value: object) -> tuple[Tensor, Tensor]:
    """Returns ``value`` if it is a tuple of two tensors.

    A tensor with a batch of two would unpack without complaint, along the batch; hence the tuple.
    """
    if isinstance(value, tuple):
        parts = cast("tuple[object, ...]", value)
        if len(parts) == 2 and isinstance(parts[0], Tensor) and isinstance(parts[1], Tensor):
            return is_tensor(module, parts[0]), is_tensor(module, parts[1])
    fix = " Split it first: Sequential(Split(), ...)." if isinstance(value, Tensor) else ""
    raise type_error(module, "expected a pair of tensors (x1, x2)", cast("object", value), fix)


def are_streams(module: nn.Module, value: object) -> tuple[Tensor, Tensor]:
    """Returns ``value`` if it is a pair of tensors that can be joined along the channels."""
    x1, x2 = is_pair(module, value)
    if x1.dtype != x2.dtype:
        raise TypeError(f"{name(module)}: both streams must have one dtype, got {x1.dtype} and {x2.dtype}.")
    if x1.device != x2.device:
        raise ValueError(f"{name(module)}: both streams must be on one device, got {x1.device} and {x2.device}.")
    if x1.shape[:1] + x1.shape[2:] != x2.shape[:1] + x2.shape[2:]:
        raise value_error(module, "both streams must have the same batch and spatial size", value)
    return x1, x2


def is_on_grid(module: nn.Module, dtype: torch.dtype, value: Value) -> None:
    """Refuses values in another dtype than that of the grid: they can't be on it."""
    wrong = next((t.dtype for t in leaves(value) if t.dtype != dtype), None)
    if wrong is not None:
        fix = " A Sequential with this grid rounds what enters it: net.snap(x)."
        raise TypeError(f"{name(module)}: on its grid values have the dtype {dtype}, got {wrong}.{fix}")


def is_floating(module: nn.Module, x: Tensor) -> None:
    """Refuses integers, booleans and complex numbers."""
    if not x.is_floating_point():
        raise TypeError(f"{name(module)}: expected a floating-point tensor, got dtype {x.dtype}.")


def integer(who: str, option: str, value: object) -> int:
    """Returns an option as an integer, if it is one of any kind; numbers with a fraction are not rounded."""
    try:
        return operator.index(cast("int", value))
    except TypeError:
        raise TypeError(f"{who}: {option} must be an integer, got {value!r}.") from None


def number(who: str, option: str, value: object) -> float:
    """Returns an option as a floating-point number, if it is a real number of any kind."""
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{who}: {option} must be a number, got {value!r}.")


def boolean(who: str, option: str, value: object) -> bool:
    """Returns an option, if it is ``True`` or ``False``; what merely counts as one of them may be a mistake."""
    if isinstance(value, bool):
        return value
    raise TypeError(f"{who}: {option} must be True or False, got {value!r}.")


def has_log_det(module: nn.Module, layers: Sequence[Any]) -> None:
    """Refuses a sequence of layers whose log-determinants don't add up: after an injective one come isometries only."""
    injective = None
    for position, layer in enumerate(layers):
        if injective is not None and not layer.isometric:
            raise ValueError(
                f"{type(module).__name__}: has no log-determinant, because layer {position}, {name(layer)}, is not "
                f"isometric and follows layer {injective}, {name(layers[injective])}, which is not bijective."
            )
        if injective is None and layer._is_tall:
            injective = position
