"""The reversible vision transformer: size, its equations written out, round trips, gradients, memory, refusals."""

import re

import pytest
import torch
from torch import nn

import zoo
from invertible import Additive, Coupling, Merge, Reconstruct
from tests.zoo_networks import check_gradients, check_memory, randomize
from zoo.vit import MLP, Attention


def thin(depth=2, **options):
    defaults = {"num_classes": 4, "dim": 24, "heads": 3, "patch_size": 8, "image_size": 32}
    return zoo.create("revvit_s", depth=depth, **defaults | options)


def test_the_structure_and_size_of_the_paper():
    with torch.device("meta"):
        net = zoo.create("revvit_s")
    assert sum(p.numel() for p in net.parameters()) == 22_434_664
    *couplings, last = net.blocks
    assert isinstance(last, Merge)
    assert len(couplings) == 24
    for i, layer in enumerate(couplings):
        assert isinstance(layer, Coupling)
        assert isinstance(layer.transform, Additive)
        assert layer.downsample is None
        assert type(layer.function) is (MLP if i % 2 else Attention)
    assert {layer.function.heads for layer in couplings[::2]} == {6}
    assert {layer.function.hidden.out_features for layer in couplings[1::2]} == {1536}
    assert {part.eps for part in net.modules() if isinstance(part, nn.LayerNorm)} == {1e-6}
    x = torch.empty(2, 3, 224, 224, device="meta")
    assert net.features(x).shape == (2, 768, 14, 14)
    assert net(x).shape == (2, 1000)


def test_what_it_starts_from():
    net = thin(dim=48)
    for part in net.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            assert 0.01 < part.weight.std() < 0.03
            assert not part.bias.any()
    assert 0.01 < net.positions.std() < 0.03


def attention(tokens, layer):
    """Head by head and token by token."""
    normal = nn.functional.layer_norm(tokens, tokens.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-6)
    rows = normal @ layer.qkv.weight.T + layer.qkv.bias
    query, key, value = rows.chunk(3, dim=-1)
    width = tokens.shape[-1] // layer.heads
    heads = []
    for start in range(0, tokens.shape[-1], width):
        q, k, v = (each[..., start : start + width] for each in (query, key, value))
        scores = torch.stack([(q[:, i : i + 1] * k).sum(-1) for i in range(tokens.shape[1])], dim=1)
        heads.append((scores / width**0.5).softmax(-1) @ v)
    return torch.cat(heads, -1) @ layer.projection.weight.T + layer.projection.bias


def perceptron(tokens, layer):
    normal = nn.functional.layer_norm(tokens, tokens.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-6)
    hidden = normal @ layer.hidden.weight.T + layer.hidden.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ layer.projection.weight.T + layer.projection.bias


def test_logits_against_the_equations_written_out():
    """y1 = x1 + F(x2), y2 = x2 + G(y1), with tokens in a list; then layer norm of both, the mean, the linear map."""
    net = randomize(thin(depth=3).double()).eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    pixels = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    tokens = pixels @ net.patches.weight.flatten(1).T + net.patches.bias + net.positions.flatten(2).transpose(1, 2)
    x1 = x2 = tokens
    functions = [layer.function for layer in list(net.blocks)[:-1]]
    for attend, think in zip(functions[::2], functions[1::2], strict=True):
        y1 = x1 + attention(x2, attend)
        x1, x2 = y1, x2 + perceptron(y1, think)
    joined = torch.cat((x1, x2), dim=-1)
    torch.testing.assert_close(net.features(x).flatten(2).transpose(1, 2), joined)
    normal = nn.functional.layer_norm(joined, joined.shape[-1:], net.norm.weight, net.norm.bias, 1e-6)
    logits = normal.mean(1) @ net.head[-1].weight.T + net.head[-1].bias
    torch.testing.assert_close(net(x), logits)


@pytest.mark.parametrize("training", [True, False])
def test_the_streams_come_back(training):
    net = randomize(thin(depth=4)).train(training)
    x = torch.rand(3, 3, 32, 32)
    for stream in net.blocks.inverse(net.features(x)):
        torch.testing.assert_close(stream, net.embedded(x), atol=1e-3, rtol=0)
    net.grid = "exact"
    features = net.features(x)
    assert features.dtype == torch.float64
    assert net(x).dtype == torch.float32
    for stream in net.blocks.inverse(features):
        assert torch.equal(stream, net.blocks.snap(net.embedded(x)))
    net.grid = None
    net = net.double()
    for stream in net.blocks.inverse(net.features(x.double())):
        torch.testing.assert_close(stream, net.embedded(x.double()), atol=1e-11, rtol=0)


@pytest.mark.parametrize("grid", [None, "exact"])
def test_gradients_are_the_same_whatever_is_kept(grid):
    check_gradients(thin(depth=3), torch.rand(2, 3, 32, 32), grid)


def test_gradients_on_a_grid_have_the_same_bits_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        check_gradients(thin(depth=2), torch.rand(2, 3, 32, 32), "exact")


def test_memory_is_flat_in_depth():
    check_memory(thin, torch.rand(2, 3, 32, 32))


def test_gradients_reach_every_parameter():
    net = thin()
    net.backprop = Reconstruct()
    net(torch.rand(2, 3, 32, 32)).square().sum().backward()
    without = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_without_a_classifier_and_with_other_channels():
    whole, net = thin(in_channels=2), thin(in_channels=2, num_classes=0)
    net.load_state_dict({key: value for key, value in whole.state_dict().items() if not key.startswith("head.")})
    x = torch.rand(2, 2, 32, 32)
    assert net(x).shape == (2, net.feature_channels)
    torch.testing.assert_close(whole.head[-1](net(x)), whole(x))


REFUSALS = {
    "RevViT: expected images of shape (batch, 3, height, width), got a tensor of shape (1, 1, 32, 32).": lambda: thin()(
        torch.zeros(1, 1, 32, 32)
    ),
    "RevViT: height and width must be divisible by 8, got a tensor of shape (1, 3, 36, 32).": lambda: thin()(
        torch.zeros(1, 3, 36, 32)
    ),
    "RevViT: height and width must be 32, the size that the positions are for, got a tensor of shape (1, 3, 64, 32).": (
        lambda: thin().features(torch.zeros(1, 3, 64, 32))
    ),
    "RevViT: expected floating-point images, got dtype torch.uint8. Scale them: x / 255.": lambda: thin()(
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    ),
    "RevViT: expected a tensor of images, got an object of type list.": lambda: thin()([1]),
    "RevViT: depth must be at least 1, got 0.": lambda: thin(depth=0),
    "RevViT: dim must be at least 1, got 0.": lambda: thin(dim=0),
    "RevViT: num_classes must be an integer, got None.": lambda: thin(num_classes=None),
    "RevViT: num_classes must be at least 0, got -1.": lambda: thin(num_classes=-1),
    "RevViT: image_size must be divisible by patch_size, got 30 and 8.": lambda: thin(image_size=30),
    "Attention: channels must be divisible by heads, got 24 and 5.": lambda: thin(heads=5),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        REFUSALS[words]()
