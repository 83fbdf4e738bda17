"""All analyses by one command: what can't be made is left out, and what fails takes nothing else with it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zoo
from tests.test_curves import make_run
from tests.zoo_networks import randomize
from zoo.analysis import __main__ as command
from zoo.analysis.figures import show
from zoo.analysis.subject import add_beside
from zoo.errors import InputError, UnsuitedError
from zoo.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("digits_once")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(randomize(zoo.create("irevnet_small", num_classes=2, blocks=(1, 1))), "net")
    return "net"


def stand_in(name, error=None, *, beside=False):
    """An analysis that writes what it was given."""

    def add_arguments(parser):
        parser.add_argument("--count", type=int, default=5)
        if beside:
            add_beside(parser)

    def run(given, console):
        if error is not None:
            raise error
        given.output.mkdir(exist_ok=True)
        path = given.output / f"{name}.json"
        path.write_text(json.dumps({key: str(value) for key, value in vars(given).items()}))
        show(console, name, ["a"], [["1"]], [path])

    return SimpleNamespace(add_arguments=add_arguments, run=run), f"of {name} (Figure 9)"


def given_to(name):
    return json.loads(Path(f"out/{name}.json").read_text())


def test_each_is_given_its_defaults_and_what_all_share(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(command, "ANALYSES", {"one": stand_in("one"), "two": stand_in("two", beside=True)})
    options = ["--beside", checkpoint, "--output", "out", "--seed", "4", "--size", "8"]
    Path("out").mkdir()
    Path("out/one.old").write_text("")
    assert command.main(["all", "--checkpoint", checkpoint, *options]) == 0
    assert given_to("one").items() >= {"checkpoint": "net", "count": "5", "seed": "4", "size": "8"}.items()
    assert "beside" not in given_to("one")
    assert given_to("two")["beside"] == str([Path("net")])
    table = capsys.readouterr().out
    assert re.search(r"one +│ of one \(Figure 9\) +│ one\.json +│", table)
    assert re.search(r"two +│ of two \(Figure 9\) +│ two\.json +│", table)


def test_what_fails_or_is_unsuited_takes_nothing_with_it(checkpoint, monkeypatch, capsys):
    kinds = {
        "a": InputError("no luck"),
        "b": UnsuitedError("net has no inverse"),
        "c": ZeroDivisionError("bug"),
        "d": None,
    }
    monkeypatch.setattr(command, "ANALYSES", {name: stand_in(name, error) for name, error in kinds.items()})
    assert command.main(["all", "--checkpoint", checkpoint, "--output", "out"]) == 2
    out, err = capsys.readouterr()
    assert "b is skipped: net has no inverse" in out
    assert "error: a: no luck\n" in err
    assert "error: c: bug\n" in err
    assert "Traceback" in err
    assert err.endswith("error: a, c failed; see above\n")
    assert given_to("d")


def test_skipping_alone_is_no_failure(checkpoint, monkeypatch):
    monkeypatch.setattr(command, "ANALYSES", {"b": stand_in("b", UnsuitedError("net has no inverse"))})
    assert command.main(["all", "--checkpoint", checkpoint, "--output", "out"]) == 0


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (KeyboardInterrupt(), "stopped; a written to out\n"),
        (KeyboardInterrupt("more is kept"), "stopped; a written to out; more is kept\n"),
    ],
)
def test_stopped_it_says_what_is_there(checkpoint, monkeypatch, capsys, stop, said):
    analyses = {"a": stand_in("a"), "b": stand_in("b", stop), "c": stand_in("c")}
    monkeypatch.setattr(command, "ANALYSES", analyses)
    assert command.main(["all", "--checkpoint", checkpoint, "--output", "out"]) == 130
    assert capsys.readouterr().err == said
    assert not Path("out/c.json").exists()


def test_what_can_not_be_opened_is_said_once(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(command, "ANALYSES", {"a": stand_in("a")})
    for wrong, message in (
        (["--checkpoint", "nothing"], "no such checkpoint: nothing"),
        (["--checkpoint", checkpoint, "--beside", checkpoint, "gone"], "no such checkpoint: gone"),
        (["--checkpoint", checkpoint, "--data", "nowhere"], "no such folder: nowhere"),
        (
            ["--checkpoint", checkpoint, "--output", "net/config.json"],
            "cannot write to net/config.json: Not a directory",
        ),
        (["--checkpoint", checkpoint, "--output", "/proc/out"], "cannot write to /proc/out: No such file or directory"),
    ):
        assert command.main(["all", *wrong]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_the_recipe_decides_how_many_threads_compute(checkpoint, monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(command, "ANALYSES", {"a": stand_in("a")})
    make_run(Path("run"), threads=3)
    make_run(Path("free"), threads=None)
    for name in ("run", "free", checkpoint, "nothing"):
        command.main(["a", "--checkpoint", name, "--output", "out"])
    assert counts == [3, 1, 1, 1]


@pytest.mark.slow
def test_a_run_of_the_digits_is_analysed_by_all(tmp_path, capsys, monkeypatch):
    """Every analysis that there is, with its defaults, of a run and of a network beside it that has no inverse."""
    monkeypatch.chdir(tmp_path)
    save_pretrained(zoo.create("irevnet_small", num_classes=10, blocks=(1, 1)), "net")
    save_pretrained(zoo.create("resnet_small", num_classes=10), "other")
    assert command.main(["all", "--checkpoint", "net", "--beside", "other", "--output", "out", "--size", "8"]) == 0
    out = capsys.readouterr().out
    assert "curves is skipped: net holds weights and no training run" in out
    for name in command.ANALYSES:
        assert Path(f"out/{name}.json").exists() == (name != "curves"), name
    assert command.main(["all", "--checkpoint", "other", "--output", "second", "--size", "8"]) == 0
    out = capsys.readouterr().out
    assert "spectrum is skipped: resnet_small has no inverse" in out
