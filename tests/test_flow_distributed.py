"""Two processes train a flow as one does, by its likelihood and by a divergence, with DDP and with FSDP2."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from invertible import Affine, Conditional, Coupling, Flow, InvertibleLinear, Merge, Reconstruct, Sequential, Split
from tests.distributed import on_two
from tests.networks import assert_same


def built(strategy):
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        layers.append(Coupling(Conditional(net), Affine()))
    net = Sequential(Split(), *layers, Merge(), InvertibleLinear(4), backprop=strategy)
    return Flow.standard_normal(net, (4,), condition=torch.zeros(1, 2)).double()


def loss_of(flow, by, step, rank):
    torch.manual_seed(10 * step + rank)
    condition = torch.randn(3, 2, dtype=torch.float64)
    if by == "value":
        return -flow(condition, value=torch.randn(3, 4, dtype=torch.float64)).mean()
    x, log_prob = flow(condition, samples=2)
    return (log_prob + x.square().sum(-1)).mean()


def trained(flow, inner, losses):
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    for step in range(2):
        for each in losses(flow, step):
            each.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    whole = {k: p.full_tensor() if isinstance(p, DTensor) else p for k, p in inner.named_parameters()}
    return {k: p.detach().clone() for k, p in whole.items()}


def train_half(rank, by, how):
    inner = built(Reconstruct())
    if how == "ddp":
        flow = DistributedDataParallel(inner)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for part in inner.transform if how == "fsdp of layers" else ():
            if list(part.parameters()):
                fully_shard(part, mesh=mesh)
                for method in ("forward_and_log_det", "inverse_and_log_det"):  # which FSDP does not know
                    register_fsdp_forward_method(part, method)
        flow = fully_shard(inner, mesh=mesh)
    return trained(flow, inner, lambda flow, step: [loss_of(flow, by, step, rank)])


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp of layers"])
@pytest.mark.parametrize("by", ["value", "samples"])
def test_two_processes_train_as_one(by, how):
    flow = built(None)
    expected = trained(flow, flow, lambda flow, step: [loss_of(flow, by, step, rank) / 2 for rank in range(2)])
    for mine in on_two(train_half, by, how):
        assert_same(mine, expected, 1e-10)
