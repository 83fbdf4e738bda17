"""What layers share that treat all pixels alike: checks, precision, constants per channel and log-determinants."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import _check

__all__ = ["channels_of", "has_channels", "per_channel", "per_sample", "repeated", "wide", "without_autocast"]


def channels_of(who: str, channels: object) -> int:
    """Returns the option ``channels``, if it is a positive integer."""
    count = _check.integer(who, "channels", channels)
    if count < 1:
        raise ValueError(f"{who}: channels must be at least 1, got {count}.")
    return count


def has_channels(module: nn.Module, x: object, channels: int | None) -> Tensor:
    """Returns ``x``, if it is a floating-point tensor with this number of channels, or any for ``None``."""
    x = _check.is_tensor(module, x)
    _check.is_floating(module, x)
    if channels is not None and x.shape[1] != channels:
        raise _check.value_error(module, f"expected {channels} channels", x)
    return x


def wide(x: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype in which to compute: the widest of these, and at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Constants of the channels, shaped to fit ``x``."""
    return values.view(-1, *[1] * (x.ndim - 2))


def repeated(log_det: Tensor, x: Tensor) -> Tensor:
    """The log-determinant of one pixel for each sample of ``x``, in its dtype."""
    return (x.shape[2:].numel() * log_det).to(x.dtype).repeat(x.shape[0])


def per_sample(log_slopes: Tensor, x: Tensor) -> Tensor:
    """The logarithms of an elementwise map's slopes, summed for each sample of ``x``, in its dtype."""
    return log_slopes.flatten(1).sum(1).to(x.dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Lets what is inside run in the dtype that it was given: what must be undone can't be computed in 16 bits."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
