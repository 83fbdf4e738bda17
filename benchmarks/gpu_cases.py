"""What ``benchmarks.gpu`` times: workloads, the cases of each, and how their networks are built.

A case is a name made of parts: what is kept, or who trains, and then any of ``compiled``, a grid, ``last`` (the memory
format ``channels_last``), ``record`` (nothing is read, so that the device is never waited for), ``benchmark`` and
``deterministic`` (flags of cuDNN), ``graph`` (the step is a CUDA graph), ``after`` and ``inside`` (an optimiser steps
after the backward pass, or in it), ``triton`` (sums on the grid by ``benchmarks.triton_grid``). So
``reconstruct+compiled+exact``.
"""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from benchmarks.contenders import Stages, bottleneck, stack
from benchmarks.devices import switched
from benchmarks.triton_grid import put
from invertible import Grid, Recompute, Reconstruct, Sequential, Store
from invertible.backprop import StepInBackward, Strategy
from zoo.network import ReversibleNetwork

__all__ = ["AIMED", "GROUPS", "Case", "Group", "Ready"]

KEPT = ("store", "recompute", "reconstruct")
WAYS = ("forward", "inverse")
PEERS = ("ckpt", "ckpt_sqrt", "memcnn", "revtorch", "revlib")
BY_HAND = ("hand", "floor", "overlapped")
GRIDS = ("exact", "exact32")
OPTIONS = ("compiled", *GRIDS, "last", "record", "benchmark", "deterministic", "graph", "after", "inside", "triton")
ALL = tuple(f"{kept}{c}{g}" for g in ("", "+exact", "+exact32") for c in ("", "+compiled") for kept in KEPT)
"""Every strategy, eager and compiled, without a grid and on both."""
CORE = (
    "store", "store+compiled", "reconstruct", "reconstruct+compiled", "reconstruct+exact", "reconstruct+compiled+exact",
    "reconstruct+compiled+exact32", "reconstruct+compiled+last", "store+last", "recompute",
)  # fmt: skip
"""What the aims are about."""


@dataclass(frozen=True)
class Case:
    """One way to train a network, or to run it."""

    name: str

    @property
    def parts(self) -> tuple[str, ...]:
        """What comes first, and the options."""
        first, *options = self.name.split("+")
        if first not in (*KEPT, *WAYS, *PEERS, *BY_HAND, "resnet50") or not set(options) <= set(OPTIONS):
            raise ValueError(f"no such case: {self.name}")
        return (first, *options)

    @property
    def first(self) -> str:
        """What is kept, or who trains."""
        return self.parts[0]

    @property
    def grid(self) -> str | None:
        """The grid's name."""
        return next((part for part in self.parts if part in GRIDS), None)

    @property
    def eager(self) -> str:
        """The same case, not compiled: it has the same operations, which can be counted."""
        return "+".join(part for part in self.parts if part not in ("compiled", "graph", "record", "last", "triton"))

    def has(self, option: str) -> bool:
        """Whether the option is among the parts."""
        return option in self.parts[1:]

    def strategy(self) -> Strategy:
        """What is kept. A drift raises nothing here: it is a column of the table."""
        on_drift = "record" if self.has("record") or self.has("graph") else "raise"
        reconstruct = Reconstruct(drift_warn=inf, drift_error=inf, on_drift=on_drift)
        return {"recompute": Recompute(), "reconstruct": reconstruct}.get(self.first, Store())

    def on_grid(self) -> Grid | None:
        """The grid."""
        on_range = "record" if self.has("record") or self.has("graph") else "raise"
        if self.grid is None:
            return None
        return Grid(*{"exact": (40, torch.float64), "exact32": (16, torch.float32)}[self.grid], on_range=on_range)


@dataclass(frozen=True)
class Group:
    """Cases that take turns on one workload."""

    model: str
    """A model of the zoo, or ``stack`` and its number of blocks."""
    batch: int
    size: int
    """Pixels per side."""
    precision: str
    cases: tuple[str, ...] = CORE
    note: str = ""
    """What tells it from another group of the same workload."""
    backend: str = "inductor"
    """What compiles."""

    @property
    def name(self) -> str:
        """The name, unlike any other group's."""
        return "-".join(filter(None, (self.model, str(self.batch), str(self.size), self.precision, self.note)))

    @property
    def depth(self) -> int | None:
        """Blocks, of a stack."""
        return int(self.model.removeprefix("stack")) if self.model.startswith("stack") else None

    def tiny(self) -> "Group":
        """The same cases on next to nothing, to see that all of it runs."""
        model = TINY.get(self.model, "stack4")
        return Group(model, 2, 8 if self.depth else 32, self.precision, self.cases, self.note, "aot_eager")


