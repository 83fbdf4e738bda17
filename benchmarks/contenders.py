"""The same networks built by every contender: this library's strategies, torch's checkpoint, and the peers."""

import math
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoo
from invertible import Budget, Coupling, Merge, PixelUnshuffle, Recompute, Reconstruct, Sequential, Split, Store
from invertible.backprop import Strategy

CONTENDERS = (
    "store", "hand", "recompute", "recompute_sqrt", "reconstruct", "floor", "store_compiled", "reconstruct_compiled",
    "exact", "exact_compiled", "ckpt", "ckpt_sqrt", "memcnn", "revtorch", "revlib",
)  # fmt: skip
BUDGETS = tuple(f"budget_{ninths}" for ninths in (0, 1, 2, 3, 5, 7))
"""So many ninths of the way from the least possible bytes to those of storing everything."""
STACKS = {"stack": (16, 96, 28, 28), "large": (8, 192, 56, 56)}
"""Shapes of the images that stacks of bottlenecks are given."""
OURS = (
    "store", "recompute", "recompute_sqrt", "reconstruct", "store_compiled", "reconstruct_compiled", "exact",
    "exact_compiled", *BUDGETS,
)  # fmt: skip


TITLES = {
    "store": "Store()",
    "ckpt": "torch's checkpoint, per block",
    "recompute": "Recompute()",
    "ckpt_sqrt": "torch's checkpoint, √depth segments",
    "recompute_sqrt": "Recompute(every=√depth)",
    "memcnn": "MemCNN",
    "revtorch": "RevTorch",
    "revlib": "revlib",
    "reconstruct": "Reconstruct()",
}
"""What a reader calls them."""


def bottleneck(channels: int, *, dropout: float = 0.0) -> nn.Module:
    """BN-ReLU-1x1-BN-ReLU-3x3-BN-ReLU-1x1 with a quarter of the channels in the middle."""
    block = zoo.Bottleneck(channels, channels)
    if dropout:
        block.append(nn.Dropout(dropout))
    return block


def strategy(name: str, depth: int) -> Strategy:
    """The strategy of ours by its name."""
    root = round(math.sqrt(depth))
    return {
        "store": Store(),
        **dict.fromkeys(BUDGETS, Store()),  # until the input is known
        "recompute": Recompute(),
        "recompute_sqrt": Recompute(every=root),
        "reconstruct": Reconstruct(),
        "exact": Reconstruct(),
    }[name.removesuffix("_compiled")]


