"""The i-RevNets: sizes, order, structure against a second reading of the paper, round trips, refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import nn

import zoo
from benchmarks.epsilon import epsilon
from benchmarks.roundtrip import KINDS, MODES, build, errors
from invertible import (
    Coupling,
    EnvironmentMismatch,
    Grid,
    Merge,
    PadSplit,
    PixelUnshuffle,
    Reconstruct,
    Sequential,
    Split,
    Store,
)

PARAMETERS = [
    ("irevnet_b", {}, 29_201_092),
    ("irevnet_b", {"kernel_sizes": (3, 3, 3)}, 125_120_356),
    ("irevnet_small", {}, 1_246_048),
    ("irevnet_a", {}, 180_999_016),
    ("irevnet_a", {"split_channels": 96}, 48_352_360),
    ("irevnet_a", {"split_channels": 96, "kernel_sizes": (3, 3, 3)}, 199_033_960),
]


def meta(name, **options):
    with torch.device("meta"):
        return zoo.create(name, **options)


@pytest.mark.parametrize(("name", "options", "count"), PARAMETERS)
def test_parameters_are_those_of_table_1_and_its_readings(name, options, count):
    assert sum(p.numel() for p in meta(name, **options).parameters()) == count


@pytest.mark.parametrize(
    ("name", "blocks", "widths", "downs"),
    [
        ("irevnet_b", 100, [24] * 6 + [96] * 16 + [384] * 72 + [1536] * 6, [0, 6, 22, 94]),
        ("irevnet_a", 18, [96] * 4 + [384] * 4 + [1536] * 6 + [6144] * 4, [4, 8, 14]),
        ("irevnet_small", 9, [24] * 3 + [96] * 3 + [384] * 3, [0, 3, 6]),
    ],
)
def test_the_structure_of_section_3_2(name, blocks, widths, downs):
    """(b)'s downsampling at depths 3j = 3, 21, 69, 285 is in the blocks 0, 6, 22, 94, counted from 0."""
    net = meta(name)
    couplings = [layer for layer in net.body if isinstance(layer, Coupling)]
    assert len(couplings) == blocks
    assert [i for i, layer in enumerate(couplings) if layer.downsample is not None] == downs
    for i, (layer, width) in enumerate(zip(couplings, widths, strict=True)):
        kinds = [type(part) for part in layer.function]
        whole = [nn.BatchNorm2d, nn.ReLU, nn.Conv2d] * 3
        assert kinds == (whole[2:] if i == 0 else whole)
        convolutions = [part for part in layer.function if isinstance(part, nn.Conv2d)]
        assert [c.kernel_size for c in convolutions] == [(1, 1), (3, 3), (1, 1)]
        assert [c.out_channels for c in convolutions] == [width // 4, width // 4, width]
        assert [c.stride for c in convolutions] == [(2, 2) if i in downs else (1, 1), (1, 1), (1, 1)]
        assert all(c.bias is None for c in convolutions)
        assert layer.downsample is None or layer.downsample.order == "pixel_major"
        assert all((n.eps, n.momentum) == (1e-5, 0.1) for n in layer.function if isinstance(n, nn.BatchNorm2d))
    first = net.body[0]
    assert isinstance(first, PixelUnshuffle)
    assert (first.downscale_factor, first.order) == ((4 if name == "irevnet_a" else 2), "pixel_major")
    assert isinstance(net.body[1], PadSplit if name == "irevnet_a" else Split)
    assert isinstance(net.body, Sequential)
    assert isinstance(net.body[-1], Merge)
    assert [type(part) for part in net.head] == [nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]


@pytest.mark.parametrize("name", ["irevnet_a", "irevnet_b", "irevnet_cifar", "irevnet_small"])
def test_sizes_on_the_meta_device(name):
    net = meta(name)
    x = torch.empty(2, 3, 224, 224, device="meta")
    features = net.features(x)
    padded = {"irevnet_a": 192 / 48, "irevnet_cifar": 32 / 3}.get(name, 1)
    assert features.numel() == x.numel() * padded
    assert net(x).shape == (2, net.num_classes)
    assert net.inverse(features).shape == x.shape
    assert net.body.bijective == (padded == 1)


@pytest.mark.parametrize("name", ["irevnet_a", "irevnet_b", "irevnet_small"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_other_channels_keep_the_map(name, channels):
    net = meta(name, in_channels=channels)
    x = torch.empty(2, channels, 64, 64, device="meta")
    features = net.features(x)
    assert net.inverse(features).shape == x.shape
    assert net.body.bijective == (features.numel() == x.numel()) == (name != "irevnet_a")


def test_the_weights_of_a_have_the_same_shapes_for_any_channels():
    shapes = [{key: t.shape for key, t in meta("irevnet_a", in_channels=n).state_dict().items()} for n in (1, 3, 12)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_come_back(channels):
    net = zoo.create("irevnet_small", in_channels=channels, num_classes=2).double().eval()
    x = torch.rand(2, channels, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(net.inverse(net.features(x)), x)


def test_without_a_classifier_the_network_returns_what_it_would_see():
    whole = zoo.create("irevnet_small", num_classes=3).eval()
    net = zoo.create("irevnet_small", num_classes=0).eval()
    net.load_state_dict({key: t for key, t in whole.state_dict().items() if not key.startswith("head.4.")})
    x = torch.rand(2, 3, 32, 32)
    assert net(x).shape == (2, net.feature_channels)
    torch.testing.assert_close(whole.head[-1](net(x)), whole(x))
    net.grid = "exact"
    torch.testing.assert_close(whole.head[-1](net(x)), whole(x))


def test_parameters_are_registered_in_the_order_in_which_data_meets_them():
    net = zoo.create("irevnet_small", num_classes=3)
    met = []
    for name, module in net.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: met.append(name))
    net(torch.rand(2, 3, 32, 32))
    registered = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in net.named_parameters()))
    assert met == registered


def psi(x, r):
    """The released code's downsampling, by index: channel (i·r + j)·C + c is pixel (i, j) of channel c."""
    return torch.cat([x[:, :, i::r, j::r] for i in range(r) for j in range(r)], dim=1)


def test_features_against_the_equation_written_out():
    """x_{j+1} = S x̃_j, x̃_{j+1} = S x_j + F x̃_j, with S where the strides are 2; then (x, x̃) side by side."""
    net = zoo.create("irevnet_small", num_classes=3).double().eval()
    image = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    x, x_tilde = psi(image, 2).chunk(2, dim=1)
    for block in net.body[2:-1]:
        stride = next(p for p in block.function if isinstance(p, nn.Conv2d)).stride[0]
        x, x_tilde = psi(x_tilde, stride), psi(x, stride) + block.function(x_tilde)
    features = torch.cat((x, x_tilde), dim=1)
    assert torch.equal(net.features(image), features)
    assert (net.head[0].eps, net.head[0].momentum) == (1e-5, 0.1)
    pooled = net.head[0](features).relu().mean(dim=(2, 3))
    torch.testing.assert_close(net(image), net.head[-1](pooled))


def enough(batch, size):
    """Whether every norm sees at least 8 values per channel: the last stage has a 32nd of the size."""
    return batch * (size[0] // 32) * (size[1] // 32) >= 8


batches = st.tuples(st.integers(1, 9), st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96])))