def _waysback() -> tuple[str, ...]:
    options = [f"{c}{g}" for g in ("", "+exact", "+exact32") for c in ("", "+compiled")]
    return tuple(f"{way}{option}" for option in options for way in WAYS)


FLAGS = ("reconstruct", "reconstruct+record", "reconstruct+benchmark", "reconstruct+deterministic")
_STACK = ("floor", "overlapped", "hand", *PEERS)
SUMS = ("reconstruct", *(f"reconstruct{c}+exact{t}" for c in ("", "+compiled") for t in ("", "+triton")))
_GRAPHED = ("store", "reconstruct", "reconstruct+exact", "store+compiled", "reconstruct+compiled")
WHOLE = ("hand", "hand+compiled", "store+compiled", "reconstruct+compiled")
"""Couplings without a library, compiled as a whole: the best that a compiler makes of what is stored."""
GRAPHS = (*_GRAPHED, *(f"{case}+graph" for case in _GRAPHED))
GROUPS = (
    Group("irevnet_b", 64, 224, "bf16"),
    Group("irevnet_b", 64, 224, "tf32", _waysback(), "inverse"),
    Group("stack100", 64, 28, "tf32", (*CORE, *_STACK)),
    Group("stack24", 64, 28, "tf32", WHOLE, "whole"),
    Group("irevnet_b", 64, 224, "tf32"),
    Group(
        "irevnet_b",
        64,
        224,
        "bf16",
        ("reconstruct", *(f"reconstruct+{o}" for o in ("record", "benchmark", "deterministic"))),
        "flags",
    ),
    Group("irevnet_a", 64, 224, "bf16", ("reconstruct+after", "reconstruct+inside", "store+after"), "optimizer"),
    Group("irevnet_b", 64, 224, "bf16", SUMS, "sums"),
    Group("irevnet_b", 4, 224, "bf16", ("floor", "overlapped", "reconstruct", "store"), "streams"),
    Group("irevnet_b", 64, 224, "bf16", ("floor", "overlapped", "reconstruct", "store"), "streams"),
    Group("irevnet_b", 256, 224, "bf16"),
    Group("resnet50", 64, 224, "bf16", ("store", "store+compiled", "store+last", "store+compiled+last")),
    Group("revnet56", 64, 224, "bf16", ("resnet50", *CORE)),
    Group("irevnet_a", 64, 224, "bf16"),
    Group("irevnet_b", 4, 224, "bf16", GRAPHS, "graphs"),
    Group("stack1000", 8, 28, "tf32", KEPT, "depth"),
    Group("irevnet_b", 1, 2048, "bf16", KEPT, "resolution"),
    Group("irevnet_b", 64, 224, "bf16", _waysback(), "inverse"),
    Group("stack100", 64, 28, "bf16", (*CORE, *_STACK)),
    Group("irevnet_b", 64, 224, "tf32", ("store", *PEERS), "peers"),
    Group("resnet50", 64, 224, "tf32", ("store", "store+compiled", "store+last", "store+compiled+last")),
    Group("revnet56", 64, 224, "tf32", ("resnet50", *CORE)),
    *(
        Group(model, batch, 224, each, ALL, "all")
        for each in ("bf16", "tf32", "fp32")
        for model, batch in (("irevnet_b", 64), ("irevnet_b", 256), ("irevnet_a", 64), ("revnet56", 64))
    ),
    *(Group("stack100", 64, 28, each, ALL, "all") for each in ("bf16", "tf32", "fp32")),
)
"""All there is to time, what matters most first."""
AIMED = 3
"""So many groups, the first ones, have a figure for every aim."""
CHANNELS = 48
"""Of each stream of a stack."""
TINY = {
    "irevnet_a": "irevnet_small", "irevnet_b": "irevnet_small", "revnet56": "revnet38", "resnet50": "resnet_small"
}  # fmt: skip
"""Small networks of the same kinds."""


