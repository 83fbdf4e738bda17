"""Glow and RealNVP: scales, classes, whole numbers, and what training keeps; ``test_zoo_flows.py`` has every flow."""

import copy
import re

import pytest
import torch

import zoo
from invertible import PixelUnshuffle, Reconstruct, Store
from invertible.testing import measure_memory
from tests.zoo_networks import randomize
from zoo.digits import split_digits
from zoo.flows import bits_per_dimension, samples

SMALL = {"glow": {"steps": 1, "width": 4}, "realnvp": {"blocks": 1, "width": 4}}
both = pytest.mark.parametrize("name", SMALL)


def small(name, **options):
    torch.manual_seed(0)
    return zoo.create(name, **{"shape": (1, 8, 8), "levels": 2, "values": 17, **SMALL[name], **options})


@both
@pytest.mark.parametrize("channels", [1, 3])
def test_latent_values_are_nested_by_scales(name, channels):
    flow = small(name, shape=(channels, 16, 8), levels=3).eval()
    x = torch.randint(17, (2, channels, 16, 8)).float()
    (deepest, second), first = flow.transform(x)
    assert sum(z[0].numel() for z in (deepest, second, first)) == x[0].numel()
    for part, shape in ((first, (8, 4)), (second, (4, 2))):
        assert part.shape[2:] == shape
        assert part[0].numel() * 2 ** (1 + (part is second)) == x[0].numel()
    assert torch.equal(flow.transform.inverse(((deepest, second), first)), x)
    assert isinstance(small(name, levels=1).transform(torch.zeros(1, 1, 8, 8)), torch.Tensor)


@both
def test_wrong_options_are_refused_in_one_line(name):
    depth = "steps" if name == "glow" else "blocks"
    rule = "shape must be channels, height and width, each at least 1"
    for options, words in (
        ({"shape": (1, 6, 8), "levels": 2}, "height and width must be divisible by 2^levels, 4, got shape=(1, 6, 8)."),
        ({"levels": 4}, "height and width must be divisible by 2^levels, 16, got shape=(1, 8, 8)."),
        ({"levels": 10**12}, "height and width must be divisible by 2^levels, got shape=(1, 8, 8)."),
        ({"shape": (8, 8)}, f"{rule}, got (8, 8)."),
        ({"shape": (0, 8, 8)}, f"{rule}, got (0, 8, 8)."),
        ({depth: 0}, f"{depth} must be at least 1, got 0."),
        ({"width": 0}, "width must be at least 1, got 0."),
        ({"values": 1}, "values must be at least 2, got 1."),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: {words}')}$"):
            small(name, **options)
    for options in ({"shape": 8}, {"shape": (1, 8.0, 8)}, {"levels": "2"}):
        with pytest.raises(TypeError, match=f"^{name}: "):
            small(name, **options)


@both
def test_images_of_another_shape_or_other_numbers_are_refused(name):
    flow = small(name).eval()
    for x in (
        torch.zeros(2, 1, 7, 8),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 1, 16, 16),
        torch.full((1, 1, 8, 8), 17.0),
    ):
        with pytest.raises(ValueError, match=", got "):
            flow(value=x)


@both
def test_probabilities_of_whole_numbers_sum_to_no_more_than_one(name):
    """Of all 16 black and white images of four pixels; what the density puts outside of the cube is lost."""
    flow = randomize(small(name, shape=(1, 2, 2), levels=1, values=2), 0.05).double().eval()
    images = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 4).reshape(16, 1, 2, 2)
    with torch.no_grad():
        found = flow(value=images.repeat(1000, 1, 1, 1)).reshape(1000, 16).exp().mean(0)
    assert 0.001 < float(found.sum()) < 1.01