@settings(max_examples=4)
@given(batches.filter(lambda b: enough(*b)), st.sampled_from(MODES), st.integers(0, 99))
def test_round_trip_of_b_on_noise_in_float64(case, mode, seed):
    batch, size = case
    each = errors(build("irevnet_b", torch.float64, seed=seed), "noise", mode, (batch, 3, *size), seed=seed)
    note(f"relative error per sample: {each.tolist()}")
    assert each.max() < 1e-11


@settings(max_examples=10)
@given(st.integers(2, 9), st.sampled_from([64, 96]), st.sampled_from(MODES), st.sampled_from(sorted(KINDS)), st.data())
def test_round_trip_of_the_small_network(batch, size, mode, kind, data):
    shape, seed = (batch, 3, size, data.draw(st.sampled_from([32, 64]))), data.draw(st.integers(0, 99))
    double = errors(build("irevnet_small", torch.float64, seed=seed), kind, mode, shape, seed=seed)
    note(f"relative error per sample, float64: {double.tolist()}")
    assert double.max() < (1e-11 if kind == "noise" else 1e-7)
    if kind == "noise":
        single = errors(build("irevnet_small", torch.float32, seed=seed), kind, mode, shape, seed=seed)
        note(f"relative error per sample, float32: {single.tolist()}")
        assert single.max() < 1e-2


@pytest.mark.parametrize("kind", ["constant", "low contrast", "unequal scale"])
@pytest.mark.parametrize("mode", ["calibrated", "train"])
def test_round_trip_of_b_on_hard_images(kind, mode):
    assert errors(build("irevnet_b", torch.float64), kind, mode, (8, 3, 64, 64)).max() < 1e-7


@pytest.fixture(scope="module")
def large():
    return build("irevnet_a", torch.float64)


