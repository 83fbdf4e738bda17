"""Images: their order, their randomness, what is wrong with them, and the command that finds it."""

import colorsys
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from zoo.data import (
    ImageTree,
    Samples,
    StepSampler,
    batches_of,
    decode_image,
    evaluation_transform,
    images,
    loader,
    training_transform,
    verify,
)
from zoo.data.__main__ import main as command
from zoo.data.order import share
from zoo.digits import write_digits
from zoo.errors import InputError
from zoo.recipes import RECIPES

ROOT = Path(__file__).parents[1]
PAPER = RECIPES["paper_irevnet_b"]


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


# The order


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 3]),
    st.integers(0, 9),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_the_order_is_a_function_of_seed_and_step(length, piece, world, parts, seed, start, more):
    """Whatever the number of processes and of pieces: each takes its part of one order."""
    batch, stop = piece * world * parts, start + more
    if batch > length:
        with pytest.raises(InputError, match=f"the batch size {batch} is more than the {length} training images"):
            StepSampler(length, batch, seed=seed, start=0, stop=1)
        return
    whole = list(StepSampler(length, batch, seed=seed, start=0, stop=stop))
    assert len(whole) == stop
    assert list(StepSampler(length, batch, seed=seed, start=start, stop=stop)) == whole[start:]
    steps = length // batch
    for epoch in range(stop // steps):
        seen = [index for step in whole[epoch * steps : (epoch + 1) * steps] for _, index in step]
        assert len(set(seen)) == len(seen) == steps * batch  # nothing twice
        assert {e for step in whole[epoch * steps : (epoch + 1) * steps] for e, _ in step} == {epoch}
    samplers = [
        StepSampler(length, batch, seed=seed, start=start, stop=stop, rank=rank, world=world, parts=parts)
        for rank in range(world)
    ]
    shares = [list(sampler) for sampler in samplers]
    assert all(len(mine) == len(sampler) == more * parts for mine, sampler in zip(shares, samplers, strict=True))
    for step in range(more):
        pieces = [each for mine in shares for each in mine[step * parts : (step + 1) * parts]]
        assert all(len(each) == piece for each in pieces)
        assert [address for each in pieces for address in each] == whole[start + step]


def test_epochs_and_seeds_differ_in_order():
    first, second = (next(iter(StepSampler(50, 50, seed=0, start=k, stop=k + 1))) for k in (0, 1))
    assert [i for _, i in first] != [i for _, i in second]
    assert first != next(iter(StepSampler(50, 50, seed=1, start=0, stop=1)))


@pytest.mark.parametrize(("world", "parts", "words"), [(3, 1, "3 processes"), (2, 3, "2 processes in 3 pieces each")])
def test_a_batch_that_cannot_be_shared_is_refused(world, parts, words):
    with pytest.raises(InputError, match=f"the batch size 8 can't be shared equally by {words}"):
        StepSampler(100, 8, seed=0, start=0, stop=1, world=world, parts=parts)


@given(st.integers(0, 100), st.integers(1, 7))
def test_validation_is_shared_without_padding(length, world):
    shares = [list(share(length, rank, world)) for rank in range(world)]
    assert [i for each in shares for i in each] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Images and their randomness


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_an_item_depends_on_its_address_alone(recipe, photographs):
    def samples(seed=3):
        return Samples(ImageTree(photographs / "train"), training_transform(recipe), seed=seed)

    state = torch.get_rng_state()
    first = samples()[5, 2]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = samples()[5, 2]
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.draws, again.draws)
    assert first.image.dtype == torch.uint8
    assert first.image.shape == (3, recipe.size, recipe.size)
    for other in (samples()[6, 2], samples(seed=4)[5, 2]):
        assert not torch.equal(first.image, other.image)
        assert not torch.equal(first.draws, other.draws)


def test_workers_change_nothing(photographs):
    data = Samples(ImageTree(photographs / "train"), training_transform(PAPER))
    results = [
        list(loader(data, StepSampler(len(data), 3, seed=0, start=1, stop=5), workers=workers)) for workers in (0, 2)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.draws, b.draws)
        assert a.addresses == b.addresses


@contextmanager
def worker_command(folder, *words):
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "worker_command.py"), *words]
    process = subprocess.Popen(
        command, cwd=folder, env=surroundings, text=True, start_new_session=True, stdout=subprocess.PIPE
    )
    patience = threading.Timer(100, os.killpg, (process.pid, signal.SIGKILL))  # rather than hang
    patience.start()
    try:
        yield process
    finally:
        patience.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def runs(pid):
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_of_several_processes_are_not_forked_from_one_with_threads(tmp_path):
    """A lock that a thread holds would never be let go in them; and a scheduler's signal ends none of them."""
    with worker_command(tmp_path) as process:
        assert process.stdout.read() == "server works\n6 images\n"


