"""The colour distortion against its definition, in double precision, pixel by pixel; mixing; what the network sees."""

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from zoo.augment import DRAWS, Preparation, inception_colour, mixture
from zoo.recipes import RECIPES

PAPER = RECIPES["paper_irevnet_b"]


def distorted(image, order, brightness, saturation, hue, contrast):
    """``distort_color`` of Gomez et al., for one image (height, width, 3) in float64, by Python's own colour space."""

    def each_pixel(change, image):
        return np.array([[change(*pixel) for pixel in row] for row in image])

    def with_saturation(r, g, b):
        h, s, v = to_hsv(r, g, b)
        return to_rgb(h, min(max(s * saturation, 0), 1), v)

    def with_hue(r, g, b):
        h, s, v = to_hsv(r, g, b)
        return to_rgb((h + hue) % 1, s, v)

    def with_contrast(image):
        mean = image.mean((0, 1), keepdims=True)
        return (image - mean) * contrast + mean

    steps = {
        "brightness": lambda x: x + brightness,
        "saturation": lambda x: each_pixel(with_saturation, x),
        "hue": lambda x: each_pixel(with_hue, x),
        "contrast": with_contrast,
    }
    orders = [["brightness", "saturation", "hue", "contrast"], ["brightness", "contrast", "saturation", "hue"]]
    for name in orders[order]:
        image = steps[name](image)
    return image.clip(0, 1)


def to_hsv(r, g, b):
    """As TensorFlow has it for values outside [0, 1]: no saturation where the largest value is not positive."""
    largest, smallest = max(r, g, b), min(r, g, b)
    if largest <= 0:
        return 0.0, 0.0, largest
    lift = min(smallest, 0)  # colorsys is right for any range, but for a division by zero
    h, _, _ = colorsys.rgb_to_hsv(r - lift, g - lift, b - lift)
    return h, (largest - smallest) / largest, largest


def to_rgb(h, s, v):
    """The textbook's hexagon, for a saturation above 1, too."""
    full = colorsys.hsv_to_rgb(h, 1, 1)
    return tuple(v * (1 - s + s * each) for each in full)


unit = st.floats(0, 1, exclude_max=True, width=32)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.lists(unit, min_size=DRAWS, max_size=DRAWS), st.sampled_from(["any", "grey", "few"]))
def test_the_colours_are_those_of_the_definition(seed, draws, kind):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (4, 3, 3)) / 255
    if kind == "grey":
        image[...] = image[..., :1]
    elif kind == "few":
        image = rng.integers(0, 2, image.shape).astype(float)  # ties between colours, and black
    order, brightness, saturation, hue, contrast = np.array(draws, dtype=np.float64)
    numbers = ((2 * brightness - 1) * 32 / 255, saturation + 0.5, (2 * hue - 1) * 0.2, contrast + 0.5)
    expected = distorted(image, int(order >= 0.5), *numbers)
    for dtype, error in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        x = torch.from_numpy(image).permute(2, 0, 1)[None].to(dtype)
        found = inception_colour(x, torch.tensor([draws], dtype=torch.float64))
        assert found.dtype == dtype
        assert np.abs(found[0].permute(1, 2, 0).double().numpy() - expected).max() < error


def test_each_image_has_numbers_of_its_own():
    images = torch.rand(6, 3, 5, 7)
    draws = torch.rand(6, DRAWS)
    together = inception_colour(images, draws)
    for i in range(6):
        assert torch.allclose(inception_colour(images[i : i + 1], draws[i : i + 1])[0], together[i], atol=1e-6)
    assert not torch.allclose(inception_colour(images, draws.flip(0)), together, atol=1e-3)


@pytest.mark.parametrize(("position", "low", "high"), [(1, -32 / 255, 32 / 255), (4, 0.5, 1.5)])
def test_brightness_and_contrast_have_their_ranges(position, low, high):
    """Read off from what is done to two grey pixels."""
    draws = torch.full((3, DRAWS), 0.5)
    draws[:, position] = torch.tensor([0.0, 0.5, 1.0])
    pair = torch.tensor([0.4, 0.6]).expand(3, 3, 1, 2)
    out = inception_colour(pair, draws)[:, 0, 0]
    found = out.mean(1) - 0.5 if position == 1 else (out[:, 1] - out[:, 0]) / 0.2
    assert torch.allclose(found, torch.tensor([low, (low + high) / 2, high]), atol=1e-5)


def test_what_the_network_sees():
    pixels = load_sample_images().images[0][:64, :64]
    images = torch.from_numpy(np.array(Image.fromarray(pixels))).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    draws = torch.rand(2, DRAWS)
    plain = images.float() / 255
    assert torch.equal(Preparation(RECIPES["digits"])(images, draws), plain)
    assert torch.equal(Preparation(PAPER)(images), plain)  # in the test nothing is distorted
    assert torch.allclose(Preparation(PAPER)(images, draws), inception_colour(plain, draws), atol=1e-6)
    released = Preparation(RECIPES["released_irevnet_b"])
    seen = released(images)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        assert torch.allclose(seen[:, c], (plain[:, c] - mean) / std, atol=1e-6)
    assert torch.allclose(released.restored(seen), plain, atol=1e-6)
    assert seen.is_contiguous()


def test_mixing_keeps_the_mass_and_follows_its_distribution():
    labels = torch.arange(8)
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    assert mixture(RECIPES["digits"], 8) is None
    torch.manual_seed(0)
    shares = {}
    for name, changes in {"mixup": {"mixup": 1.0, "cutmix": 0.0}, "cutmix": {"mixup": 0.0, "cutmix": 1.0}}.items():
        mix = mixture(dataclasses.replace(RECIPES["modern"], **changes), 8)
        shares[name] = []
        for _ in range(400):
            x, target = mix(images, labels)
            assert torch.allclose(target.sum(1), torch.ones(8))
            weights = target[torch.arange(8), labels]
            before = torch.roll(labels, 1)
            expected = weights * labels + (1 - weights) * before
            assert torch.allclose(x.mean((1, 2, 3)), expected, atol=1e-4)
            values = len(x[3, 0].unique())
            assert values == 1 if name == "mixup" else values <= 2
            shares[name].append(float(weights[0]))
    for quantile in (0.1, 0.5, 0.9):  # Beta(1, 1) is uniform
        assert abs(np.quantile(shares["mixup"], quantile) - quantile) < 0.08
    assert 0.6 < np.mean(shares["cutmix"]) < 0.85  # more than a half, for rectangles are cut off at the border
    assert min(shares["cutmix"]) < 0.3
    both = mixture(RECIPES["modern"], 8)
    kinds = {len(both(images, labels)[0][3, 0].unique()) for _ in range(60)}
    assert kinds >= {1, 2}
