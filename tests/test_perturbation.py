"""Noise in features and at blocks, and the partial inverse from a block."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from tests.zoo_networks import randomize
from zoo.analysis import block_names, draw_perturbation, features_at, inverse_from, perturb
from zoo.analysis.__main__ import main
from zoo.errors import InputError
from zoo.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("digits_once")


def network(grid=None):
    """In train, with statistics and weights that are not those of initialisation."""
    net = randomize(zoo.create("irevnet_small", num_classes=2, blocks=(2, 1)), 0.3)
    net.features(torch.rand(16, 3, 8, 8))
    net.grid = grid
    return net.requires_grad_(False)


def unet():
    return randomize(zoo.create("iunet", num_classes=2, channels=8, blocks=(1, 1)), 0.3).requires_grad_(False)


@pytest.mark.parametrize("make", [network, unet])
def test_images_come_back_from_every_block_bit_for_bit_on_the_grid(make):
    net, x = make(), torch.randint(0, 256, (2, 3, 8, 8)) / 255
    net.grid = "exact"
    for name, _ in net.trace(x):
        value = features_at(net, x, name)
        assert torch.equal(inverse_from(net, value, name), x.double())
        assert torch.equal(inverse_from(net, value, f"body.{name}"), x.double())
    assert net.training
    assert net.grid is not None


def test_the_values_are_those_of_trace():
    net, x = network().eval(), torch.rand(2, 3, 8, 8)
    found = list(net.trace(x))
    assert [name for name, _ in found] == block_names(net)
    for name, value in found:
        same = features_at(net, x, name)
        for own, traced in zip(*((v if isinstance(v, tuple) else (v,)) for v in (same, value)), strict=True):
            assert torch.equal(own, traced)
    assert torch.equal(features_at(net, x, block_names(net)[-1]), net.features(x))


@pytest.mark.parametrize("block", [None, "2", "4"])
def test_the_noise_has_the_size_that_was_asked_for_at_the_block(block):
    net, x = network(), torch.rand(3, 3, 8, 8)
    found = perturb(net, x, [1e-3, 0.5], block=block)
    plain, name = copy.deepcopy(net).double(), block or "5"

    def values(images):
        value = features_at(plain, images, name)
        return value if isinstance(value, torch.Tensor) else torch.cat([part.flatten(1) for part in value], 1)

    for size, images, errors in zip(found.noise, found.images, found.errors, strict=True):
        own = values(x.double())
        moved = (values(images) - own).flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1)
        assert torch.allclose(moved, torch.full((3,), size).double(), rtol=1e-6)
        expected = (images - x.double()).flatten(1).norm(dim=1) / x.double().flatten(1).norm(dim=1)
        assert torch.allclose(errors, expected)
    assert torch.equal(found.amplification, found.errors / torch.tensor([[1e-3], [0.5]], dtype=torch.float64))
    assert found.block == block


def test_small_noise_grows_by_the_frobenius_norm_of_the_inverse():
    net, x = network(), torch.rand(1, 3, 8, 8)
    found = perturb(net, x.expand(256, -1, -1, -1), [1e-6])
    plain = copy.deepcopy(net).eval().double()
    features = plain.features(x.double())
    matrix = torch.autograd.functional.jacobian(plain.inverse, features).reshape(192, 192)
    expected = matrix.square().sum() / 192 * features.square().sum() / x.double().square().sum()
    squares = found.amplification[0].square()
    assert abs(float(squares.mean() - expected)) < 4 * float(squares.std()) / 16
    assert float(squares.std() / squares.mean()) > 0.01  # the images have directions of their own


def test_the_same_seed_gives_the_same_noise_and_round_off_does_not_count():
    net, x = network("exact32"), torch.rand(2, 3, 8, 8)
    both = [perturb(net, x, [1e-9], seed=seed).errors for seed in (0, 0, 1)]
    assert torch.equal(both[0], both[1])
    assert not torch.equal(both[0], both[2])
    assert float(both[0].max()) < 1e-7
    assert net.training
    assert net.grid is not None


def test_wrong_names_and_sizes_are_refused():
    net, x = network(), torch.rand(2, 3, 8, 8)
    for call in (features_at, inverse_from):
        with pytest.raises(InputError, match=r"no block is named 6; the names are 0, 1, 2, 3, 4, 5$"):
            call(net, x, "6")
    with pytest.raises(InputError, match=r"no block is named 2.function; the names are 0, 1, 2, 3, 4, 5"):
        perturb(net, x, block="2.function")
    for size in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match=f"the noise must have a positive size, got {size:g}"):
            perturb(net, x, [0.1, size])
    with pytest.raises(InputError, match="a perturbation needs one size of the noise at least"):
        perturb(net, x, [])
    with pytest.raises(InputError, match="an image whose pixels or values are all 0 has no relative error"):
        perturb(net, torch.stack([x[0], torch.zeros(3, 8, 8)]))
    with pytest.raises(ValueError, match="IRevNet: height and width must be divisible by 8"):
        features_at(net, torch.rand(1, 3, 8, 4), "2")


def test_the_picture_has_a_column_for_each_size():
    net, x = network(), torch.rand(2, 3, 8, 8)
    figure = draw_perturbation(perturb(net, x, [1e-1, 1e-3, 1e200]), x)
    assert len(figure.axes) == 2 * 4 + 1
    assert figure.axes[-1].get_xlabel() == "noise, relative to the features"


def test_the_command_adds_noise_at_a_block(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_pretrained(network(), tmp_path / "net")
    options = ["perturbation", "--checkpoint", str(checkpoint), "--output", "out", "--size", "8", "--images", "2"]
    assert main([*options, "--noise", "1e-3", "1", "--block", "3"]) == 0
    assert "noise in the values at 3 of 2 images" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "perturbation.json").read_text())
    assert (found["block"], found["noise"], len(found["errors"][0])) == ("3", [1e-3, 1], 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"perturbation.{e}" for e in ("json", "png", "svg")}
    assert main([*options, "--block", "body.9"]) == 2
    assert capsys.readouterr().err == "error: no block is named body.9; the names are 0, 1, 2, 3, 4, 5\n"
    for wrong in ("0", "-1", "nan"):
        with pytest.raises(SystemExit, match="2"):
            main([*options, "--noise", wrong])
        assert f"argument --noise: must be a positive number, got {wrong}" in capsys.readouterr().err


def test_black_images_are_left_out(tmp_path, capsys):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / place).mkdir(parents=True)
        pixels = np.full((8, 8), 200 if place == "val/b" else 0, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / place / "1.png")
    checkpoint = save_pretrained(network(), tmp_path / "net")
    options = ["perturbation", "--checkpoint", str(checkpoint), "--data", str(tmp_path / "data"), "--size", "8"]
    assert main([*options, "--output", str(tmp_path / "out"), "--noise", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 images are black and left out" in said
    assert "noise in the features of 1 images" in said
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "data" / "val" / "b" / "1.png")
    assert main([*options, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: a perturbation needs an image that is not black\n"