@pytest.mark.slow
@settings(max_examples=12)
@given(case=batches.filter(lambda b: enough(*b)), mode=st.sampled_from(MODES), kind=st.sampled_from(sorted(KINDS)))
def test_round_trip_of_a(large, case, mode, kind):
    batch, size = case
    assert errors(large, kind, mode, (batch, 3, *size)).max() < (1e-11 if kind == "noise" else 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_round_trip_of_a_in_float32(mode):
    assert errors(build("irevnet_a", torch.float32), "noise", mode, (8, 3, 32, 32)).max() < 1e-2


@pytest.mark.slow
@settings(max_examples=12)
@given(batches.filter(lambda b: enough(*b)), st.sampled_from(MODES), st.sampled_from(sorted(KINDS)), st.integers(0, 99))
def test_round_trip_of_b_over_drawn_batches(case, mode, kind, seed):
    batch, size = case
    net = build("irevnet_b", torch.float64, seed=seed)
    assert errors(net, kind, mode, (batch, 3, *size), seed=seed).max() < (1e-11 if kind == "noise" else 1e-7)


# On a grid


def assert_exact(model, grid, kind, mode, shape, *, autocast):
    """:func:`epsilon` itself compares with ``snap(x)``, bit for bit."""
    each = epsilon(model, grid, kind, mode, autocast=autocast, shape=shape)
    assert each.max() == 0 if grid == "exact" else each.max() < 1e-4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("mode", "shape"), [("train", (1, 3, 64, 64)), ("calibrated", (3, 3, 32, 64))])
def test_b_comes_back_bit_for_bit(mode, shape, autocast):
    assert_exact("irevnet_b", "exact", "photographs", mode, shape, autocast=autocast)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model", ["irevnet_a", "irevnet_b"])
@pytest.mark.parametrize("grid", ["exact", "exact32"])
@pytest.mark.parametrize(
    ("kind", "mode", "shape"),
    [
        ("photographs", "train", (1, 3, 64, 64)),
        ("noise", "train", (4, 3, 32, 64)),
        ("noise", "calibrated", (1, 3, 96, 64)),
        ("photographs", "calibrated", (6, 3, 64, 64)),
        ("photographs", "eval", (2, 3, 32, 32)),
    ],
)
def test_full_size_networks_come_back_bit_for_bit(model, grid, kind, mode, shape, autocast):
    assert_exact(model, grid, kind, mode, shape, autocast=autocast)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model", ["irevnet_a", "irevnet_b"])
def test_full_size_gradients_have_the_bits_of_stored_activations(model, autocast):
    x = torch.rand(2, 3, 64, 64)
    found = {}
    for name, strategy in (("store", Store()), ("reconstruct", Reconstruct())):
        net = build(model, torch.float32)
        net.grid, net.backprop = "exact", strategy
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = net(x)
        logits.float().square().sum().backward()
        found[name] = [p.grad for p in net.parameters()]
    assert net.drift == 0
    assert all(torch.equal(a, b) for a, b in zip(found["store"], found["reconstruct"], strict=True))


def test_latents_and_the_head():
    net = build("irevnet_small", torch.float32).eval()
    x = torch.rand(2, 3, 32, 32)
    plain = net(x)
    net.grid = "exact32"
    assert net.grid == net.body.grid == Grid(16, torch.float32)
    net.grid = "exact"
    assert net(x).dtype == torch.float32
    torch.testing.assert_close(net(x), plain)
    latent = net.encode(x)
    assert torch.equal(net.inverse(latent), net.body.snap(x))
    net.train()
    with pytest.raises(EnvironmentMismatch, match="mode was eval, is train"):
        net.inverse(latent)
    with pytest.warns(UserWarning, match="mode was eval, is train"):
        net.inverse(latent, strict=False)
    with pytest.raises(ValueError, match="height and width must be divisible by 16"):
        net.encode(x[..., :8])
    assert list(net.state_dict()) == list(build("irevnet_small", torch.float32).state_dict())


@pytest.mark.parametrize("name", ["irevnet_small", "irevnet_b"])
def test_gradients_reach_every_parameter(name):
    net = zoo.create(name, num_classes=3)
    net(torch.rand(2, 3, 64, 64)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n.endswith("weight"))


