"""What runs uncompiled where a network is compiled as a whole: its own module, for it imports the compiler."""

from collections.abc import Callable
from typing import Any, cast

import torch


def _run(function: Callable[[Any], None], x: Any) -> None:
    function(x)


run_uncompiled: Callable[[Callable[[Any], None], Any], None] = cast("Any", torch.compiler).disable(
    _run, reason="plans are made on tensors without data, which is no graph"
)
