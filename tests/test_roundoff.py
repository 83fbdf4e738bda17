"""Section 4.2: how far off the inverse is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from tests.zoo_networks import randomize
from zoo.analysis import draw_roundoff, noises, relative_inversion_errors
from zoo.analysis.__main__ import main
from zoo.errors import InputError
from zoo.inversion import relative_errors
from zoo.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("digits_once")

ROOT = Path(__file__).parents[1]


def network():
    """In train, with statistics and weights that are not those of initialisation."""
    net = randomize(zoo.create("irevnet_small", num_classes=2, blocks=(2, 1)), 0.3)
    net.features(torch.rand(16, 3, 8, 8))
    return net.requires_grad_(False)


def batches():
    return list(noises(6, size=8, batch=4))


def test_the_errors_are_those_of_features_and_inverse():
    net = network().eval()
    found = relative_inversion_errors(net, batches())
    expected = torch.cat([relative_errors(net.inverse(net.features(x)), x) for x in batches()])
    assert torch.allclose(torch.tensor(found.errors, dtype=torch.float64), expected, rtol=0, atol=0)
    assert found.summary.mean == pytest.approx(float(expected.mean()))
    assert found.stages == (0, 2)
    assert found.by_stage == [found.blocks[0], found.blocks[2]]
    assert found.blocks[0] == pytest.approx(found.summary.mean)  # unshuffling and splitting only move elements
    assert found.exact == 0


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_on_grids_all_comes_back_bit_for_bit_and_the_network_stays_as_it_is(mode):
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    exact = relative_inversion_errors(net, batches(), grid="exact", mode=mode)
    assert set(exact.errors) == set(exact.blocks) == {0.0}
    rounded = relative_inversion_errors(net, batches(), grid="exact32", mode=mode)
    assert exact.exact == rounded.exact == 6
    assert set(rounded.blocks) == {0.0}
    assert all(1e-7 < error < 1e-4 for error in rounded.errors)
    assert net.training
    assert net.grid is None
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_modes_are_different_maps():
    both = [relative_inversion_errors(network(), batches(), mode=mode).errors for mode in ("eval", "train")]
    assert both[0] != both[1]


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"grid must be one of exact, exact32, none and mode one of eval, train"):
        relative_inversion_errors(network(), batches(), grid="coarse")
    with pytest.raises(InputError, match="there is no image to invert"):
        relative_inversion_errors(network(), [])
    with pytest.raises(InputError, match=r"the activations reach .* in the inversion, and the grid ends at 256"):
        relative_inversion_errors(network(), [1e3 * torch.rand(2, 3, 8, 8)], grid="exact32")
    with pytest.raises(InputError, match="in training mode a batch of a single image this small has no statistics"):
        relative_inversion_errors(network(), [torch.rand(1, 3, 8, 8)], mode="train")
    with pytest.raises(InputError, match="in training mode this network has dropout, and no inverse"):
        relative_inversion_errors(zoo.create("irevnet_cifar"), [torch.rand(2, 3, 8, 8)], mode="train")


def test_the_command_compares_noise_and_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_pretrained(network(), tmp_path / "net")
    options = ["--checkpoint", str(checkpoint), "--output", "out", "--size", "8", "--grids", "none", "exact"]
    assert main(["roundoff", *options, "--noises", "4", "--images", "6", "--modes", "eval"]) == 0
    assert "6 of 6" in capsys.readouterr().out
    sets = json.loads((tmp_path / "out" / "roundoff.json").read_text())["sets"]
    assert [(each["images"], each["grid"], len(each["errors"])) for each in sets] == [
        ("noise", "none", 4),
        ("noise", "exact", 4),
        ("digits", "none", 6),
        ("digits", "exact", 6),
    ]
    assert sets[1]["summary"] == {"mean": 0, "median": 0, "maximum": 0}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"roundoff.{e}" for e in ("json", "png", "svg")}


@pytest.mark.slow
def test_the_checkpoint_of_a_training_run_is_analysed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, str(ROOT / "examples" / "imagenet_irevnet.py"), "--epochs", "1", "--workers", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", "run"], env=environment, check=True, capture_output=True, timeout=300)
    for name, options in (
        ("roundoff", ["--noises", "8", "--images", "8"]),
        ("spectrum", ["--images", "1", "--k", "8"]),
        ("dimensionality", ["--images", "300", "--components", "2", "8"]),
    ):  # all open it alike
        assert main([name, "--checkpoint", "run", "--output", "out", *options]) == 0, capsys.readouterr().err
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert (found["analysis"], found["model"], found["image_size"]) == (name, "irevnet_small", 32)
    assert main(["roundoff", "--checkpoint", "run", "--size", "30"]) == 2
    assert "error: irevnet_small needs a size that 16 divides, got 30" in capsys.readouterr().err


def test_a_picture_of_no_error_says_so():
    figure = draw_roundoff([relative_inversion_errors(network(), batches(), grid="exact", images="noise")])
    assert figure.get_suptitle() == "without any error: noise, grid exact, eval"
