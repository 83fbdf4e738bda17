"""What runs uncompiled where a network is compiled as a whole: its own module, for it imports the compiler."""

from typing import Any, cast

import torch

from ._chain import run_chain

__all__ = ["run_uncompiled"]

run_uncompiled = cast("Any", torch.compiler).disable(
    run_chain,
    reason="a network that does not store its activations is run backwards layer by layer, which is no one graph. "
    "Compile its functions: net.compile_functions(). Or keep the activations: net.backprop = Store(). For inference "
    "use torch.no_grad().",
)
