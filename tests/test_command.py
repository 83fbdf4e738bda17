"""The main command as a person uses it: on a terminal and not, with wrong words, with Ctrl-C."""

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from zoo import examining
from zoo.configuring import prepared
from zoo.distributed import World
from zoo.recipes import RECIPES
from zoo.run import Run
from zoo.training import Trainer

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-W", "error", str(ROOT / "examples" / "imagenet_irevnet.py")]
QUICK = ["--batch-size", "256", "--workers", "0"]


def environment(**changes):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


@contextlib.contextmanager
def killed_if_failed(process):
    """Nothing outlives a test that fails: pytest would blame the next test for the open pipes."""
    with process:
        try:
            yield
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def run(*arguments, cwd, code=0):
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one short run in it."""
    folder = tmp_path_factory.mktemp("command")
    result = run("--epochs", 1, *QUICK, "--output", "runs/one", "--seed", 1, cwd=folder)
    return folder, result.stdout


def test_without_data_it_trains_on_the_digits_and_prints_one_table(trained):
    folder, out = trained
    lines = out.splitlines()
    assert lines[0] == "batch size 64 to 256: learning rate 0.1 to 0.4, by the linear rule"
    assert lines[1] == "the warm-up takes 10 steps, and the run has 5: the learning rate only rises"
    assert lines[2] == "irevnet_small on 1442 images, run kept in runs/one"
    assert re.fullmatch(r"epoch 1/1  loss \d\.\d{4}  validation \d\.\d{4}  top-1 +\d+\.\d\d%  \d+ images/s", lines[3])
    for name in (
        "top-1 accuracy",
        "top-5 accuracy",
        "validation loss",
        "training time",
        "training speed",
        "parameters",
        "peak of activations",
        "largest drift",
    ):
        assert out.count(f"│ {name}") == 1
    assert re.search(r"inversion error ε +│ 0 \(every pixel, bit for bit\)", out)
    assert "484,738" in out
    assert re.search(r"peak of activations │ \d+\.\d MiB \(reconstruct\)", out)
    assert re.search(r"largest drift +│ 0 ", out)
    assert len(list((folder / "runs/data/digits").rglob("*.png"))) == 1797


def test_evaluate_prints_the_same_figures_again(trained):
    folder, out = trained
    again = run("--resume", "runs/one", "--evaluate", cwd=folder).stdout
    figures = [line for line in out.splitlines() if line.startswith("│ ") and "training" not in line]
    assert [line for line in again.splitlines() if line.startswith("│ ") and "training" not in line] == figures


@pytest.mark.slow
def test_invert_runs_photographs_backwards(trained):
    folder, _ = trained
    for name, pixels in zip(("temple.png", "flower.jpg"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(folder / name)
    out = run("--resume", "runs/one", "--invert", "temple.png", "flower.jpg", cwd=folder).stdout
    assert re.search(r"^temple\.png: relative error 0\.0e\+00$", out, re.MULTILINE)
    assert "ε = 0 (every pixel, bit for bit)" in out
    out = run("--resume", "runs/one", "--grid", "none", "--invert", "temple.png", cwd=folder).stdout
    assert re.search(r"ε = \d\.\d\de-0[5678] \(median \d\.\d\de-0[5678], maximum \d\.\d\de-0[5678]\)", out)
    assert (folder / "runs/one/inverted.png").exists()
    shutil.copytree(folder / "runs/one", folder / "o[/x]")  # brackets are markup elsewhere
    assert "o[/x]/inverted.png" in run("--resume", "o[/x]", "--invert", *["flower.jpg"] * 30, cwd=folder).stdout
    out = run("--invert", "temple.png", "--model", "irevnet_b", "--size", 64, cwd=folder).stdout
    assert "irevnet_b with untrained weights" in out
    assert (folder / "runs/inverted/inverted.png").exists()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A tree of ImageNet's form, of two real photographs."""
    return photographs(tmp_path_factory.mktemp("photos"))


def photographs(root):
    for name, pixels in zip(["n01_temple", "n02_flower"], load_sample_images().images, strict=True):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(pixels[30 * i :]).save(root / split / name / f"{i}.JPEG")
    return root


