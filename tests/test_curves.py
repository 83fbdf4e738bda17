"""Figure 3: the courses of runs, as numbers and as a picture."""

import dataclasses
import json
from pathlib import Path

import pytest

import zoo
from zoo.analysis import course_of, courses_of, draw_curves
from zoo.analysis.__main__ import main
from zoo.errors import InputError
from zoo.pretrained import save_pretrained
from zoo.recipes import RECIPES
from zoo.run import Run


def rows(steps=300, every=10, **more):
    """A loss that falls by 1 with each row, and an evaluation after every fifth of them."""
    for i in range(1, steps // every + 1):
        yield {"kind": "train", "step": every * i, "loss": 100.0 - i, "top1": float(i)}
        if i % 5 == 0:
            yield {"kind": "validation", "step": every * i, "loss": 1.0 / i, "top1": 2.0 * i, **more}


def make_run(folder, content=None, **recipe):
    """What a training run leaves of itself."""
    folder.mkdir(parents=True)
    Run(dataclasses.replace(RECIPES["digits"], **recipe), seed=3).save(folder / "config.json")
    text = "".join(json.dumps(row) + "\n" for row in rows()) if content is None else content
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_the_loss_is_the_mean_over_the_last_hundred_steps():
    found = course_of(list(rows()))
    expected = [sum(100 - j for j in range(max(i - 9, 1), i + 1)) / min(i, 10) for i in range(1, 31)]
    assert found.loss == pytest.approx(expected)
    assert found.steps == tuple(range(10, 301, 10))
    assert course_of(list(rows()), window=10).loss == tuple(100.0 - i for i in range(1, 31))
    assert found.validation_steps == (50, 100, 150, 200, 250, 300)
    assert found.validation_loss == tuple(1 / i for i in range(5, 31, 5))
    assert not found.averaged


def test_of_averaged_weights_it_is_their_evaluation():
    found = course_of(list(rows(ema_loss=None, ema_top1=7.0)))
    assert found.averaged
    assert set(found.validation_top1) == {7.0}
    labels = [line.get_label() for line in draw_curves({"a": found}).axes[1].lines]
    assert labels == ["training", "validation, averaged weights"]


def test_an_average_that_begins_later_is_shown_from_there_on():
    some = list(rows())
    for row in some[len(some) // 2 :]:
        if row["kind"] == "validation":
            row |= {"ema_loss": 0.5, "ema_top1": 99.0}
    found = course_of(some)
    assert found.averaged
    assert found.validation_top1 == (10.0, 20.0, 30.0, 99.0, 99.0, 99.0)
    assert found.validation_loss == (1 / 5, 1 / 10, 1 / 15, 0.5, 0.5, 0.5)


def test_a_row_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="a line is no row of a training run: 'loss'"):
        course_of([{"kind": "train", "step": 1}])
    make_run(tmp_path / "run", '{"kind": "train"}\n')
    with pytest.raises(InputError, match=r"cannot draw the run in .*run: a line is no row of a training run"):
        courses_of([tmp_path / "run"])


def test_runs_are_told_apart_by_what_their_paths_do_not_share(tmp_path):
    a, b, c = (make_run(tmp_path / name) for name in ("x/a", "x/b", "x/a/c"))
    assert list(courses_of([a])) == ["a"]
    assert list(courses_of([a, b, a])) == ["a", "b"]
    assert list(courses_of([a, c])) == ["a", "a/c"]


def test_runs_are_told_apart_without_colours():
    axes = draw_curves({name: course_of(list(rows())) for name in "abc"}).axes[0]
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 6
    assert axes.get_xlabel()
    assert axes.get_ylabel() == "cross entropy (nats)"


def test_the_command_needs_runs_and_no_network(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, other = make_run(Path("runs/one")), make_run(Path("runs/two"), model="resnet_small", name="mine")
    options = ["curves", "--checkpoint", str(run), "--output", "out"]
    assert main([*options, "--beside", str(other)]) == 0
    assert "resnet_small" in capsys.readouterr().out
    found = json.loads(Path("out/curves.json").read_text())["runs"]
    assert [(each["name"], each["model"], each["recipe"], each["seed"]) for each in found] == [
        ("one", "irevnet_small", "digits", 3),
        ("two", "resnet_small", "mine", 3),
    ]
    assert found[0]["loss"][-1] == pytest.approx(74.5)
    assert {path.name for path in Path("out").iterdir()} == {f"curves.{e}" for e in ("json", "png", "svg")}
    (run / "weights").write_bytes(b"")
    assert main(["curves", "--checkpoint", str(run / "weights"), "--output", "out"]) == 0
    save_pretrained(zoo.create("irevnet_small", num_classes=2, blocks=(1, 1)), "net")
    make_run(Path("empty"), "")
    capsys.readouterr()
    for checkpoint, message in (
        ("net", "net holds weights and no training run, so that it has no curves"),
        ("net/model.safetensors", "net/model.safetensors holds weights and no training run, so that it has no curves"),
        ("nothing", "no such checkpoint: nothing"),
        ("empty", "no step of the run empty is in its log yet"),
        ("out", "no run in out: metrics.jsonl is missing"),
    ):
        assert main(["curves", "--checkpoint", checkpoint, "--output", "out"]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