class Ready:
    """The network of a case and its input, on a device, to be run step by step."""

    def __init__(self, group: Group, case: Case, device: torch.device, *, depth: int | None = None) -> None:
        self.group, self.case, self.device = group, case, device
        self.net, self.x = _built(group, case, depth or group.depth)
        form = torch.channels_last if case.has("last") else torch.contiguous_format
        self.net = self.net.to(device, memory_format=form)  # pyright: ignore[reportCallIssue]
        self.x = self.x.to(device, memory_format=form)
        self.y: Tensor | None = None
        self._graph: Any = None
        self._optimizer: torch.optim.Optimizer | None = None
        if case.first in WAYS:
            self.net.eval()
            with torch.no_grad(), self.settings():
                self.y = self.net(self.x)
        else:
            self.x.requires_grad_()  # or some peers would train nothing
        if case.has("after") or case.has("inside"):
            self._optimizer = torch.optim.SGD(self.net.parameters(), 1e-6, momentum=0.9)
        if case.has("inside") and self._optimizer is not None:
            StepInBackward(self._optimizer)

    def settings(self) -> AbstractContextManager[Any]:
        """The case's flags, and autocast where there is no loss."""
        stack = ExitStack()
        if self.case.has("benchmark"):
            stack.enter_context(switched(benchmark=True))
        if self.case.has("deterministic"):
            stack.enter_context(switched(benchmark=False, deterministic=True, deterministic_algorithms=True))
        if self.group.precision == "bf16" and self.case.first in WAYS:
            stack.enter_context(self._autocast())
        return stack

    def step(self) -> None:
        """A step of training, or one way through the network."""
        with self.settings():
            if self._graph is not None:
                self._graph.replay()
            elif self.case.first in WAYS:
                self._through()
            else:
                self.net.zero_grad()
                self.train()

    def train(self) -> None:
        """Forward and backward, under the settings; gradients are added to those that are there."""
        with self._autocast():
            loss = self.net(self.x).float().square().mean()
            if self.case.first in (*PEERS, *BY_HAND):
                loss.backward()  # they would replay without autocast
        if self.case.first not in (*PEERS, *BY_HAND):
            loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()

    @torch.no_grad()
    def _through(self) -> None:
        net: Any = self.net
        _ = net.inverse(self.y) if self.case.first == "inverse" else net(self.x)

    def capture(self) -> None:
        """Makes the step a CUDA graph, after three steps on a stream of their own, as torch asks for."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side), self.settings():
            for _ in range(3):
                self.net.zero_grad()
                self.train()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.net.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with self.settings(), torch.cuda.graph(graph):
            self.train()
        self._graph = graph

    def fill_gradients(self) -> None:
        """Gives gradients their memory, which is no part of what a strategy keeps; not where an optimiser frees it."""
        for t in (*self.net.parameters(), self.x):
            t.grad = torch.zeros_like(t) if t.requires_grad and self._optimizer is None else None

    @property
    def drift(self) -> float | None:
        """How far off the reconstruction was in the last step."""
        found = getattr(self.net, "drift", None)
        return None if found is None else float(found)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.group.precision == "bf16")


def _built(group: Group, case: Case, depth: int | None) -> tuple[nn.Module, Tensor]:
    """The network, with the same weights for all cases, and its input."""
    torch.manual_seed(0)
    name = "store" if case.first in (*KEPT, *WAYS) else case.first
    if depth is not None:
        net = stack(name, [bottleneck(CHANNELS) for _ in range(depth)])
        x = torch.randn(group.batch, 2 * CHANNELS, group.size, group.size)
        return _as_the_case(net, case, group.backend), x
    tiny = group.model in TINY.values()
    net = zoo.create(TINY["resnet50"] if name == "resnet50" and tiny else name if name == "resnet50" else group.model)
    x = torch.rand(group.batch, 3, group.size, group.size)
    if isinstance(net, zoo.IRevNet) and name in (*PEERS, *BY_HAND):
        return Stages(name, net), x
    if isinstance(net, zoo.IRevNet) and case.first in WAYS:
        return _as_the_case(net.body, case, group.backend), x
    return _as_the_case(net, case, group.backend), x


def _as_the_case(net: nn.Module, case: Case, backend: str) -> nn.Module:
    """Sets what is kept, the grid, and what is compiled."""
    if isinstance(net, Sequential | ReversibleNetwork):
        net.backprop, net.grid = case.strategy(), case.on_grid()
        if case.has("compiled"):
            net.compile_functions(backend=backend)
        if case.has("triton"):
            put(net)
    elif case.has("compiled"):
        net.compile(backend=backend)
    return net
