"""The error of an inverse in floating point, estimated without the true input."""

import math

import pytest
import torch
from torch import nn

import invertible as inv
from invertible import Coupling, ErrorEstimate, Sequential
from invertible._value import leaves
from tests.networks import UsersAffine, function
from tests.test_grid import adverse
from tests.test_grid import deep as on_grid


def bottleneck(channels):
    """As in an i-RevNet."""
    inner = channels // 4
    layers = []
    for before, after, size in ((channels, inner, 1), (inner, inner, 3), (inner, channels, 1)):
        conv = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
        layers += [nn.BatchNorm2d(before), nn.ReLU(), conv]
    return nn.Sequential(*layers)


def additive(depth, channels=16, make=bottleneck):
    return Sequential(inv.Split(), *(Coupling(make(channels)) for _ in range(depth)), inv.Merge())


def louder(net, by):
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data *= by
    return net


def error(found, x):
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(leaves(found), leaves(x), strict=True)
    )


IMAGE = (4, 32, 12, 12)
NETWORKS = {
    "shallow": lambda: (additive(3), torch.randn(IMAGE)),
    "deep": lambda: (additive(30), torch.randn(IMAGE)),
    "of 100 blocks": lambda: (additive(100), torch.randn(IMAGE)),
    "of 300 blocks": lambda: (additive(300, 8), torch.randn(4, 16, 6, 6)),
    "loud": lambda: (louder(additive(60), 3), torch.randn(IMAGE)),
    "smooth": lambda: (additive(40, make=function), torch.randn(IMAGE)),
    "of small values": lambda: (additive(12), torch.randn(IMAGE) * 0.01),
    "double": lambda: (additive(30).double(), torch.randn(IMAGE, dtype=torch.float64)),
    "affine": lambda: (
        Sequential(inv.Split(), *(UsersAffine(8) for _ in range(10)), inv.Merge()),
        torch.randn(4, 16, 8, 8),
    ),
    "nested": lambda: (
        Sequential(additive(6), inv.Inverse(additive(6)), inv.Split(), inv.Parallel(additive(3, 8), additive(3, 8))),
        torch.randn(IMAGE),
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_within_a_factor_of_three(name, mode):
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    with torch.no_grad():
        if mode == "eval" and name not in {"loud", "of small values"}:  # with other statistics they blow up
            net(x)
            net.eval()
        y = net(x)
        random = torch.get_rng_state()
        found, estimate = net.inverse(y, estimate=True)
        assert torch.equal(torch.get_rng_state(), random)
        plain = net.inverse(y)
    assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(plain), strict=True))
    assert estimate.kind == "estimate"
    true = error(found, x)
    assert true / 3 < estimate.relative < 3 * true, (true, estimate)


@pytest.mark.parametrize("name", ["deep", "of 100 blocks", "smooth", "affine"])
def test_under_autocast_it_is_an_upper_figure(name):
    """There the error is nothing, or as large as it gets; and couplings that scale are off by bfloat16 itself."""
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, estimate = net.inverse(net(x), estimate=True)
    assert error(found, x) < 3 * estimate.relative


def test_on_a_grid_there_is_nothing_to_estimate():
    net, x = on_grid(5), adverse()
    with torch.no_grad():
        found, estimate = net.inverse(net(x), estimate=True)
        assert torch.equal(found, net.snap(x))
        assert estimate == ErrorEstimate("exact", 0.0)
        latent = net.encode(x)
        found, estimate = net.inverse(latent, estimate=True)
        assert torch.equal(found, net.snap(x))
        assert estimate.kind == "exact"
        net.eval()
        with pytest.warns(UserWarning, match="mode was train"):
            _, estimate = net.inverse(latent, strict=False, estimate=True)
        assert estimate.kind == "estimate"
        assert math.isnan(estimate.relative)
    moved = Sequential(inv.Split(), inv.Swap())
    assert moved.inverse(moved(x), estimate=True)[1] == ErrorEstimate("exact", 0.0)


def test_gradients_buffers_and_conditions():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x, condition):
            return torch.tanh(self.norm(x) + condition)

    net = Sequential(inv.Split(), Coupling(Shifted()), Coupling(Shifted()), inv.Merge(), backprop=inv.Reconstruct())
    y, condition = torch.randn(4, 4, requires_grad=True), torch.randn(4, 1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x, estimate = net.inverse(y, condition=condition, estimate=True)
    assert 0 < estimate.relative < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    x.sum().backward()
    assert y.grad is not None


def test_random_networks_are_refused():
    net = Sequential(inv.Split(), Coupling(nn.Dropout()), inv.Merge())
    with pytest.raises(ValueError, match="draws random numbers has no one inverse"):
        net.inverse(torch.randn(2, 4), estimate=True)
    assert net.eval().inverse(torch.randn(2, 4), estimate=True)[1].relative < 1e-5
    net = Sequential(inv.Augment(2), inv.Split(), Coupling(nn.Tanh()), inv.Merge()).eval()
    with pytest.raises(
        ValueError, match=r"the error of\. Augment\(2\) draws in eval, too: leave it out, and hand what"
    ):
        net.inverse(torch.randn(2, 4), estimate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("layer", "x"), [(inv.Sigmoid(), 1.0), (inv.Tanh(), -0.5), (inv.Softplus(), 0.0)])
def test_at_the_edge_of_a_range_where_noise_leads_outside(layer, x, dtype):
    """Where the last bit is worth a lot, the figure says so."""
    net, info = Sequential(layer, inv.ConstantAffine(1.0)), torch.finfo(dtype)
    y = {1.0: 1 - info.eps / 2, -0.5: -1 + info.eps / 2, 0.0: info.tiny * info.eps}[x]
    y = torch.full((2, 64), y, dtype=dtype)
    found, estimate = net.inverse(y, estimate=True)
    assert torch.equal(found, net.inverse(y))
    assert math.isfinite(estimate.relative)
    if x:
        assert 1e-3 < estimate.relative < 0.3
    with pytest.raises(ValueError, match="inverse takes values in the open interval"):
        net.inverse(3 * net(found.abs()) * (-1 if x == 0 else 1), estimate=True)
