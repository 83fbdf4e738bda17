"""The example of Glow on the digits: it trains, and writes all that it says; what a user gets wrong is one line."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributions import Normal

import zoo
from zoo.flows import samples
from zoo.pretrained import from_pretrained

ROOT = Path(__file__).parents[1]
SHORT = ["--epochs", "2", "--levels", "1", "--steps", "1", "--width", "8", "--batch-size", "256"]
PICTURES = ("samples.png", "interpolation.png", "arithmetic.png", "likelihood.png")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("glow_digits", ROOT / "examples" / "glow_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["reconstruct", "store"])
def test_a_short_run_writes_everything(example, tmp_path, capsys, strategy):
    assert example.main([*SHORT, "--strategy", strategy, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("1442 digits, 355 held out; ")
    assert out[-1] == f"written to {tmp_path / 'run'}"
    assert sum(line.startswith("epoch ") for line in out) == 2
    for name in PICTURES:
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.size[0] > 300
    numbers = json.loads((tmp_path / "run" / "numbers.json").read_text(encoding="utf-8"))
    bits = numbers["bits_per_dimension"]
    assert 1 < bits["held_out"] < 6
    assert f"held out {bits['held_out']:.3f}" in out[-2]
    assert numbers["epochs"][-1]["training"] < numbers["epochs"][0]["training"]
    assert (numbers["drift"] is None) == (strategy == "store")
    flow = from_pretrained(tmp_path / "run" / "model").eval()
    assert zoo.config_of(flow).options["values"] == 17
    drawn = samples(flow, 4)
    assert drawn.shape == (4, 1, 8, 8)
    assert bool(((drawn >= 0) & (drawn <= 16)).all())


def test_what_a_user_gets_wrong(example, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    for arguments, words in (
        (["--levels", "4"], "error: glow: height and width must be divisible by 2^levels, 16, got shape=(1, 8, 8)."),
        (["--output", str(tmp_path / "file")], f"error: cannot write to {tmp_path / 'file'}: File exists"),
    ):
        assert example.main(["--output", str(tmp_path / "out"), *arguments]) == 2
        assert capsys.readouterr().err == words + "\n"
    for arguments, words in (
        (["--epochs", "0"], "argument --epochs: must be a whole number from 1 on, got 0"),
        (["--lr", "-1"], "argument --lr: must be a positive number, got -1"),
        (["--strategy", "none"], "argument --strategy: invalid choice: 'none'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            example.main(arguments)
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_what_diverges_and_what_is_interrupted_ends_in_one_line(example, tmp_path, capsys, monkeypatch):
    arguments = [*SHORT, "--output", str(tmp_path)]

    def infinite(*_):
        return Normal(torch.zeros(1), torch.ones(1), validate_args=True).log_prob(torch.tensor([torch.nan]))

    def interrupted(*_):
        raise KeyboardInterrupt

    for loss, code, words in (
        (lambda *_: torch.full((2,), torch.nan), 2, "error: the likelihood is nan at step 0; try a lower --lr\n"),
        (infinite, 2, "error: the latent values are not finite at step 0; try a lower --lr\n"),
        (interrupted, 130, f"interrupted; nothing was saved in {tmp_path}\n"),
    ):
        monkeypatch.setattr(example, "bits_per_dimension", loss)
        assert example.main(arguments) == code
        assert capsys.readouterr().err == words


def test_a_file_that_cannot_be_written_is_named(example, tmp_path, capsys, monkeypatch):
    def fails(*_):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder").write_text("")

    monkeypatch.setattr(example, "train", fails)
    assert example.main([*SHORT, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'folder'}: Is a directory\n"


def test_latent_values_are_combined_and_averaged(example):
    a = (torch.ones(2, 3), torch.tensor([[1.0], [3.0]]))
    b = (torch.zeros(2, 3), torch.ones(2, 1))
    total = example.combined((2, a), (-1, b))
    assert torch.equal(total[0], torch.full((2, 3), 2.0))
    assert torch.equal(total[1], torch.tensor([[1.0], [5.0]]))
    assert torch.equal(example.mean_of(a)[1], torch.tensor([[2.0]]))
