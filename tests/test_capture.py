"""What a CUDA graph can't hold: that the host reads a value of the device, or gives it one."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from benchmarks.gpu_cases import GROUPS, Case, Group, Ready
from invertible import Coupling, Grid, Merge, Recompute, Reconstruct, Sequential, Split, Store
from invertible.backprop._counting import storage_of
from tests.networks import deep


def tensors_in(*values):
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


class Reads(TorchDispatchMode):
    """Notes where values that depend on some tensors are read, or decide how large others are.

    Random states are read in each step, too, but they lie on the host and depend on none.
    """

    def __init__(self, tensors):
        super().__init__()
        self.kept = [t.untyped_storage() for t in tensors]  # so that no other gets their place
        self.own = {storage_of(t) for t in tensors}
        self.found = []

    def depends(self, *values):
        return any(storage_of(t) in self.own for t in tensors_in(*values))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        mine = self.depends(args, kwargs)
        result = func(*args, **(kwargs or {}))
        if mine:
            if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
                self.found.append(str(func))
            made = tensors_in(result)
            self.kept += [t.untyped_storage() for t in made]
            self.own |= {storage_of(t) for t in made}
        return result


def noting(reads, name):
    """Replaces a method of tensors that the dispatcher does not see."""
    true = getattr(torch.Tensor, name)

    def method(self, *args, **options):
        if reads.depends(self):
            reads.found.append(name)
        return true(self, *args, **options)

    return mock.patch.object(torch.Tensor, name, method)


def reads_of(step, net, *tensors):
    """Those of a step that is warm."""
    step()
    reads = Reads([*tensors, *net.parameters(), *net.buffers()])
    with noting(reads, "tolist"), noting(reads, "numpy"), noting(reads, "cpu"), reads:
        step()
    return reads.found


def step_of(net, x, *, autocast=True):
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(x).float().square().mean()
        loss.backward()

    return step


RECORDING = [Store(), Recompute(), Reconstruct(on_drift="record")]


@pytest.mark.parametrize("strategy", RECORDING, ids=repr)
@pytest.mark.parametrize("grid", [None, Grid(40, on_range="record")])
def test_what_records_reads_nothing(grid, strategy):
    net = deep(3, dropout=0.3).float()
    net.backprop, net.grid = strategy, grid
    x = torch.rand(3, 8, 4, 4)
    assert reads_of(step_of(net, x.requires_grad_()), net, x) == []


def test_what_raises_reads_once_for_the_drift_and_once_for_the_range():
    net = zoo.create("irevnet_small")
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    net.backprop = Reconstruct()
    assert reads_of(step_of(net, x, autocast=False), net, x) == ["tolist"]
    net.grid = "exact"
    assert sorted(reads_of(step_of(net, x, autocast=False), net, x)) == ["aten._local_scalar_dense.default", "tolist"]


def test_a_function_that_reads_is_found():
    class Reading(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    net = Sequential(Split(), Coupling(Reading()), Merge(), backprop=Reconstruct(on_drift="record"))
    x = torch.rand(2, 4, requires_grad=True)
    assert len(reads_of(step_of(net, x, autocast=False), net, x)) == 2  # forward and replay


def test_the_cases_that_are_graphs_read_nothing():
    groups = [group for group in GROUPS if group.note == "graphs"]
    names = [name for group in groups for name in group.cases if Case(name).has("graph")]
    assert {Case(name).first for name in names} == {"store", "reconstruct"}
    for name in names:
        if not Case(name).has("compiled"):
            ready = Ready(Group("irevnet_small", 2, 32, "bf16"), Case(name), torch.device("cpu"))
            assert reads_of(ready.train, ready.net, ready.x) == [], name


@pytest.mark.parametrize("grid", [None, Grid(40, on_range="record")])
@pytest.mark.parametrize("strategy", RECORDING, ids=repr)
def test_nothing_goes_from_the_host_to_the_device(strategy, grid):
    """On the meta device no value can be read; and what is copied to it would be from the host."""
    net = deep(3, dropout=0.3).float().to("meta")
    net.backprop, net.grid = strategy, grid
    x = torch.rand(3, 8, 4, 4, device="meta", requires_grad=True)

    class Copies(TorchDispatchMode):
        found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            kinds = {t.device.type for t in tensors_in(args, kwargs, result) if t.ndim}
            if len(kinds) > 1:
                self.found.append(str(func))
            return result

    step = step_of(net, x, autocast=False)
    step()
    with Copies() as copies:
        step()
    assert copies.found == []
