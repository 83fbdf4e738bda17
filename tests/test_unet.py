"""The invertible U-Net: sizes, its data flow written out, round trips, gradients, memory, refusals."""

import re

import pytest
import torch
from torch import nn

import zoo
from invertible import Coupling, EnvironmentMismatch, Reconstruct
from tests.zoo_networks import check_gradients, check_memory, psi_nd, psi_nd_inverse, randomize

SIZES = {1: (24,), 2: (8, 16), 3: (8, 4, 8)}


def thin(dimensions=2, blocks=(1, 2, 1), **options):
    return zoo.create("iunet", dimensions=dimensions, blocks=blocks, **{"channels": 8, "num_classes": 2} | options)


def images(dimensions=2, batch=2, channels=3, dtype=torch.float32):
    return torch.rand(batch, channels, *SIZES[dimensions], dtype=dtype)


@pytest.mark.parametrize(("dimensions", "count"), [(1, 50_306), (2, 3_137_410), (3, 9_404_290)])
def test_parameters(dimensions, count):
    with torch.device("meta"):
        net = zoo.create("iunet", dimensions=dimensions)
    assert sum(p.numel() for p in net.parameters()) == count
    x = torch.empty(2, 3, *[16] * dimensions, device="meta")
    assert net.features(x).shape == (2, 64, *[16] * dimensions)
    assert net(x).shape == (2, 2, *[16] * dimensions)
    assert net.inverse(net.features(x)).shape == x.shape


@pytest.mark.parametrize(
    ("dimensions", "widths"),
    [
        (1, [4] * 2 + [4] * 4 + [4] * 8 + [4] * 4 + [4] * 2),
        (2, [4] * 2 + [8] * 4 + [16] * 8 + [8] * 4 + [4] * 2),
        (3, [4] * 2 + [8] * 4 + [16] * 8 + [8] * 4 + [4] * 2),
    ],
)
def test_levels_have_twice_the_channels_and_their_blocks_on_each_way(dimensions, widths):
    net = thin(dimensions, blocks=(2, 4, 4))
    functions = [layer.function for layer in net.modules() if isinstance(layer, Coupling)]
    assert [function[0].out_channels for function in functions] == widths
    assert all([type(p) for p in f[1:]] == [nn.LeakyReLU, nn.GroupNorm] for f in functions)
    assert not any(f[2].weight.any() or f[2].bias.any() for f in functions)
    assert not net.body.bijective
    assert thin(dimensions, in_channels=8).body.bijective


def flow(pair, level, blocks, functions, dimensions):
    """A level and those below: the first stream waits, the second goes down and comes up again."""
    first, second = pair
    for _ in range(blocks[level]):
        first, second = second, first + next(functions)(second)
    if level + 1 < len(blocks):
        waits, goes = (None, second) if dimensions < 3 else second.chunk(2, dim=1)
        lower = flow(psi_nd(goes).chunk(2, dim=1), level + 1, blocks, functions, dimensions)
        back = psi_nd_inverse(torch.cat(lower, dim=1), dimensions)
        second = back if waits is None else torch.cat((waits, back), dim=1)
    for _ in range(blocks[level]):
        first, second = second, first + next(functions)(second)
    return first, second


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_data_flow_written_out(dimensions):
    blocks = (1, 2, 1)
    net = randomize(thin(dimensions, blocks).double()).eval()
    x = images(dimensions, dtype=torch.float64)
    zeros = torch.zeros_like(x)
    pair = torch.cat((x[:, :2], zeros[:, :2]), 1), torch.cat((x[:, 2:], zeros[:, :3]), 1)
    functions = iter([layer.function for layer in net.modules() if isinstance(layer, Coupling)])
    features = torch.cat(flow(pair, 0, blocks, functions, dimensions), dim=1)
    assert next(functions, None) is None
    assert torch.equal(net.features(x), features)
    logits = torch.einsum("oc,bc...->bo...", net.head[0].weight.flatten(1), features)
    torch.testing.assert_close(net(x), logits + net.head[0].bias.view(-1, *[1] * dimensions))


def test_the_function_written_out():
    net = randomize(thin().double())
    function = next(layer.function for layer in net.modules() if isinstance(layer, Coupling))
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    y = nn.functional.conv2d(x, function[0].weight, padding=1)
    y = torch.where(y > 0, y, 0.01 * y)
    mean, variance = y.mean(dim=(1, 2, 3), keepdim=True), y.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
    y = (y - mean) / (variance + 1e-3).sqrt()
    weight, bias = (p.view(1, -1, 1, 1) for p in (function[2].weight, function[2].bias))
    torch.testing.assert_close(function(x), y * weight + bias)