class ByHand(nn.Module):
    """Couplings written down without any library."""

    def __init__(self, functions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.functions = nn.ModuleList(functions)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        for function in self.functions:
            a, b = b, a + function(b)
        return torch.cat((a, b), 1)


class Floor(nn.Module):
    """Couplings reconstructed by the least code that can: no check, no hook, batch-norm statistics counted twice.

    Its functions return new memory, so that sums are written into it.
    """

    def __init__(self, functions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.functions = nn.ModuleList(functions)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(Reversed.apply(list(self.functions), *x.chunk(2, 1), *self.parameters()), 1)


class Reversed(torch.autograd.Function):
    """All couplings of a :class:`Floor` as one node; gradients of parameters are added where they belong."""

    @staticmethod
    def forward(ctx: Any, functions: list[nn.Module], a: Tensor, b: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        for function in functions:
            a, b = b, function(b).add_(a)
        ctx.functions = functions
        ctx.save_for_backward(a, b)
        return a.clone(), b  # a has been given by the last function but one, b by the last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (a, b), (grad_a, grad_b) = ctx.saved_tensors, grads
        for function in reversed(ctx.functions):
            a = a.detach().requires_grad_()
            with torch.enable_grad():
                shift = function(a)
            parameters = list(function.parameters())
            found = torch.autograd.grad(shift, [a, *parameters], grad_b)
            for parameter, gradient in zip(parameters, found[1:], strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            a, b = b - shift.detach(), a
            grad_a, grad_b = grad_b, grad_a + found[0]
        return (None, grad_a, grad_b, *(None for _ in ctx.needs_input_grad[3:]))


class Checkpointed(nn.Module):
    """Couplings under torch's checkpoint, in segments of ``every``."""

    def __init__(self, functions: Sequence[nn.Module], every: int) -> None:
        super().__init__()
        self.functions, self.every = nn.ModuleList(functions), every

    def forward(self, x: Tensor) -> Tensor:
        pair = x.chunk(2, 1)
        for first in range(0, len(self.functions), self.every):
            segment = self.functions[first : first + self.every]
            pair: Any = checkpoint(self._segment, segment, *pair, use_reentrant=False)
        return torch.cat(pair, 1)

    def _segment(self, functions: Sequence[nn.Module], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for function in functions:
            a, b = b, a + function(b)
        return a, b


class Cloned(nn.Module):
    """Gives a copy of its input: MemCNN frees what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def as_named(name: str, net: Sequential) -> Sequential:
    """The network, on the exact grid or with compiled functions if its name says so."""
    if name.startswith("exact"):
        net.grid = "exact"
    if name.endswith("_compiled"):
        net.compile_functions()
    return net


def stack(name: str, functions: Sequence[nn.Module], *, clone: bool = True) -> nn.Module:
    """Additive couplings with these functions, of a tensor to a tensor."""
    pairs = [tuple(functions[i : i + 2]) for i in range(0, len(functions), 2)]
    if name in OURS:
        layers = [Split(), *map(Coupling, functions), Merge()]
        return as_named(name, Sequential(*layers, backprop=strategy(name, len(functions))))
    if name == "hand":
        return ByHand(functions)
    if name == "floor":
        return Floor(functions)
    if name == "overlapped":
        from benchmarks.overlapped import Overlapped  # which is made of what is here

        return Overlapped(functions)
    if name.startswith("ckpt"):
        return Checkpointed(functions, 1 if name == "ckpt" else round(math.sqrt(len(functions))))
    with warnings.catch_warnings():  # the peers import what is deprecated
        warnings.simplefilter("ignore")
        peer = cast("Any", import_module(name))
    if name == "memcnn":
        blocks = [
            peer.InvertibleModuleWrapper(peer.AdditiveCoupling(f, g), keep_input=False, keep_input_inverse=False)
            for f, g in pairs
        ]
        return nn.Sequential(*([Cloned()] if clone else []), *blocks)
    if name == "revtorch":
        return peer.ReversibleSequence(nn.ModuleList(peer.ReversibleBlock(f, g) for f, g in pairs))
    return peer.ReversibleSequential(*functions, split_dim=1)


class Lifted(nn.Module):
    """A downsampling block's function, of the stream after the unshuffling."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function, self.downsample = function, PixelUnshuffle(2, order="pixel_major")

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.downsample.inverse(x))


class Stages(nn.Module):
    """An i-RevNet (b) whose stages are stacks of a contender; the unshuffling between them stores nothing."""

    def __init__(self, name: str, net: zoo.IRevNet) -> None:
        super().__init__()
        self.entry = PixelUnshuffle(2, order="pixel_major")
        stages: list[list[nn.Module]] = []
        for layer in net.body:
            if isinstance(layer, Coupling) and layer.downsample is not None:
                stages.append([Lifted(layer.function)])
            elif isinstance(layer, Coupling):
                stages[-1].append(layer.function)
        self.stages = nn.ModuleList(stack(name, functions) for functions in stages)
        self.head = net.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for stage in self.stages:
            x = stage(torch.cat([self.entry(half) for half in x.chunk(2, 1)], 1))
        return self.head(x)


def workload(which: str, name: str, depth: int) -> tuple[nn.Module, Tensor]:
    """A network, with the same weights for every contender, and its input."""
    torch.manual_seed(0)
    if which in STACKS:
        shape = STACKS[which]
        net = stack(name, [bottleneck(shape[1] // 2) for _ in range(depth)])
        x = torch.randn(shape)
        limit(name, net, x)
        return net, x
    body, x = zoo.irevnet_b(), torch.rand(8, 3, 128, 128)
    if name in OURS:
        body.body.backprop = strategy(name, len(body.body))
        as_named(name, body.body)
        limit(name, body.body, x)
    return body if name in OURS else Stages(name, body), x


def limit(name: str, net: nn.Module, x: Tensor) -> None:
    """Gives the network its budget, if the name says so."""
    if name in BUDGETS and isinstance(net, Sequential):
        plan = net.plan(x)
        net.backprop = Budget(plan.least + int(name.removeprefix("budget_")) * (plan.most - plan.least) // 9)


def count_evaluations(net: nn.Module) -> tuple[Callable[[], int], int]:
    """Counts how often the bottlenecks run; hooks would miss some peers' calls. Returns how many there are, too."""
    calls = [0]
    blocks = [part for part in net.modules() if isinstance(part, zoo.Bottleneck)]
    for part in blocks:
        which = "forward" if part._compiled_call_impl is None else "_compiled_call_impl"
        inner: Any = getattr(part, which)

        def forward(x: Tensor, *, inner: Any = inner) -> Tensor:
            calls[0] += 1
            return inner(x)

        setattr(part, which, forward)
    return lambda: calls[0], len(blocks)
