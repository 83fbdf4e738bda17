"""Every layer can be exported in both directions, for a batch of any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zoo
from invertible import Exactness, Inverse, Recompute, Reconstruct, Store
from invertible._value import leaves, map_value
from tests.catalogue import ROWS
from tests.networks import deep, with_strategy


class Method(nn.Module):
    """One direction of a layer as a module: ``Inverse(layer)`` is for those that are bijective."""

    def __init__(self, layer, name):
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, value, condition=None):
        return getattr(self.layer, self.name)(value, condition=condition)


def batch_of(value, size):
    return map_value(lambda t: torch.cat([t] * size)[:size].contiguous(), value)


def assert_equal(found, expected):
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def exported(module, *values, strict=False):
    """Of a batch of 3, for any."""
    dynamic = {0: torch.export.Dim("batch", min=2, max=64)}
    shapes = tuple(map_value(lambda _: dynamic, value) for value in values)
    return torch.export.export(module, values, dynamic_shapes=(*shapes,), strict=strict).module(check_guards=False)


@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize("name", ROWS)
@given(data=st.data())
@settings(max_examples=3)
def test_layers_in_both_directions(name, method, data):
    row = ROWS[name]
    layer = row.build(data.draw).eval()
    x = batch_of(row.input(data.draw, layer), 3)
    values = [x] if row.condition is None else [x, row.condition(x)]
    if method == "inverse":
        with torch.no_grad():
            values[0] = layer(x, condition=values[1] if len(values) > 1 else None)
    module = Method(layer, method)
    if method == "inverse" and layer.exactness is Exactness.ITERATIVE:  # it ends when its values say so
        with pytest.raises(RuntimeError, match=r"inverse is no one graph, and can't be exported"):
            exported(module, *values)
        return
    again = exported(module, *values)
    for size in (3, 5):
        other = [batch_of(value, size) for value in values]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(size)  # for layers that draw
            found = again(*other)
            torch.manual_seed(size)
            assert_equal(found, module(*other))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # strict, in training
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", [Store(), Recompute(every=2), Reconstruct()], ids=repr)
def test_networks_whatever_is_kept(strategy, training, strict):
    """Gradients may be enabled; in training the statistics move as they do without."""
    net = with_strategy(deep(3), strategy)
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    for module in (net.train(training), Inverse(net).train(training)):
        again = exported(module, x, strict=strict)
        other = torch.randn(5, 8, 4, 4, dtype=torch.float64)
        buffers = {k: b.clone() for k, b in module.named_buffers()}
        expected = module(other).detach()
        moved = {k: b.clone() for k, b in module.named_buffers()}
        module.load_state_dict(buffers, strict=False)
        torch.testing.assert_close(again(other).detach(), expected)
        if training:
            assert any(not torch.equal(moved[k], buffers[k]) for k in moved)
            found = again.state_dict()
            assert all(torch.allclose(b.double(), found[k].double()) for k, b in moved.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["irevnet_a", "irevnet_b"])
def test_full_size_networks(name):
    net = getattr(zoo, name)().eval()
    net.backprop = Reconstruct()
    with torch.device("meta"):
        x = torch.rand(3, 3, 224, 224)
    net.to("meta")
    features = net.features(x).detach()
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert program.module(check_guards=False)(torch.rand(5, 3, 224, 224, device="meta")).shape == (5, 1000)
    if net.body.bijective:
        exported(Inverse(net.body), features)