@pytest.mark.slow
def test_an_imagenet_style_tree_takes_the_same_path(tmp_path):
    photographs(tmp_path / "data")
    options = [
        "--data",
        "data",
        "--model",
        "irevnet_small",
        "--size",
        64,
        "--epochs",
        2,
        "--batch-size",
        2,
        "--workers",
        1,
    ]
    out = run(*options, "--output", "runs/photos", cwd=tmp_path).stdout
    assert "irevnet_small on 6 images" in out
    config = json.loads((tmp_path / "runs/photos/config.json").read_text())
    assert config["recipe"]["name"] == "paper_irevnet_b"
    assert config["recipe"]["lr"] == pytest.approx(0.1 * 2 / 256)
    assert (config["recipe"]["size"], config["recipe"]["resize"]) == (64, 73)
    assert config["data"] == str(tmp_path / "data")  # so that it goes on from another folder
    assert " on 6 images" not in run("--resume", "photos", "--evaluate", cwd=tmp_path / "runs").stdout
    rows = [json.loads(line) for line in (tmp_path / "runs/photos/metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [(k, s) for s in (3, 6) for k in ("train", "validation")]


WRONG = [
    (["--data", "nowhere"], "error: no such folder: nowhere"),
    (["--data", "empty"], "error: no class folders in empty/train"),
    (["--data", "hollow"], "error: no images in hollow/train for the class cat"),
    (["--data", "strange"], "error: unknown class folder strange/val/dog: the training data has no class of this name"),
    (
        ["--data", "broken", "--batch-size", "1"],
        "error: cannot read the image broken/train/cat/a.png: not an image file",
    ),
    (["--recipe", "papers"], "error: unknown recipe 'papers'; there are paper_irevnet_a, paper_irevnet_b"),
    (["--budget", "20 GB"], "argument --budget: must be a number of bytes such as 20G, got 20 GB"),
    (["--budget", "1e400G"], "argument --budget: must be a number of bytes such as 20G, got 1e400G"),
    (["--workers", "1.5"], "argument --workers: must be a whole number from 0 to 1024, got 1.5"),
    (["--budget", "1"], "error: Budget: Sequential needs "),
    (["--accumulate", "3"], "error: the batch size 64 can't be shared equally by 1 processes in 3 pieces each"),
    (["--max-bad", "2"], "argument --max-bad: must be a number between 0 and 1, got 2"),
    (["--curves", "nothing"], "error: no run in nothing: metrics.jsonl is missing"),
    (["--curves", "nothing", "--epochs", "1"], "error: --curves has no use for --epochs; drop it"),
    (["--device", "cuda:99"], "error: no device 'cuda:99' here: "),
    (["--size", "40"], "error: irevnet_small needs a size that 16 divides, got 40"),
    (
        ["--model", "irevnet_c"],
        "error: zoo.create: unknown model 'irevnet_c'; there are glow, iresnet, irevnet_a, irevnet_b",
    ),
    (["--batch-size", "2000"], "error: the batch size 2000 is more than the 1442 training images"),
    (["--batch-size", "2000", "--dry-run"], "error: the batch size 2000 is more than the 1442 training images"),
    (["--resume", "nothing"], "error: no run in nothing: config.json is missing"),
    (["--resume", "photo.png"], "error: cannot read photo.png/config.json: Not a directory"),
    (["--output", "photo.png"], "error: cannot write to photo.png: "),
    (["--output", "x" * 300], "error: "),
    (
        ["--seed", str(2**64)],
        "argument --seed: must be a whole number from 0 on, below 2**63, got 18446744073709551616",
    ),
    (["--device", "meta"], "error: no device 'meta' here: "),
    (["--size", "16", "--batch-size", "1"], "error: irevnet_small needs a batch of two or more at size 16"),
    (["--invert", "photo.png", "--epochs", "1"], "error: --invert has no use for --epochs here; drop it"),
    (["--invert", "photo.png", "--evaluate"], "argument --evaluate: not allowed with argument --invert"),
    (["--evaluate"], "error: --evaluate needs a run: add --resume DIR"),
    (["--invert", "nothing.png"], "error: cannot read the image nothing.png: No such file or directory"),
    (["--invert", "broken/train/cat/a.png"], "error: cannot read the image broken/train/cat/a.png: not an image file"),
    (["--invert", "photo.png", "--size", "40"], "error: irevnet_small needs a size that 16 divides, got 40"),
    (["--invert", "photo.png", "--model", "revnet38"], "error: revnet38 has no inverse; --model takes an i-RevNet"),
    (["--invert", "photo.png", "--model", "irevnet_c"], "error: zoo.create: unknown model 'irevnet_c'"),
    (["--invert", "photo.png", "--device", "gpu"], "error: no device 'gpu' here: "),
    (
        ["--output", "taken", "--resume", "never"],
        "error: taken holds a run already; go on with it without --resume never, or choose another one",
    ),
    (
        ["--output", "left", "--resume", "never"],
        "error: left holds a run already; go on with it without --resume never",
    ),
    (
        ["--output", "taken", "--seed", "4", "--batch-size", "32"],
        "error: taken holds a run of another configuration "
        "(batch_size: 64, now 32; lr: 0.1, now 0.05; seed: 0, now 4); choose another --output, or add --allow-change",
    ),
    (
        ["--resume", "taken", "--lr", "1"],
        "error: --resume goes on with the run as it was configured; drop --lr, or add",
    ),
    (["--resume", "taken", "--recipe", "modern"], "error: --resume DIR has its own recipe; drop --recipe"),
    (["--resume", "taken", "--output", "x", "--allow-change"], "error: --resume DIR has its own output; drop --output"),
    (["--resume", "taken", "--evaluate"], "error: no checkpoint in taken: nothing to evaluate"),
    (["--resume", "two"], "error: two was trained by 2 processes, and now there is 1 process: the bits will be others"),
    (["--output", "other"], "error: cannot read other/config.json: "),
    (["--lr", "-1"], "argument --lr: must be a positive number, got -1"),
    (["--epochs", "0"], "argument --epochs: must be a whole number from 1 on, got 0"),
    (["--seed", "-1"], "argument --seed: must be a whole number from 0 on, below 2**63, got -1"),
]


@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mess")
    (folder / "empty/train").mkdir(parents=True)
    for tree, classes in [("hollow", []), ("strange", ["cat"]), ("broken", ["cat"])]:
        for split in ("train", "val"):
            (folder / tree / split / "cat").mkdir(parents=True)
            for name in classes:
                Image.new("RGB", (32, 32)).save(folder / tree / split / name / "a.png")
    (folder / "strange/val/dog").mkdir()
    (folder / "broken/train/cat/a.png").write_text("no image")
    for name, size in (("taken", 1), ("two", 2)):
        (folder / name).mkdir()
        Run(RECIPES["digits"], world_size=size).save(folder / name / "config.json")
    (folder / "left/checkpoints/step_000000005").mkdir(parents=True)  # a run's, whose configuration somebody removed
    (folder / "other").mkdir()
    (folder / "other/config.json").write_text("{}")
    Image.new("RGB", (32, 32)).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("imagenet_irevnet", COMMAND[-1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_input_is_one_clear_line_and_exit_code_2(mess, command, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(mess)
    threads = torch.get_num_threads()
    try:
        code = command(arguments)
    except SystemExit as refused:  # by argparse
        code = refused.code
    finally:
        torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    if words.startswith("error"):
        assert error.startswith(words)
        assert error.count("\n") == 1


def test_a_picture_that_cannot_be_written_costs_no_figures(trained, command, monkeypatch, capsys):
    """Somebody else's run can be evaluated: the table comes before the error."""

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(examining.plots, "reconstructions", refused)
    threads = torch.get_num_threads()
    try:
        assert command(["--resume", "runs/one", "--evaluate", "--workers", "0"]) == 2
    finally:
        torch.set_num_threads(threads)
    told = capsys.readouterr()
    assert "│ top-1 accuracy" in told.out
    assert told.err == "error: cannot write runs/one/reconstructions.png: Permission denied\n"


@pytest.mark.slow
def test_a_signal_during_the_report_ends_well(command, tmp_path, monkeypatch, capsys):
    """A scheduler's patience may end while the finished network is inverted."""
    inverted = Trainer.invert

    def interrupted(trainer):
        signal.raise_signal(signal.SIGUSR1)
        return inverted(trainer)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "invert", interrupted)
    threads = torch.get_num_threads()
    try:
        assert command(["--epochs", "1", *QUICK, "--output", "run"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "stopped after step 5 of 5; what was learnt is kept. Go on with:" in capsys.readouterr().err


def test_workers_are_as_many_as_the_scheduler_has_cores_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert prepared({"resume": "never"}, World())[0].workers == 2


def test_wrong_input_in_a_worker_process_leaves_no_traceback(mess):
    result = run("--data", "broken", "--batch-size", 1, "--workers", 2, cwd=mess, code=2)
    assert result.stderr == "error: cannot read the image broken/train/cat/a.png: not an image file\n"


@pytest.mark.slow
def test_a_run_that_ends_early_leaves_no_worker_behind(tmp_path):
    """They ignore the signal by which Python would end them, for it is the one that schedulers send."""
    options = ["--lr", 1e6, *QUICK[:2], "--epochs", 2, "--workers", 2, "--output", "run"]
    result = run(*options, "--max-skipped", 2, cwd=tmp_path, code=2)
    assert re.fullmatch(r"error: the loss was not finite in 2 [^\n]*; try a lower --lr\n", result.stderr)
    out = run(*options, "--max-skipped", 100, "--allow-change", cwd=tmp_path).stdout
    assert re.search(r"inversion error ε +│ the activations [^;]*│\n", out)
    assert re.search(r"steps skipped +│ \d, for a loss that was not finite", out)


@pytest.mark.slow
def test_the_same_command_goes_on_with_what_is_not_finished_and_then_begins_anew(tmp_path):
    options = ["--epochs", 2, *QUICK, "--lr", 0.1]
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        [*COMMAND, *map(str, options)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with killed_if_failed(process):
        assert any("epoch 1/2" in line for line in process.stdout)
        process.kill()
    out = run(*options, cwd=tmp_path).stdout
    assert "run kept in runs/digits-irevnet_small-seed0, going on after step 5 of 10" in out
    assert "epoch 2/2" in out
    (runs / "digits-irevnet_small-seed0" / "report.json").unlink()  # as if it had been stopped while it reported
    out = run(*options, cwd=tmp_path).stdout
    assert "run kept in runs/digits-irevnet_small-seed0, going on after step 10 of 10" in out
    assert json.loads((runs / "digits-irevnet_small-seed0" / "report.json").read_text())["top-1 accuracy"] in out
    again = run(*options, cwd=tmp_path).stdout
    assert "run kept in runs/digits-irevnet_small-seed0-2\n" in again
    first, second = (runs / f"digits-irevnet_small-seed0{n}" / "model.safetensors" for n in ("", "-2"))
    weights, others = load_file(first), load_file(second)
    assert all(torch.equal(t, others[key]) for key, t in weights.items())
    with_other = run("--output", first.parent, *options, "--epochs", 3, "--allow-change", cwd=tmp_path).stdout
    assert "going on after step 10 of 15" in with_other
    finished = run("--output", second.parent, *options, cwd=tmp_path).stdout
    assert "going on after step 10 of 10" in finished
    out = run("--curves", first.parent, second.parent, "--output", "both.png", cwd=tmp_path).stdout
    assert out == "both.png\n"
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.slow
def test_allowed_changes_are_made_to_the_run_as_it_is(tmp_path):
    run("--epochs", 1, *QUICK, "--lr", 0.1, "--output", "run", cwd=tmp_path)
    options = ["--resume", "run", "--batch-size", 128, "--epochs", 2, "--allow-change"]
    out = run(*options, "--dry-run", cwd=tmp_path).stdout
    assert "batch size 256 to 128: learning rate 0.1 to 0.05, by the linear rule\n" in out
    assert "recipe.lr = 0.05\n" in out
    assert "recipe.epochs = 2\n" in out
    error = run("--resume", "run", "--batch-size", 1024, "--allow-change", cwd=tmp_path, code=2).stderr
    assert error == "error: the run in run is at step 5, beyond the 1 of these options\n"


def test_what_is_not_asked_for_again_stays_where_changes_are_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = {"output": Path("run"), "lr": 0.05, "seed": 5, "batch_size": 256}
    run, folder = prepared(first, World())
    folder.mkdir()
    run.save(folder / "config.json")
    said = []
    again, _ = prepared({"output": Path("run"), "epochs": 2, "allow_change": True}, World(), said.append)
    assert again == replace(run, recipe=replace(run.recipe, epochs=2))
    assert said == ["going on with another configuration: epochs: 30, now 2"]
    other, _ = prepared({"output": Path("run"), "recipe": "modern", "allow_change": True}, World(), said.append)
    assert (other.recipe.name, other.seed) == ("modern", 0)


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path):
    out = run("--dry-run", "--batch-size", 128, "--recipe", "digits", "--budget", "100M", cwd=tmp_path).stdout
    lines = out.splitlines()
    assert lines[0] == "batch size 64 to 128: learning rate 0.1 to 0.2, by the linear rule"
    for line in ("seed = 0", "world_size = 1", "recipe.lr = 0.2", 'recipe.grid = "exact"', "parameters: 484,738"):
        assert line in lines
    assert "images: 1,442 for training, 355 for validation, 10 classes" in lines
    assert "steps: 330 of 128 images, 11 in an epoch" in lines
    perf = {
        name: float(size)
        for name, size in re.findall(r"^  (\w+): (\d+\.\d) MiB per image, largest batch", out, re.MULTILINE)
    }
    assert perf.keys() == {"store", "recompute", "reconstruct"}
    assert perf["store"] >= perf["recompute"] >= perf["reconstruct"] > 0
    assert re.search(r"^  budget of 0\.1 GiB: ", out, re.MULTILINE)
    assert not list((tmp_path / "runs").glob("digits-*"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "digits"])
def test_a_dry_run_of_each_imagenet_recipe(photos, recipe):
    out = run("--dry-run", "--data", photos, "--recipe", recipe, "--batch-size", 4, cwd=photos).stdout
    assert "largest batch per process that fits" in out
    assert f'recipe.name = "{recipe}"' in out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "digits"])
def test_each_imagenet_recipe_runs_on_small_images_with_a_small_network(photos, recipe):
    options = ["--data", photos, "--recipe", recipe, "--model", "irevnet_small", "--size", 64, "--batch-size", 2]
    out = run(*options, "--epochs", 1, "--workers", 1, "--output", f"runs/{recipe}", cwd=photos).stdout
    assert "epoch 1/1" in out
    assert re.search(r"inversion error ε +│ \S", out)


def test_help_reads_well(tmp_path):
    out = run("--help", cwd=tmp_path).stdout
    assert "Without arguments" in out
    assert max(map(len, out.splitlines())) <= 80
    for option in [
        "data",
        "model",
        "epochs",
        "batch-size",
        "lr",
        "size",
        "device",
        "seed",
        "workers",
        "output",
        "resume",
        "evaluate",
        "invert",
        "recipe",
        "dry-run",
        "curves",
        "parallel",
        "accumulate",
        "allow-change",
    ]:
        assert f"--{option}" in out


def lines_until(wanted, stream):
    """The lines of `stream` up to the first that holds `wanted`; all of them if none does."""
    for line in stream:
        yield line
        if wanted in line:
            return


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_learnt_and_says_how_to_go_on(tmp_path):
    options = ["--epochs", "2", *QUICK[:2], "--workers", "1", "--output", "runs/cut"]
    process = subprocess.Popen(
        [*COMMAND, *options],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with killed_if_failed(process):
        before = "".join(lines_until("epoch 1/2", process.stdout))
        assert "run kept in runs/cut" in before
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    command = shlex.join([sys.executable, COMMAND[-1], "--resume", "runs/cut"])
    assert f"what was learnt is kept. Go on with:\n  {command}\n" in err
    assert {"checkpoints", "metrics.jsonl"} <= {p.name for p in (tmp_path / "runs/cut").iterdir()}
    out = run("--resume", "runs/cut", cwd=tmp_path).stdout
    assert "epoch 2/2" in out
    assert "epoch 1/2" not in out


def watch(columns, cwd):
    """Runs the command on a pseudo-terminal and returns what it wrote there."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, "--epochs", "3", "--batch-size", "128", "--workers", "0"],
        cwd=cwd,
        env={**environment(TERM="xterm-256color"), "COLUMNS": str(columns)},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    written, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 1)[0]:
            try:
                written += os.read(leader, 65536)
            except OSError:
                break
    os.close(leader)
    assert process.wait(timeout=30) == 0
    return written.decode()


@pytest.mark.parametrize("columns", [pytest.param(100, marks=pytest.mark.slow), 30])
def test_a_terminal_shows_a_bar_that_fits(tmp_path, columns):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", watch(columns, tmp_path))
    bars = [line for line in re.split(r"[\r\n]+", text) if "━" in line and "epoch" in line]
    assert bars
    assert max(map(len, bars)) <= columns
    if columns == 100:
        assert any("loss" in b and "top-1" in b and "images/s" in b and re.search(r"\d:\d\d", b) for b in bars)