@both
def test_a_class_changes_the_density(name):
    """Dark images of one class and bright ones of another: afterwards the flow can tell them apart."""
    flow = small(name, num_classes=2, levels=1, shape=(1, 2, 2), values=16)
    labels = torch.arange(2).repeat(32)
    images = (torch.randint(4, (64, 1, 2, 2)) + 10 * labels.reshape(-1, 1, 1, 1)).float()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    flow.transform.backprop = Reconstruct()
    for _ in range(30):
        optimizer.zero_grad()
        (-flow(labels, value=images).mean()).backward()
        optimizer.step()
    flow.eval()
    with torch.no_grad():
        right, wrong = flow(labels, value=images), flow(1 - labels, value=images)
    assert float((right > wrong).float().mean()) > 0.95
    drawn = samples(flow, 40, condition=torch.arange(2).repeat(20)).mean((1, 2, 3))
    assert float(drawn[1::2].mean() - drawn[::2].mean()) > 5
    assert flow(torch.tensor([0, 1])).sample((3,)).shape == (3, 2, 1, 2, 2)
    with pytest.raises(TypeError, match="the function needs a condition, got None"):
        flow(value=images)


def test_realnvp_sees_images_through_a_logit():
    x = torch.randint(17, (2, 1, 8, 8)).float()
    seen = torch.sigmoid(small("realnvp").transform[:4](x))
    assert torch.equal(((seen - 0.05) / 0.9 * 17).floor(), x)


def test_realnvp_begins_as_a_choice_of_pixels():
    """Couplings begin as the identity, and their halves end where they were."""
    net = small("realnvp").eval().transform
    seen = net[:4](torch.randint(17, (2, 1, 8, 8)).float())
    for found, expected in zip(net[4:](seen), PixelUnshuffle(2, order="checkerboard")(seen).chunk(2, 1), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_temperature_scales_latent_values():
    flow = randomize(small("glow"), 0.02).eval()
    torch.manual_seed(3)
    hot = samples(flow, 5)
    torch.manual_seed(3)
    assert torch.equal(flow().sample((5,)), hot)
    cold = samples(flow, 5, temperature=0)
    assert torch.equal(cold, cold[:1].expand(5, -1, -1, -1))
    for temperature in (-1, float("nan"), float("inf")):
        words = f"samples: temperature must be 0 or a positive number, got {temperature}."
        with pytest.raises(ValueError, match=re.escape(words)):
            samples(flow, 1, temperature=temperature)
    with pytest.raises(ValueError, match=re.escape("samples: count must be at least 0, got -1.")):
        samples(flow, -1)
    for count, temperature in ((1.5, 1), (1, "1")):
        with pytest.raises(TypeError, match=r"^samples: "):
            samples(flow, count, temperature=temperature)
    with pytest.raises(ValueError, match=re.escape("samples: expected a condition for each of 2 samples, got 3.")):
        samples(flow, 2, condition=(torch.zeros(3, 1), torch.zeros(3, 1)))


def test_bits_per_dimension():
    assert float(bits_per_dimension(torch.tensor(-48 * 8 * 0.6931471805599453), (3, 4, 4))) == pytest.approx(8)


def glow_for_digits(steps, strategy):
    flow = small("glow", steps=steps, width=16)
    flow.transform.backprop = strategy
    return flow


def test_what_training_keeps_does_not_grow_with_depth():
    training, _ = split_digits()
    found = {}
    for strategy in (Store(), Reconstruct()):
        for steps in (1, 3):
            flow = glow_for_digits(steps, strategy)
            x = training.images[:16]
            flow(value=x)  # the statistics of the first batch, and what torch allocates once
            found[type(strategy), steps] = measure_memory(lambda flow=flow, x=x: flow(value=x))[1].kept
    assert found[Reconstruct, 3] == found[Reconstruct, 1]
    assert found[Store, 3] > 2 * found[Store, 1]


def test_the_likelihood_curve_is_that_of_stored_activations():
    training, _ = split_digits()
    first = glow_for_digits(2, Store())
    curves = []
    for strategy in (Store(), Reconstruct()):
        flow = copy.deepcopy(first)
        flow.transform.backprop = strategy
        optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
        torch.manual_seed(1)
        curves.append([])
        for step in range(12):
            loss = bits_per_dimension(flow(value=training.images[64 * step : 64 * (step + 1)]), (1, 8, 8)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    stored, reconstructed = map(torch.tensor, curves)
    assert float((stored - reconstructed).abs().max()) < 1e-4
    assert float(stored[-1]) < float(stored[0]) - 0.2
