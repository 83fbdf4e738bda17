"""Trees of images: their order, their randomness, and what is wrong with them."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torchvision.transforms import v2

from zoo.data import ImageTree, StepSampler, evaluation_transform, load_image, loader, training_transform
from zoo.digits import write_digits
from zoo.errors import InputError
from zoo.evaluation import image_batches
from zoo.recipes import RECIPES


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def photographs(tmp_path):
    """A tree like ImageNet's, of two real photographs as JPEG, in two classes."""
    for name, pixels in zip(["n01_temple", "n02_flower"], load_sample_images().images, strict=True):
        for split in ("train", "val"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(pixels[i * 20 :, i * 10 :]).save(folder / f"{name}_{i}.JPEG")
    return tmp_path


def test_the_digits_are_a_fixed_stratified_split_of_all(digits):
    images, labels = load_digits(return_X_y=True)
    counts = {
        split: [len(list((digits / split / str(k)).glob("*.png"))) for k in range(10)] for split in ("train", "val")
    }
    assert sum(counts["train"]) == 1442
    assert sum(counts["val"]) == 355
    assert [a + b for a, b in zip(counts["train"], counts["val"], strict=True)] == np.bincount(labels).tolist()
    assert all(abs(b / (a + b) - 0.2) < 0.01 for a, b in zip(counts["train"], counts["val"], strict=True))
    paths = sorted(digits.glob("*/*/*.png"), key=lambda p: int(p.stem))
    assert [int(p.stem) for p in paths] == list(range(1797))
    for number in (0, 17, 1796):
        pixels = np.asarray(Image.open(paths[number]), dtype=float)
        assert np.array_equal(np.round(pixels * 16 / 255), images[number].reshape(8, 8))
        assert paths[number].parent.name == str(labels[number])


def test_a_broken_tree_is_completed(digits):
    path = digits / "train" / "0" / "0000.png"
    before = path.read_bytes()
    path.unlink()
    write_digits(digits)
    assert path.read_bytes() == before
    assert not list(digits.rglob("*.tmp"))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.integers(0, 30), st.integers(0, 30))
