"""What runs uncompiled where it is part of something compiled: its own module, for it imports the compiler."""

from collections.abc import Callable
from typing import Any, cast

import torch

__all__ = ["run_eagerly"]


def _run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


run_eagerly = cast("Any", torch.compiler).disable(
    _run, reason="an iteration that ends when its values say so, or that differentiates inside, is no one graph."
)
