"""Two processes with DistributedDataParallel train as one process does, and their communication overlaps."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import invertible as inv
from invertible import Coupling, Inverse, Recompute, Reconstruct, Sequential
from tests.distributed import on_two
from tests.networks import UsersAffine, assert_same, deep, function

SAVING = [Reconstruct(), Reconstruct(anchor_every=2), Recompute(), Recompute(every=2)]
saving = pytest.mark.parametrize("strategy", SAVING, ids=repr)
OPTIONS = [
    {},
    {"bucket_cap_mb": 1e-4},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"bucket_cap_mb": 1e-4, "static_graph": True, "gradient_as_bucket_view": True},
]
TINY = {"bucket_cap_mb": 1e-4}


class LogDet(nn.Module):
    """The documented route to a log-determinant under DDP: a module whose ``forward`` returns it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z, log_det = self.net.forward_and_log_det(x)
        return torch.cat([z.flatten(1), log_det[:, None]], 1)


def plain():
    return deep(3)


def frozen():
    net = deep(4)
    for layer in (net[1], net[3]):
        layer.requires_grad_(False)
    return net


def shared():
    block = Coupling(function(4))
    return Sequential(inv.Split(), block, Coupling(function(4)), block, inv.Merge()).double()


def nested():
    stages = [Sequential(*[Coupling(function(4)) for _ in range(2)]) for _ in range(2)]
    return Sequential(inv.Split(), *stages, UsersAffine(4), inv.Merge()).double()


def log_det():
    return LogDet(Sequential(inv.Split(), UsersAffine(4), Coupling(function(4)), inv.Merge()).double())


def backwards():
    return Inverse(Sequential(inv.Split(), *[Coupling(function(4)) for _ in range(3)], inv.Merge()).double())


class Idle(nn.Module):
    """F with a parameter that it uses not."""

    def __init__(self):
        super().__init__()
        self.inner, self.idle = function(4), nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


def idle():
    return Sequential(inv.Split(), Coupling(Idle()), Coupling(function(4)), inv.Merge()).double()


NETWORKS = {f.__name__: f for f in (plain, frozen, shared, nested, log_det, backwards, idle)}


def built(name, strategy):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for part in net.modules():
        if isinstance(part, Sequential):
            part.backprop = strategy
            break
    return net


def batch(step, rank, micro=0):
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.float64)


def loss_of(y):
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).square().mean()


def trained(net):
    return {k: p.detach().clone() for k, p in net.named_parameters()} | {k: b.clone() for k, b in net.named_buffers()}


def on_each(rank, name, strategy, options, accumulate):
    """Three steps on this process's half of each batch."""
    net = built(name, strategy)
    wrapped = DistributedDataParallel(net, **options)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step in range(3):
        if accumulate:
            with wrapped.no_sync():
                loss_of(wrapped(batch(step, rank, 1))).backward()
        loss_of(wrapped(batch(step, rank))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return trained(net)


def in_one(name, accumulate=False):
    """The same by plain autograd in one process: each half has batch statistics of its own, as under DDP."""
    net = built(name, None)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    buffers = [None, None]
    for step in range(3):
        start = copy.deepcopy(net.state_dict())
        for rank in (1, 0):  # the first process's buffers are everybody's at the next step
            net.load_state_dict(start)
            for micro in ([1] if accumulate else []) + [0]:
                (loss_of(net(batch(step, rank, micro))) / 2).backward()
            buffers[rank] = copy.deepcopy(dict(net.named_buffers()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [trained(net) | buffers[rank] for rank in range(2)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(data=st.data())
@settings(max_examples=6)
def test_two_processes_train_as_one(options, data):
    name = data.draw(st.sampled_from(list(NETWORKS)))
    if name == "idle":
        options = {**options, "find_unused_parameters": True, "static_graph": False}
    strategy = data.draw(st.sampled_from(SAVING))
    accumulate = data.draw(st.booleans()) and not options.get(
        "static_graph"
    )  # they do not go together, whatever is kept
    expected = in_one(name, accumulate)
    found = on_two(on_each, name, strategy, options, accumulate)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, 1e-10)
