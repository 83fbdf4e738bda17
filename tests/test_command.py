"""The main command as a person uses it: on a terminal and not, with wrong words, with Ctrl-C."""

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
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-W", "error", str(ROOT / "examples" / "imagenet_irevnet.py")]
QUICK = ["--batch-size", "256", "--workers", "0"]


def environment(**changes):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


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
    assert lines[0] == "irevnet_small on 1442 images, run kept in runs/one"
    assert re.fullmatch(r"epoch 1/1  loss \d\.\d{4}  validation \d\.\d{4}  top-1  ?\d+\.\d\d%  \d+ images/s", lines[1])
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


def test_an_imagenet_style_tree_takes_the_same_path(tmp_path):
    for name, pixels in zip(["n01_temple", "n02_flower"], load_sample_images().images, strict=True):
        for split in ("train", "val"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(pixels[30 * i :]).save(tmp_path / "data" / split / name / f"{i}.JPEG")
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
    assert config["recipe"]["name"] == "imagenet"
    assert (config["recipe"]["size"], config["recipe"]["resize"]) == (64, 73)
    assert config["data"] == str(tmp_path / "data")  # so that it goes on from another folder
    assert " on 6 images" not in run("--resume", "photos", "--evaluate", cwd=tmp_path / "runs").stdout
    assert [json.loads(r)["step"] for r in (tmp_path / "runs/photos/metrics.jsonl").read_text().splitlines()] == [3, 6]


WRONG = [
    (["--data", "nowhere"], "error: no such folder: nowhere"),
    (["--data", "empty"], "error: no class folders in empty/train"),
    (["--data", "hollow"], "error: no images in hollow/train for the class cat"),
    (["--data", "strange"], "error: unknown class folder strange/val/dog: the training data has no class of this name"),
    (
        ["--data", "broken", "--batch-size", "1"],
        "error: cannot read the image broken/train/cat/a.png: not an image file",
    ),
    (["--device", "cuda:99"], "error: no device 'cuda:99' here: "),
    (["--size", "40"], "error: irevnet_small needs a size that 16 divides, got 40"),
    (["--model", "irevnet_c"], "error: zoo.create: unknown model 'irevnet_c'; there are irevnet_a, irevnet_b"),
    (["--batch-size", "2000"], "error: the batch size 2000 is more than the 1442 training images"),
    (["--resume", "nothing"], "error: no run in nothing: config.json is missing"),
    (["--resume", "photo.png"], "error: cannot read photo.png/config.json: Not a directory"),
    (["--output", "photo.png"], "error: "),
    (["--output", "x" * 300], "error: "),
    (["--seed", str(2**64)], "argument --seed: must not be negative nor above 2**63, got 18446744073709551616"),
    (["--device", "meta"], "error: no device 'meta' here: "),
    (["--size", "16", "--batch-size", "1"], "error: irevnet_small needs a batch of two or more at size 16"),
    (["--invert", "photo.png", "--epochs", "1"], "error: --invert has no use for --epochs here; drop it"),
    (["--invert", "photo.png", "--evaluate"], "argument --evaluate: not allowed with argument --invert"),
    (["--resume", "nothing", "--lr", "1"], "error: --resume goes on with the run as it was configured; drop --lr"),
    (["--evaluate"], "error: --evaluate needs a run: add --resume DIR"),
    (["--invert", "nothing.png"], "error: cannot read the image nothing.png: No such file or directory"),
    (["--invert", "broken/train/cat/a.png"], "error: cannot read the image broken/train/cat/a.png: not an image file"),
    (["--invert", "photo.png", "--size", "40"], "error: irevnet_small needs a size that 16 divides, got 40"),
    (["--invert", "photo.png", "--model", "irevnet_c"], "error: zoo.create: unknown model 'irevnet_c'"),
    (["--invert", "photo.png", "--device", "gpu"], "error: no device 'gpu' here: "),
    (
        ["--output", "taken"],
        "error: taken holds a run already; go on with it by --resume taken, or choose another --output",
    ),
    (["--lr", "-1"], "argument --lr: must be a positive number, got -1"),
    (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
    (["--seed", "-1"], "argument --seed: must not be negative nor above 2**63, got -1"),
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
    (folder / "taken").mkdir()
    (folder / "taken/checkpoint.pt").write_text("")
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


def test_wrong_input_in_a_worker_process_leaves_no_traceback(mess):
    result = run("--data", "broken", "--batch-size", 1, "--workers", 2, cwd=mess, code=2)
    assert result.stderr == "error: cannot read the image broken/train/cat/a.png: not an image file\n"


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
    ]:
        assert f"--{option}" in out


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
    first = process.stdout.readline()
    assert "run kept in runs/cut" in first
    assert "epoch 1/2" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    command = shlex.join([sys.executable, COMMAND[-1], "--resume", "runs/cut"])
    assert f"what was learnt is kept. Go on with:\n  {command}\n" in err
    assert {"checkpoint.pt", "model.safetensors", "metrics.jsonl"} <= {
        p.name for p in (tmp_path / "runs/cut").iterdir()
    }
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


@pytest.mark.parametrize("columns", [100, 30])
def test_a_terminal_shows_a_bar_that_fits(tmp_path, columns):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", watch(columns, tmp_path))
    bars = [line for line in re.split(r"[\r\n]+", text) if "━" in line and "epoch" in line]
    assert bars
    assert max(map(len, bars)) <= columns
    if columns == 100:
        assert any("loss" in b and "top-1" in b and "images/s" in b and re.search(r"\d:\d\d", b) for b in bars)
