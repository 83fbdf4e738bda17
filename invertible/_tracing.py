"""Whether a call is traced or transformed by something larger, of which torch tells only part in public."""

from typing import Any

import torch
from torch import Tensor

from ._range import is_unread

__all__ = ["exporting", "transformed", "unreadable"]

_torch: Any = torch


def exporting() -> bool:
    """Whether ``torch.export`` runs; the compiler of torch 2.11 takes ``torch.compiler.is_exporting`` for true."""
    return _torch.compiler._is_exporting_flag


def transformed() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` traces, or ``torch.func`` or forward-mode differentiation works."""
    return (
        torch.compiler.is_dynamo_compiling()
        or exporting()
        or _torch._C._are_functorch_transforms_active()
        or _torch.autograd.forward_ad._current_level >= 0
    )


def unreadable(x: Tensor) -> bool:
    """Whether no check may look at the values of a tensor: it is traced or transformed, or has no data."""
    return transformed() or _torch.jit.is_tracing() or is_unread() or x.is_meta