def test_skips_and_levels_see_what_they_should():
    """A pixel reaches far pixels through the lower levels only."""
    net = randomize(thin(blocks=(1, 1)).double()).eval()
    for part in net.modules():  # without the norm, which sees all of the image
        if isinstance(part, Coupling):
            part.function = part.function[:2]
    x = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    x[..., 16, 16] = 1
    reached = net.features(x).abs().sum(1)[0] > 0
    assert reached[16, 10:22].sum() > 5
    assert not reached[:, :8].any()
    assert not reached[:8].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_image_comes_back(dimensions, training):
    net = randomize(thin(dimensions)).train(training)
    x = images(dimensions)
    net.grid = "exact"
    features = net.features(x)
    assert features.dtype == torch.float64
    assert net(x).dtype == torch.float32
    assert torch.equal(net.inverse(features), net.body.snap(x))
    net.grid = None
    torch.testing.assert_close(net.inverse(net.features(x)), x, atol=1e-3, rtol=0)
    net, x = net.double(), x.double()
    torch.testing.assert_close(net.inverse(net.features(x)), x, atol=1e-11, rtol=0)


def test_a_latent_knows_what_it_depends_on():
    net = randomize(thin()).eval()
    net.grid = "exact"
    x = images()
    latent = net.encode(x)
    assert torch.equal(net.inverse(latent), net.body.snap(x))
    randomize(net)
    with pytest.raises(EnvironmentMismatch, match="weights"):
        net.inverse(latent)


@pytest.mark.parametrize("grid", [None, "exact"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_gradients_are_the_same_whatever_is_kept(dimensions, grid):
    check_gradients(thin(dimensions), images(dimensions), grid)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_memory_is_flat_in_depth(dimensions):
    def make(depth):
        return thin(dimensions, blocks=(depth, depth))

    check_memory(make, images(dimensions))


def test_gradients_reach_every_parameter():
    net = randomize(thin())
    net.backprop = Reconstruct()
    net(images()).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("channels", [1, 4, 8])
def test_images_of_other_channels_come_back(channels):
    net = randomize(thin(in_channels=channels).double()).eval()
    x = images(channels=channels, dtype=torch.float64)
    torch.testing.assert_close(net.inverse(net.features(x)), x)


def test_without_a_head_the_network_returns_features():
    net = randomize(thin(num_classes=0))
    x = images()
    assert torch.equal(net(x), net.features(x))
    net.grid = "exact"
    assert net(x).dtype == torch.float32


REFUSALS = {
    "IUNet: expected images of shape (batch, 3, height, width), got a tensor of shape (1, 1, 32, 32).": lambda: thin()(
        torch.zeros(1, 1, 32, 32)
    ),
    "IUNet: height and width must be divisible by 4, got a tensor of shape (1, 3, 6, 4).": lambda: thin()(
        torch.zeros(1, 3, 6, 4)
    ),
    "IUNet: depth, height and width must be divisible by 4, got a tensor of shape (1, 3, 4, 6, 4).": lambda: thin(3)(
        torch.zeros(1, 3, 4, 6, 4)
    ),
    "IUNet: expected floating-point volumes, got dtype torch.int16. Convert them: x.float().": lambda: thin(3)(
        torch.zeros(1, 3, 4, 4, 4, dtype=torch.int16)
    ),
    "IUNet: expected a tensor of images, got an object of type list.": lambda: thin().features([1]),
    "IUNet: features have the shape (batch, 8, height, width), got a tensor of shape (2, 2, 8, 16). Logits have no "
    "inverse.": lambda: thin().inverse(thin()(images())),
    "IUNet: inverse expects the tensor of net.features(x), got tuple.": lambda: thin().inverse((1, 2)),
    "IUNet: dimensions must be 1, 2 or 3, got 4.": lambda: thin(4),
    "IUNet: channels must be a multiple of 4 with dimensions=3, got 6.": lambda: thin(3, channels=6),
    "IUNet: channels must be a multiple of 2 with dimensions=2, got 0.": lambda: thin(channels=0),
    "IUNet: blocks must be numbers of at least 1, one for each level, got (1, 0).": lambda: thin(blocks=(1, 0)),
    "IUNet: blocks must be numbers of at least 1, one for each level, got ().": lambda: thin(blocks=()),
    "IUNet: in_channels must be between 1 and channels, 8, got 9.": lambda: thin(in_channels=9),
    "IUNet: channels must be an integer, got 8.0.": lambda: thin(channels=8.0),
    "IUNet: num_classes must be at least 0, got -1.": lambda: thin(num_classes=-1),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        REFUSALS[words]()
