"""The example that fine-tunes: it runs, learns, leaves a frozen body alone, and takes both kinds of folder."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import zoo
from invertible import StreamRangeError
from zoo.pretrained import from_pretrained
from zoo.recipes import RECIPES
from zoo.run import Run

ROOT = Path(__file__).parents[1]
SHORT = ["--device", "cpu", "--pretrain-epochs", "1", "--epochs", "2", "--frozen-epochs", "1", "--images", "4"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("fine_tune", ROOT / "examples" / "fine_tune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_demonstration_and_then_images_of_ones_own(example, folder, capsys):
    assert example.main(SHORT) == 0
    out = capsys.readouterr().out
    assert "digits 0 to 4, 723 images to learn from: top-1 " in out
    assert "digits 5 to 9, 20 images to learn from:" in out
    found = [float(x) for x in re.findall(r"top-1 ([\d.]+) %", out)]
    assert len(found) == 3
    assert found[0] > 30  # of five classes, after one epoch
    net = from_pretrained(folder / "runs" / "fine_tune")
    assert net.num_classes == 5
    pretrained = from_pretrained(folder / "runs" / "fine_tune" / "pretrained")
    assert any(not torch.equal(a, b) for a, b in zip(net.body.parameters(), pretrained.body.parameters(), strict=True))
    # All epochs frozen: weights and statistics of the body stay, those of the head do not.
    own = [
        "--data",
        "runs/data/digits",
        "--weights",
        "runs/fine_tune/pretrained",
        "--output",
        "mine",
        "--device",
        "cpu",
    ]
    assert example.main([*own, "--epochs", "1", "--frozen-epochs", "1"]) == 0
    assert capsys.readouterr().out.endswith("saved in mine\n")
    before, after = load_file("runs/fine_tune/pretrained/model.safetensors"), load_file("mine/model.safetensors")
    assert {key for key in before if before[key].shape != after[key].shape} == {"head.4.weight", "head.4.bias"}
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith("body"), key


def test_what_a_user_gets_wrong(example, folder, capsys):
    (folder / "tree" / "train" / "a").mkdir(parents=True)
    for arguments, words in (
        (["--data", "nowhere"], "error: no such folder: nowhere"),
        (["--data", "tree"], "error: no images in tree/train for the class a"),
        (
            ["--device", "cpu", "--data", "runs/data/digits", "--weights", "none"],
            "error: zoo.from_pretrained: no such f",
        ),
        (["--device", "cpu", "--data", "runs/data/digits", "--model", "x"], "error: zoo.create: unknown model 'x'"),
    ):
        if "runs/data/digits" in arguments:
            example.open_data(None)
        assert example.main(arguments) == 2
        assert capsys.readouterr().err.startswith(words)
    with pytest.raises(example.InputError, match="Linear has no body to freeze; take an i-RevNet"):
        example.prepared(torch.nn.Linear(1, 1), None, torch.device("cpu"))


def test_arguments_that_make_no_sense(example, folder, capsys):
    for arguments, words in (
        (["--batch-size", "0"], "argument --batch-size: must be a whole number from 1 on, got 0"),
        (["--images", "0"], "argument --images: must be a whole number from 1 on, got 0"),
        (["--epochs", "-1"], "argument --epochs: must be a whole number from 1 on, got -1"),
        (["--frozen-epochs", "x"], "argument --frozen-epochs: must be a whole number from 0 on, below 2**63, got x"),
        (["--lr", "nan"], "argument --lr: must be a positive number, got nan"),
    ):
        with pytest.raises(SystemExit, match="2"):
            example.main(arguments)
        assert capsys.readouterr().err.splitlines()[-1].endswith(words)
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    assert "i-RevNet" in capsys.readouterr().out


def test_what_diverges_is_ended_in_one_line(example, folder, capsys, monkeypatch):
    error = StreamRangeError()
    error.peak, error.limit = 1e5, 8192
    for loss, words in (
        (lambda y, *_, **__: y.sum() * torch.nan, "error: the loss is nan at step 0; try a lower --lr\n"),
        (
            Mock(side_effect=error),
            "error: the activations reach 1e+05 at step 0, and the grid ends at 8192;",
        ),
    ):
        monkeypatch.setattr(example, "cross_entropy", loss)
        assert example.main(SHORT) == 2
        found = capsys.readouterr().err
        assert found.startswith(words)
        assert len(found.splitlines()) == 1
        assert "--grid" not in found


def test_the_network_of_a_run_is_taken_and_sees_what_it_was_trained_on(example, folder, monkeypatch):
    for name in ("data/train/a/0.png", "data/val/a/0.png"):
        (folder / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "run" / "checkpoints").mkdir(parents=True)
    net = zoo.create("irevnet_small", num_classes=2, blocks=(1,))
    recipe = replace(RECIPES["digits"], size=48, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    monkeypatch.setattr(example, "load_net", lambda path, device: (net, Run(recipe)))
    taken = Mock(side_effect=ValueError("seen"))
    monkeypatch.setattr(example, "train", taken)
    assert example.main(["--device", "cpu", "--data", "data", "--weights", "run"]) == 2
    assert taken.call_args.args[0] is net
    seen = taken.call_args.args[2]
    assert (seen.size, seen.mean, seen.std, seen.epochs, seen.batch_size) == (48, recipe.mean, recipe.std, 30, 1)


def test_control_c_is_one_line(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "demonstrate", Mock(side_effect=KeyboardInterrupt))
    assert example.main(SHORT) == 130
    assert capsys.readouterr().err == "stopped; the last network is not saved\n"