def test_workers_end_when_the_main_process_is_killed(tmp_path):
    with worker_command(tmp_path, "killed") as process:
        *pids, word = process.stdout.readline().split()
        assert word == "reading"
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(map(runs, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_evaluation_sees_every_image_once_in_order(photographs):
    data = Samples(ImageTree(photographs / "val"), evaluation_transform(PAPER))
    batches = list(loader(data, batches_of(range(len(data)), 3), workers=0))
    assert [len(batch.images) for batch in batches] == [3, 3, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0] * 4 + [1] * 4
    assert torch.cat([batch.images for batch in batches]).shape == (8, 3, 224, 224)


def test_a_tree_is_that_of_torchvision(photographs, digits):
    for root in (photographs / "train", digits / "val"):
        ours, theirs = ImageTree(root), ImageFolder(root)
        assert ours.classes == theirs.classes
        assert [(ours.name(i), label) for i, label in enumerate(ours.labels)] == theirs.samples
    pixels = decode_image(ours.read(3), ours.name(3))
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(theirs[3][0]))


def test_evaluation_scales_the_shorter_side_and_crops_the_centre():
    recipe = dataclasses.replace(PAPER, size=32, resize=64)
    image = torch.from_numpy(load_sample_images().images[0].copy()).permute(2, 0, 1)  # 427 by 640
    scaled = v2.functional.resize(image, [64], antialias=True)
    assert scaled.shape == (3, 64, 95)
    found = evaluation_transform(recipe)(image)
    assert torch.equal(found, v2.functional.center_crop(scaled, [32, 32]))
    assert torch.equal(found, scaled[:, 16:48, 32:64])
    pillow = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((95, 64), Image.Resampling.BILINEAR))
    difference = scaled.permute(1, 2, 0).numpy().astype(int) - pillow.astype(int)
    assert np.abs(difference).max() <= 1  # as published figures are made


