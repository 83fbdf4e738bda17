"""i-RevNets of signals and volumes: sizes, the equation written out, round trips, gradients, memory, refusals."""

import re

import pytest
import torch

import zoo
from tests.zoo_networks import check_gradients, check_memory, psi_nd


def meta(name, **options):
    with torch.device("meta"):
        return zoo.create(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("irevnet_b", {"dimensions": 1}, 143_125),
        ("irevnet_b", {"dimensions": 3}, 37_238_911_816),
        ("irevnet_small", {"dimensions": 1}, 50_857),
        ("irevnet_small", {"dimensions": 3, "blocks": (3, 3)}, 5_346_472),
    ],
)
def test_parameters(name, options, count):
    assert sum(p.numel() for p in meta(name, **options).parameters()) == count


def small(dimensions, **options):
    """Of two stages where three would be large."""
    blocks = (1, 1) if dimensions == 3 else (1, 2, 1)
    return zoo.create("irevnet_small", dimensions=dimensions, num_classes=4, **{"blocks": blocks} | options)


def values(dimensions, batch=3, dtype=torch.float64):
    sizes = {1: (48,), 2: (16, 32), 3: (16, 8, 8)}[dimensions]
    return torch.rand(batch, 3, *sizes, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [("irevnet_small", 1), ("irevnet_small", 2), ("irevnet_small", 3), ("irevnet_b", 1), ("irevnet_b", 3)],
)
def test_a_stream_has_all_values_of_half_the_image_in_every_stage(name, dimensions):
    net = meta(name, dimensions=dimensions)
    x = value = torch.empty(2, 3, *[32] * dimensions, device="meta")
    for key, value in net.body.trace(x):
        total = sum(part.numel() for part in (value if isinstance(value, tuple) else (value,)))
        assert total == x.numel(), key
    assert net.body.bijective
    assert net.feature_channels == value.shape[1] == 3 * 2 ** (dimensions * (5 if name == "irevnet_b" else 4))
    assert net.head(value).shape == (2, 1000)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_equation_written_out_in_other_dimensions(dimensions):
    net = small(dimensions).double().eval()
    x = values(dimensions)
    first, second = psi_nd(x).chunk(2, dim=1)
    for block in net.body[2:-1]:
        down = psi_nd if block.downsample is not None else (lambda value: value)
        first, second = down(second), down(first) + block.function(second)
    features = torch.cat((first, second), dim=1)
    assert torch.equal(net.features(x), features)
    pooled = net.head[0](features).relu().flatten(2).mean(2)
    torch.testing.assert_close(net(x), net.head[-1](pooled))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_signals_and_volumes_come_back(dimensions, training):
    net = small(dimensions).train(training)
    x = values(dimensions, dtype=torch.float32)
    net.grid = "exact"
    assert torch.equal(net.inverse(net.features(x)), net.body.snap(x))
    net.grid = None
    double = values(dimensions)
    torch.testing.assert_close(net.double().inverse(net.features(double)), double, atol=1e-9, rtol=0)


@pytest.mark.parametrize("grid", [None, "exact"])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_gradients_of_signals_and_volumes(dimensions, grid):
    net = small(dimensions, blocks=(2,) if dimensions == 3 else (2, 1))
    check_gradients(net, values(dimensions, dtype=torch.float32), grid)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_memory_of_signals_and_volumes_is_flat_in_depth(dimensions):
    def make(depth):
        return small(dimensions, blocks=(depth, 1))

    check_memory(make, values(dimensions, dtype=torch.float32))


REFUSALS = {
    "IRevNet: dimensions must be 1, 2 or 3, got 4.": lambda: zoo.create("irevnet_small", dimensions=4),
    "Bottleneck: dimensions must be 1, 2 or 3, got 0.": lambda: zoo.Bottleneck(4, 4, dimensions=0),
    "IRevNet: expected signals of shape (batch, 3, length), got a tensor of shape (2, 3, 32, 32).": lambda: small(1)(
        torch.zeros(2, 3, 32, 32)
    ),
    "IRevNet: length must be divisible by 16, got a tensor of shape (2, 3, 24).": lambda: small(1)(
        torch.zeros(2, 3, 24)
    ),
    "IRevNet: expected floating-point signals, got dtype torch.int16. Convert them: x.float().": lambda: small(1)(
        torch.zeros(2, 3, 16, dtype=torch.int16)
    ),
    "IRevNet: expected a tensor of signals, got an object of type tuple.": lambda: small(1)((torch.zeros(1),)),
    "IRevNet: features have the shape (batch, 48, length), got a tensor of shape (1, 3, 16).": lambda: small(1).inverse(
        torch.zeros(1, 3, 16)
    ),
    "IRevNet: expected volumes of shape (batch, 3, depth, height, width), got a tensor of shape (2, 3, 8, 8).": (
        lambda: small(3)(torch.zeros(2, 3, 8, 8))
    ),
    "IRevNet: depth, height and width must be divisible by 8, got a tensor of shape (2, 3, 8, 8, 4).": lambda: small(3)(
        torch.zeros(2, 3, 8, 8, 4)
    ),
    "got a tensor of shape (1, 3, 8, 8, 8). Take a larger batch or volume, or net.eval().": lambda: small(3)(
        torch.zeros(1, 3, 8, 8, 8)
    ),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        REFUSALS[words]()