def test_the_order_is_a_function_of_seed_and_step(length, batch, seed, start, more):
    if batch > length:
        with pytest.raises(InputError, match=f"the batch size {batch} is more than the {length} training images"):
            StepSampler(length, batch, seed=seed, start=0, stop=1)
        return
    stop = start + more
    whole = list(StepSampler(length, batch, seed=seed, start=0, stop=stop))
    assert len(whole) == stop
    assert list(StepSampler(length, batch, seed=seed, start=start, stop=stop)) == whole[start:]
    assert len(StepSampler(length, batch, seed=seed, start=start, stop=stop)) == more
    steps = length // batch
    for epoch in range(stop // steps):
        seen = [index for step in whole[epoch * steps : (epoch + 1) * steps] for _, index in step]
        assert len(set(seen)) == len(seen) == steps * batch  # nothing twice
        assert {e for step in whole[epoch * steps : (epoch + 1) * steps] for e, _ in step} == {epoch}


def test_epochs_and_seeds_differ_in_order():
    first, second = (next(iter(StepSampler(50, 50, seed=0, start=k, stop=k + 1))) for k in (0, 1))
    assert [i for _, i in first] != [i for _, i in second]
    assert first != next(iter(StepSampler(50, 50, seed=1, start=0, stop=1)))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_an_item_depends_on_its_address_alone(recipe, photographs):
    data = ImageTree(photographs / "train", training_transform(recipe), seed=3)
    state = torch.get_rng_state()
    first = data[5, 2]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = ImageTree(photographs / "train", training_transform(recipe), seed=3)[5, 2]
    assert torch.equal(first[0], again[0])
    assert first[0].dtype == torch.uint8
    assert first[0].shape == (3, recipe.size, recipe.size)
    assert not torch.equal(first[0], data[6, 2][0])
    assert not torch.equal(first[0], ImageTree(photographs / "train", training_transform(recipe), seed=4)[5, 2][0])


def test_workers_change_nothing(photographs):
    recipe = RECIPES["imagenet"]
    data = ImageTree(photographs / "train", training_transform(recipe))
    results = [
        list(loader(data, StepSampler(len(data), 3, seed=0, start=1, stop=5), workers=workers)) for workers in (0, 2)
    ]
    for (a, la), (b, lb) in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


def test_evaluation_sees_every_image_once_in_order(photographs):
    data = ImageTree(photographs / "val", evaluation_transform(RECIPES["imagenet"]))
    batches = list(image_batches(data, batch_size=3, workers=0, device=torch.device("cpu")))
    assert [len(images) for images, _ in batches] == [3, 3, 2]
    images, labels = torch.cat([b for b, _ in batches]), torch.cat([lab for _, lab in batches])
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert images.shape == (8, 3, 224, 224)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


def tree(root, classes, image=True):
    for name in classes:
        (root / name).mkdir(parents=True)
        if image:
            Image.new("RGB", (8, 8)).save(root / name / "a.png")
    return root


def test_what_is_wrong_with_a_tree_is_said(tmp_path):
    transform = evaluation_transform(RECIPES["digits"])
    good = tree(tmp_path / "good", ["cat", "dog"])
    for root, classes, words in [
        (tmp_path / "none", None, f"no such folder: {tmp_path / 'none'}"),
        (good / "cat" / "a.png", None, "no such folder"),
        (tree(tmp_path / "flat", [""]), None, "no class folders in"),
        (tree(tmp_path / "empty", ["n01.cat", "n02.dog"], image=False), None, "for the class n01.cat"),
        (good, ["cat"], f"unknown class folder {good / 'dog'}: the training data has no class of this name"),
        (good, ["cat", "dog", "emu"], f"no folder for class 'emu' in {good}"),
    ]:
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            ImageTree(root, transform, classes=classes)
        assert "\n" not in str(caught.value)
    assert ImageTree(good, transform, classes=["cat", "dog"]).classes == ["cat", "dog"]


def write_bad(path, kind):
    Image.fromarray(load_sample_images().images[0]).save(path, format="JPEG")
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image"}[kind])


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line(tmp_path, kind, workers):
    path = tree(tmp_path, ["cat"]) / "cat" / "b.JPEG"
    write_bad(path, kind)
    data = ImageTree(tmp_path, evaluation_transform(RECIPES["digits"]))
    with pytest.raises(InputError, match=re.escape(f"cannot read the image {path}: ")) as caught:
        list(loader(data, [[(0, 0), (0, 1)]], workers=workers))
    assert "\n" not in str(caught.value)


def test_images_of_every_mode_become_rgb(tmp_path):
    rgb = Image.fromarray(load_sample_images().images[0]).resize((16, 16))
    for mode, suffix in [("L", "png"), ("CMYK", "jpeg"), ("P", "png"), ("RGBA", "png"), ("I;16", "png"), ("1", "png")]:
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        grey = np.asarray(rgb.convert("L"))
        (Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else rgb.convert(mode)).save(path)
        image = load_image(path)
        assert image.mode == "RGB"
        if mode in {"L", "I;16"}:
            assert np.array_equal(np.asarray(image)[..., 0], grey)  # scaled, not clipped
        elif mode != "1":
            assert np.abs(np.asarray(image).astype(int) - np.asarray(rgb)).mean() < 40
    with pytest.raises(InputError, match=r"cannot read the image .*nothing\.png: No such file or directory"):
        load_image(tmp_path / "nothing.png")


def test_evaluation_scales_the_shorter_side_and_crops_the_centre():
    recipe = dataclasses.replace(RECIPES["imagenet"], size=32, resize=64)
    image = Image.fromarray(load_sample_images().images[0])  # 427 by 640
    scaled = v2.functional.resize(image, [64])
    width, height = scaled.size
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    expected = np.asarray(scaled.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(evaluation_transform(recipe)(image).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("flip", [False, True])
def test_training_flips_if_the_recipe_says_so(flip):
    recipe = dataclasses.replace(RECIPES["digits"], flip=flip, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    rising = [bool(training_transform(recipe)(ramp)[0, 0, 0] < 16) for _ in range(40)]
    assert all(rising) if not flip else 5 < sum(rising) < 35
    assert not RECIPES["digits"].flip
    assert RECIPES["imagenet"].flip