@pytest.mark.parametrize("flip", [False, True])
def test_training_flips_if_the_recipe_says_so(flip):
    recipe = dataclasses.replace(RECIPES["digits"], flip=flip, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    ramp = torch.arange(32, dtype=torch.uint8).expand(3, 32, 32)
    rising = [bool(training_transform(recipe)(ramp)[0, 0, 0] < 16) for _ in range(40)]
    assert all(rising) if not flip else 5 < sum(rising) < 35
    assert not RECIPES["digits"].flip
    assert PAPER.flip


def test_crops_have_the_recipes_areas_and_ratios():
    """Read off from what is left of a ramp in both directions."""
    side = 256
    ramp = torch.stack([torch.arange(side).expand(side, side), torch.arange(side)[:, None].expand(side, side)])
    image = torch.cat([ramp, ramp[:1]]).to(torch.uint8)
    transform = training_transform(dataclasses.replace(PAPER, flip=False, size=64))
    areas, ratios = [], []
    torch.manual_seed(0)
    for _ in range(600):
        out = transform(image).float()
        width, height = out[0, 0, -1] - out[0, 0, 0] + 1, out[1, -1, 0] - out[1, 0, 0] + 1
        areas.append(float(width * height) / side**2)
        ratios.append(float(width / height))
    assert 0.06 < min(areas) < 0.12
    assert max(areas) > 0.85
    assert abs(np.mean(areas) - 0.5) < 0.06  # uniform in [0.08, 1], but for those that do not fit
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    assert abs(np.median(np.log(ratios))) < 0.05


def only(recipe, **changes):
    """The random transform of a recipe without its crop and flip."""
    whole = {"flip": False, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "size": 32}
    return training_transform(dataclasses.replace(RECIPES[recipe], **whole, **changes))


def uniform(values, low, high):
    """Whether values may be drawn uniformly: nothing outside, and quantiles where they belong (n >= 500)."""
    shares = (np.array(values) - low) / (high - low)
    inside = -0.02 < shares.min() < 0.02 and 0.98 < shares.max() < 1.02
    return inside and all(abs(np.quantile(shares, q) - q) < 0.07 for q in (0.25, 0.5, 0.75))


def test_the_released_jitter_has_its_brightness_and_hue():
    """On a grey image contrast, saturation and hue do nothing; the hue of a dark colour is turned by hue alone."""
    transform, grey = only("released_irevnet_b"), torch.full((3, 32, 32), 120, dtype=torch.uint8)
    torch.manual_seed(0)
    assert uniform([transform(grey)[0, 0, 0].item() / 120 for _ in range(800)], 1 - 0.87, 1 + 0.87)
    red = torch.tensor([90, 30, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    colours = [transform(red)[:, 0, 0].double() / 255 for _ in range(1200)]
    turns = [(colorsys.rgb_to_hsv(*c.tolist())[0] + 0.5) % 1 - 0.5 for c in colours if c.max() > 0.3]
    assert len(turns) > 500
    assert uniform(turns, -0.2, 0.2)


def test_rectangles_are_erased_as_often_and_as_large_as_the_recipe_says():
    transform, white = only("modern", trivial_augment=False), torch.full((3, 32, 32), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    areas = [float((transform(white)[0] == 0).float().mean()) for _ in range(3000)]
    erased = [area for area in areas if area]
    assert 0.08 < len(erased) / len(areas) < 0.12
    assert 0.01 < min(erased) < 0.04
    assert 0.28 < max(erased) <= 0.34
    assert RECIPES["modern"].random_erase == 0.1


def test_trivial_augment_takes_one_of_many_ways():
    """One in fourteen is to leave the image alone; others leave it, too, at their weakest."""
    image = torch.from_numpy(load_sample_images().images[1][:32, :32].copy()).permute(2, 0, 1)
    transform = only("modern", random_erase=0.0)
    torch.manual_seed(0)
    out = [transform(image) for _ in range(400)]
    assert 1 / 14 - 0.03 < np.mean([torch.equal(each, image) for each in out]) < 0.3
    assert len({each.numpy().tobytes() for each in out}) > 100


# What is wrong with images


def photograph(mode="RGB", **options):
    """A real photograph as the content of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize((96, 64)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(params=["pillow", *(["torchcodec"] if images._fast is not None else [])])
def decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(images, "_fast", None)
    return request.param


def grey(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def test_every_kind_of_image_becomes_rgb(decoder):
    rgb = Image.open(io.BytesIO(photograph()))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    sixteen = Image.fromarray(grey(photograph()).astype(np.uint16) * 257)
    kinds = {
        "JPEG": photograph(),
        "CMYK": photograph("CMYK"),
        "grey": photograph("L"),
        "EXIF": photograph(exif=exif),
        "PNG": png(rgb),
        "palette": png(rgb.convert("P")),
        "transparent": png(rgb.convert("RGBA")),
        "16 bits": png(sixteen),
        "1 bit": png(rgb.convert("1")),
    }
    for kind, content in kinds.items():
        found = decode_image(content, f"{kind}.JPEG")
        assert found.dtype == torch.uint8
        assert found.shape == (3, 64, 96), kind  # not turned
        assert np.array_equal(found.permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))) or (
            kind == "16 bits" and np.array_equal(found[0], grey(photograph()))  # scaled, not clipped
        ), kind


BAD = {
    "truncated": photograph()[:900],
    "empty": b"",
    "text": b"no image",
    "cut png": png(Image.new("RGB", (64, 64)))[:60],
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_whole_image_is_one_line(decoder, kind):
    with pytest.raises(InputError, match=r"^cannot read the image some\.JPEG: \S") as caught:
        decode_image(BAD[kind], "some.JPEG")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [TypeError("a tag of no type"), OverflowError(), ZeroDivisionError("resolution")])
def test_whatever_a_reader_stumbles_over_is_one_line(monkeypatch, error):
    """Pillow's readers of TIFF, for one, raise these on flipped bits."""

    def stumble(_):
        raise error

    monkeypatch.setattr(images, "_rgb", stumble)
    with pytest.raises(InputError, match=rf"^cannot read the image a\.tif: ({error}|{type(error).__name__})$"):
        decode_image(png(Image.new("RGB", (8, 8))), "a.tif")


@pytest.fixture
def mess(photographs):
    """A tree with all that is wrong with real ones; five of its files are bad."""
    folder = photographs / "train" / "n01_temple"
    for kind, content in BAD.items():
        (folder / f"bad {kind}.JPEG").write_bytes(content)
    (folder / "bad link.JPEG").symlink_to(folder / "nothing")
    (folder / "a png.JPEG").write_bytes(png(Image.new("RGB", (40, 40))))
    (folder / "folder.JPEG").mkdir()
    (folder / "folder.JPEG" / "inside.JPEG").write_bytes(photograph("CMYK"))
    (folder / "notes.txt").write_text("not an image, nor named like one")
    return photographs


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_training_images_are_replaced_alike_wherever_they_are_read(mess, workers):
    source = ImageTree(mess / "train")
    assert len(source) == 15  # two times four photographs, five bad ones, and two odd ones
    data = Samples(source, training_transform(RECIPES["digits"]), seed=1, bad="replace")
    [batch] = loader(data, [[(3, i) for i in range(15)]], workers=workers)
    assert len(batch.images) == 15
    assert sorted({name for name, _ in batch.bad}) == sorted(
        source.name(i) for i in range(15) if "/bad " in source.name(i)
    )
    assert all("cannot read the image" in why for _, why in batch.bad)
    one = Samples(source, training_transform(RECIPES["digits"]), seed=1, bad="replace")
    for i in range(15):
        sample = one[3, i]
        assert torch.equal(sample.image, batch.images[i])
        assert sample.label == batch.labels[i]


def test_bad_images_are_refused_or_skipped_in_validation(mess):
    source = ImageTree(mess / "train")
    transform = evaluation_transform(RECIPES["digits"])
    for workers in (0, 1):
        with pytest.raises(InputError, match="cannot read the image"):
            list(loader(Samples(source, transform), batches_of(range(15), 4), workers=workers))
    batches = list(loader(Samples(source, transform, bad="skip"), batches_of(range(15), 4), workers=0))
    assert sum(len(batch.labels) for batch in batches) == 10
    assert sum(len(batch.bad) for batch in batches) == 5


def test_a_source_of_bad_images_alone_is_an_error(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_text("no image")
    data = Samples(ImageTree(tmp_path), training_transform(RECIPES["digits"]), bad="replace")
    with pytest.raises(InputError, match="not an image file"):
        data[0, 0]


def tree(root, classes, image=True):
    for name in classes:
        (root / name).mkdir(parents=True)
        if image:
            Image.new("RGB", (8, 8)).save(root / name / "a.png")
    return root


def test_what_is_wrong_with_a_tree_is_said(tmp_path):
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
            ImageTree(root, classes=classes)
        assert "\n" not in str(caught.value)
    assert ImageTree(good, classes=["dog", "cat"]).labels.tolist() == [0, 1]


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    good = tree(tmp_path / "good", ["cat", "dog/young"])
    (good / "dog" / "young" / "round").symlink_to("..")
    (good / "dog" / "itself").symlink_to(good / "dog")
    (good / "cat" / "also").symlink_to("../dog/young")
    names = [os.path.relpath(ImageTree(good).name(i), good) for i in range(len(ImageTree(good)))]
    assert names == ["cat/a.png", "cat/also/a.png", "dog/young/a.png"]


def test_links_between_two_folders_are_no_endless_circle(tmp_path):
    """Each leads elsewhere, and the two together back; with two more of them the start hung."""
    good = tree(tmp_path / "good", ["cat/in", "dog"])
    (good / "cat" / "in" / "a").symlink_to(good / "dog")
    (good / "dog" / "a").symlink_to(good / "cat")
    names = [os.path.relpath(ImageTree(good).name(i), good) for i in range(len(ImageTree(good)))]
    assert names == ["cat/in/a.png", "cat/in/a/a.png", "dog/a.png", "dog/a/in/a.png"]


# The command


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_writes_a_line_for_each_image(mess, tmp_path, workers, capsys):
    assert command(["verify", str(mess), "--workers", str(workers)]) == 1
    out = capsys.readouterr().out
    assert "23 images in 2 classes, 5 of them bad" in out
    assert out.count("cannot read the image") == 5
    rows = [json.loads(line) for line in (mess / "manifest.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 15 + ["val"] * 8
    for row in rows:
        assert ("error" in row) == ("/bad " in row["name"])
        if "error" not in row:
            content = Path(row["name"]).read_bytes()
            assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
            assert (row["width"], row["height"]) == Image.open(io.BytesIO(content)).size
            assert row["class"] in row["name"]
    source = ImageTree(mess / "val")
    assert verify({"val": source}, tmp_path / "new" / "m.jsonl") == (8, [])
    assert not list(mess.glob("*.tmp"))


def test_verify_says_what_is_wrong(tmp_path, capsys):
    assert command(["verify", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: no such folder: {tmp_path / 'none'}\n"


def test_a_palette_whose_colours_are_each_half_transparent_makes_no_noise():
    """Pillow would warn, once in every worker; where warnings are errors the image would be lost."""
    image = Image.fromarray(load_sample_images().images[0][:20, :30]).quantize(16)
    image.save(file := io.BytesIO(), "png", transparency=bytes(range(16)))
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode_image(file.getvalue(), "x.png"), expected)


def test_an_image_of_floating_point_numbers_is_refused():
    """Of no known range: cut off to bytes, most would be black."""
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(file, format="TIFF")
    with pytest.raises(InputError, match=r"cannot read the image a\.tiff: its values are floating-point numbers"):
        decode_image(file.getvalue(), "a.tiff")