REFUSALS = {
    "IRevNet: height and width must be divisible by 16, got a tensor of shape (1, 3, 40, 32).": lambda net: net(
        torch.zeros(1, 3, 40, 32)
    ),
    "IRevNet: expected images of shape (batch, 3, height, width), got a tensor of shape (1, 1, 32, 32).": lambda net: (
        net.features(torch.zeros(1, 1, 32, 32))
    ),
    "got a tensor of shape (3, 32, 32).": lambda net: net(torch.zeros(3, 32, 32)),
    "IRevNet: in training mode batch norm needs more than one value per channel in the last stage, "
    "got a tensor of shape (1, 3, 16, 16). Take a larger batch or image, or net.eval().": lambda net: net(
        torch.zeros(1, 3, 16, 16)
    ),
    "IRevNet: expected floating-point images, got dtype torch.uint8. Scale them: x / 255.": lambda net: net(
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    ),
    "IRevNet: expected a tensor of images, got an object of type tuple.": lambda net: net((torch.zeros(1),)),
    "IRevNet: logits have no inverse, got a tensor of shape (2, 5). The image comes back from net.features(x).": (
        lambda net: net.inverse(net(torch.zeros(2, 3, 32, 32)))
    ),
    "IRevNet: features have the shape (batch, 768, height, width), got a tensor of shape (1, 3, 32, 32).": lambda net: (
        net.inverse(torch.zeros(1, 3, 32, 32))
    ),
    "IRevNet: inverse expects the tensor of net.features(x), got tuple.": lambda net: net.inverse((1, 2)),
    "IRevNet: num_classes must be at least 0, got -1.": lambda net: zoo.create("irevnet_small", num_classes=-1),
    **{
        f"IRevNet: blocks must be numbers of at least 1, one for each stage, got {blocks!r}.": (
            lambda net, blocks=blocks: zoo.irevnet_small(blocks=blocks)
        )
        for blocks in ((0, 1), (-1, 2), (1, 0, 1), (1, 0), (), (1.5,), 3, "ab")
    },
    "IRevNet: num_classes must be an integer, got [5].": lambda net: zoo.create("irevnet_small", num_classes=[5]),
    "IRevNet: in_channels must be an integer, got '3'.": lambda net: zoo.create("irevnet_small", in_channels="3"),
    "IRevNet: height and width must not be 0, got a tensor of shape (1, 768, 0, 2).": lambda net: net.inverse(
        torch.zeros(1, 768, 0, 2)
    ),
    "IRevNet: expected images of the weights' dtype, torch.float32, got torch.float64.": lambda net: net(
        torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    ),
    "IRevNet: expected features of the weights' dtype, torch.float32, got torch.bfloat16.": lambda net: net.inverse(
        torch.zeros(1, 768, 2, 2, dtype=torch.bfloat16)
    ),
    "IRevNet: in_channels must be at least 1, got 0.": lambda net: zoo.create("irevnet_small", in_channels=0),
    "IRevNet: pooled features have no inverse, got a tensor of shape (2, 768). The image comes back from "
    "net.features(x).": lambda net: zoo.create("irevnet_small", num_classes=0).inverse(torch.zeros(2, 768)),
    "IRevNet: expected images of shape (batch, 1, height, width), got a tensor of shape (2, 3, 32, 32).": lambda net: (
        zoo.create("irevnet_small", in_channels=1)(torch.zeros(2, 3, 32, 32))
    ),
    "PadSplit(208, 192): out_channels must be at least in_channels, got 192 for 208.": (
        lambda net: zoo.irevnet_a(in_channels=13)
    ),
    "IRevNet: kernel_sizes must be three odd numbers, got (1, 2, 1).": lambda net: zoo.irevnet_b(
        kernel_sizes=(1, 2, 1)
    ),
    "IRevNet: kernel_sizes must be three odd numbers, got 3.": lambda net: zoo.irevnet_b(kernel_sizes=3),
    "IRevNet: kernel_sizes must be an integer, got 3.0.": lambda net: zoo.irevnet_b(kernel_sizes=(3.0, 3, 3)),
    "zoo.create: unknown model 'irevnet_c'; there are glow, iresnet, irevnet_a, irevnet_b": lambda net: zoo.create(
        "irevnet_c"
    ),
    "zoo.create: irevnet_b has no option 'classes'; it has num_classes, in_channels, kernel_sizes, dim": lambda net: (
        zoo.create("irevnet_b", classes=3)
    ),
    "zoo.register: the name 'irevnet_a' is taken.": lambda net: zoo.register(zoo.irevnet_a),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words):
    net = zoo.create("irevnet_small", num_classes=5)
    before = json.dumps({k: v.tolist() for k, v in net.state_dict().items() if "num_batches" in k})
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        REFUSALS[words](net)
    if "logits" not in words:  # that one runs the network to have logits
        assert before == json.dumps({k: v.tolist() for k, v in net.state_dict().items() if "num_batches" in k})


def test_no_invertible_arithmetic_lives_in_the_zoo():
    for path in Path(zoo.__file__).parent.glob("*.py"):
        assert "InvertibleModule[" not in path.read_text(encoding="utf-8"), path
        assert "(InvertibleModule" not in path.read_text(encoding="utf-8"), path
