"""What the analyses got wrong when somebody tried to break them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import zoo
from tests.zoo_networks import randomize
from zoo.analysis import draw_roundoff, interpolate, open_subject, relative_inversion_errors, singular_values
from zoo.analysis.__main__ import main
from zoo.analysis.figures import keep
from zoo.analysis.study import Kept
from zoo.analysis.subject import threads_for
from zoo.errors import InputError
from zoo.pretrained import save_pretrained
from zoo.recipes import RECIPES


def network(blocks=(2, 2)):
    net = randomize(zoo.create("irevnet_small", num_classes=2, blocks=blocks), 0.3)
    net.features(torch.rand(16, 3, 8, 8))
    return net


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        Path("data", place).mkdir(parents=True)
        Image.effect_noise((9, 9), 50).save(Path("data", place, "1.png"))
    return str(save_pretrained(network((1, 1)), tmp_path / "net"))


def run(capsys, name, checkpoint, *options):
    """The exit code, and what was said."""
    code = main([name, "--checkpoint", checkpoint, "--output", "out", "--size", "8", "--data", "data", *options])
    return code, "".join(capsys.readouterr())


def numbers(name):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(Path(f"out/{name}.json").read_text(), parse_constant=refuse)


def black(folder):
    """Two images of zeros, each the only one of its class."""
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (folder / place).mkdir(parents=True)
        Image.new("L", (9, 9)).save(folder / place / "1.png")
    return str(folder)


@pytest.mark.slow
def test_a_network_with_dropout_is_inverted_in_eval_alone(small, capsys):
    save_pretrained(zoo.create("irevnet_cifar", num_classes=2), "dropped")
    options = ["--noises", "1", "--images", "1", "--grids", "none", "--size", "4"]
    code, said = run(capsys, "roundoff", "dropped", *options)
    assert code == 0
    assert "irevnet_cifar has dropout, and so no inverse in training mode: eval only" in said
    assert {each["mode"] for each in numbers("roundoff")["sets"]} == {"eval"}
    code, said = run(capsys, "roundoff", "dropped", *options, "--modes", "train")
    assert (code, said) == (2, "error: in training mode this network has dropout, and no inverse\n")


def test_more_smallest_values_than_there_are_values_are_refused(small, capsys):
    code, said = run(capsys, "spectrum", small, "--k", "5", "--smallest", "193")
    assert (code, said) == (2, "error: smallest must be in 1 ... 192, the dimension of the image, got 193\n")
    with pytest.raises(InputError, match=r"smallest must be in 1 ... 192, .* got -1"):
        singular_values(network(), torch.rand(1, 3, 8, 8), k=5, smallest=-1)


def test_one_step_alone_has_no_distances(small, capsys):
    code, _ = run(capsys, "interpolation", small, "--pair", "0", "1", "--steps", "0.5", "--gif")
    assert code == 0
    [found] = numbers("interpolation")["pairs"]
    assert found["distances"] == []
    assert Path("out/interpolation-1.gif").exists()


@pytest.mark.parametrize("step", ["nan", "inf", "1e300"])
def test_steps_beyond_all_numbers_are_refused(small, capsys, step):
    code, said = run(capsys, "interpolation", small, "--pair", "0", "1", "--steps", step)
    assert code == 2
    assert said == f"error: the images at the steps {float(step):g} are not finite\n"
    assert not Path("out").exists()


def test_no_advice_is_given_that_the_command_has_no_option_for():
    net = network((1, 1))
    net.grid = "exact"
    with pytest.raises(InputError, match=r"the grid ends at 8192; steps nearer to 0 ... 1 may stay on it"):
        interpolate(net, torch.rand(3, 8, 8), torch.rand(3, 8, 8), [1e9])


def test_seeds_that_no_generator_takes_are_refused(small, capsys):
    with pytest.raises(SystemExit):
        run(capsys, "roundoff", small, "--seed", str(2**64))
    assert "must be a whole number from 0 on, below 2**63, got 18446744073709551616" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(small):
    net = network((1, 1))
    with torch.no_grad():
        net.head[-1].bias[0] = math.nan
    save_pretrained(net, "diverged")
    with pytest.raises(InputError, match=r"the weights in diverged are not finite, head\.4\.bias for one"):
        open_subject("diverged")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_precision_are_converted(small, capsys, dtype):
    save_pretrained(network((1, 1)).to(dtype), "other")
    assert run(capsys, "interpolation", "other", "--pair", "0", "1", "--count", "2")[0] == 0


def test_images_of_zeros_have_no_relative_error_and_are_drawn_as_none(small, capsys, tmp_path):
    save_pretrained(network(), "deep")
    data = black(tmp_path / "black")
    code, said = run(capsys, "roundoff", "deep", "--data", data, "--noises", "2", "--grids", "none", "--modes", "eval")
    assert code == 0
    assert "inf" in said
    assert numbers("roundoff")["sets"][1]["summary"]["mean"] is None


def test_errors_without_a_logarithm_are_not_drawn():
    net = network()
    found = relative_inversion_errors(net, [torch.zeros(2, 3, 8, 8), torch.rand(2, 3, 8, 8)])
    assert math.inf in found.errors
    assert len(draw_roundoff([found]).axes[0].patches) == 1


@pytest.mark.parametrize("name", ["spectrum", "interpolation", "roundoff"])
def test_an_output_that_can_not_be_written_is_refused_at_once(small, capsys, name, monkeypatch):
    monkeypatch.setattr("zoo.analysis.subject.load_net", None)
    monkeypatch.setattr("zoo.analysis.subject.from_pretrained", None)
    for output, why in (("net/config.json", "Not a directory"), ("/proc/out", "No such file or directory")):
        assert main([name, "--checkpoint", small, "--output", output]) == 2
        assert capsys.readouterr().err == f"error: cannot write to {output}: {why}\n"


def test_what_stops_in_the_middle_of_a_picture_leaves_no_half_of_it(tmp_path, monkeypatch):
    figure = Figure()
    for path in keep(tmp_path, "x", figure, {"a": 1}):
        path.write_text("of before")
    real = Figure.savefig

    def stopped(self, to, *arguments, **options):
        real(self, to, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", stopped)
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, "x", figure, {"a": 2})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"x.{ending}": "of before" for ending in ("json", "png", "svg")
    }


def test_two_processes_that_write_the_same_results_do_not_hinder_each_other(tmp_path, monkeypatch):
    """Each writes while the other is about to rename what it has written."""
    features = SimpleNamespace(key="k")
    real, seen = Path.replace, []

    def replaced(self, target):
        seen.append(self)
        if len(seen) == 1:
            Kept(features, features, {"analysis": "a"}, tmp_path).get("x", lambda: {"n": 1})
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    assert Kept(features, features, {"analysis": "a"}, tmp_path).get("x", lambda: {"n": 1}) == {"n": 1}
    assert len(seen) == len(set(seen)) == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_images_of_one_class_are_paired_with_others_and_not_with_themselves(small, capsys):
    data = Path("one")
    for place in ("train/a", "val/a"):
        (data / place).mkdir(parents=True)
        for name in "12":
            Image.effect_noise((9, 9), 50).save(data / place / f"{name}.png")
    assert run(capsys, "interpolation", small, "--data", "one", "--count", "2", "--pairs", "1")[0] == 0
    assert len(set(numbers("interpolation")["pairs"][0]["images"])) == 2
    said = "error: a pair needs two images, got 1 twice\n"
    assert run(capsys, "interpolation", small, "--pair", "1", "1") == (2, said)


def test_what_does_not_fit_into_the_memory_is_one_line(small, capsys):
    code, said = run(capsys, "roundoff", small, "--size", "8000000", "--noises", "1")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("error: the memory does not suffice: ")
    code, said = run(capsys, "all", small, "--size", "8000000")
    assert code == 2
    assert "Traceback" not in said
    assert "error: roundoff: the memory does not suffice: " in said


def test_pretrained_weights_compute_on_the_threads_of_their_recipe(small):
    assert threads_for(Path(small)) == RECIPES["digits"].threads == 1
    assert threads_for(Path("nowhere")) is None
