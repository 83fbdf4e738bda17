"""Runs that are killed at random moments, by signals and by a full disk: they go on and end with the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo import checkpoints
from zoo.journal import TIMING, rows_of

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "examples" / "imagenet_irevnet.py")
AVERAGING = str(ROOT / "tests" / "averaging_command.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OPTIONS = ["--epochs", "3", "--batch-size", "256", "--lr", "0.1", "--save-every", "1", "--keep", "2", "--output", "run"]


def command(processes, *options):
    launcher = [sys.executable] if processes == 1 else TORCHRUN
    return [*launcher, AVERAGING, *OPTIONS, "--workers", "1", *map(str, options)]


def start(processes, folder, *options, **environment):
    folder.mkdir(parents=True, exist_ok=True)
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    surroundings |= {"GLOO_SOCKET_IFNAME": "lo", **environment}
    return subprocess.Popen(
        command(processes, *options), cwd=folder, env=surroundings, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(processes, folder, *options):
    process = start(processes, folder, *options)
    try:
        out = process.communicate(timeout=300)[0]
    finally:
        kill(process)
    assert process.returncode == 0, out
    return out


def children(pid):
    """The processes below this one, those of a session of their own too."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [pid]
    for parent in found:
        found += [child for child, above in parents.items() if above == parent]
    return found[1:]


def kill(process):
    """Kill -9, to all at once."""
    for pid in [process.pid, *children(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    process.stdout.close()


def wait_for(process, words):
    while words not in (line := process.stdout.readline()):
        assert line, f"ended without {words!r}"


def latest(folder):
    """The step of the newest checkpoint, 0 if there is none."""
    found = checkpoints.names(folder / "run" / "checkpoints")
    return int(found[-1].removeprefix("step_")) if found else 0


def end_of(folder):
    """All that must be the same: weights and their average, momentum, log but for the timing, configuration."""
    run = folder / "run"
    state = checkpoints.load(run / "checkpoints").state
    moments = [each["momentum_buffer"] for each in state["optimizer"]["state"].values()]
    rows = [{key: value for key, value in row.items() if key not in TIMING} for row in rows_of(run)]
    weights = load_file(run / "model.safetensors")
    weights |= {f"average of {key}": t for key, t in load_file(run / "ema.safetensors").items()}
    return weights, moments, rows, json.loads((run / "config.json").read_text())


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(t, expected[0][key]) for key, t in found[0].items())
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert found[2] == expected[2]
    assert found[3] == expected[3]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 14), (2, 6)])
def test_random_kills_change_no_bit(tmp_path, processes, kills):
    """Each run saves after every step, so that many are killed while they save."""
    finish(processes, tmp_path / "whole")
    expected = end_of(tmp_path / "whole")
    drawn = random.Random(processes)  # noqa: S311
    steps = []
    for _ in range(kills):
        process = start(processes, tmp_path / "cut")
        wait_for(process, "run kept in run")
        before = latest(tmp_path / "cut")
        if drawn.random() < 0.7:
            while latest(tmp_path / "cut") == before and process.poll() is None:
                time.sleep(0.01)
        time.sleep(drawn.uniform(0, 1))
        kill(process)
        steps.append(latest(tmp_path / "cut"))
        if steps[-1] == 15:  # done: once more from the beginning
            assert_same_so_far(tmp_path / "cut", expected)
            (tmp_path / "cut").rename(tmp_path / f"cut-{len(steps)}")
    finish(processes, tmp_path / "cut")
    assert_same(end_of(tmp_path / "cut"), expected)
    assert len(set(steps)) > kills // 4, steps


def assert_same_so_far(folder, expected):
    finish(1 if expected[3]["world_size"] == 1 else 2, folder)
    assert_same(end_of(folder), expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_schedulers_signal_saves_and_ends_well(tmp_path, processes, number):
    """To every process, workers that read images too, as SLURM and torchrun send it; once to one of two only."""
    process = start(processes, tmp_path, "--save-every", 1000, "--epochs", 40)
    wait_for(process, "epoch  1/40")
    trainers = [process.pid] if processes == 1 else children(process.pid)[:2]
    chosen = trainers[1:] if processes == 2 and number == signal.SIGUSR1 else [*trainers, *children(process.pid)]
    for pid in set(chosen):
        os.kill(pid, number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0, out
    assert out.count("stopped after step") == 1
    assert "Traceback" not in out
    step = int(checkpoints.names(tmp_path / "run" / "checkpoints")[-1].removeprefix("step_"))
    assert f"stopped after step {step} of 200; what was learnt is kept" in out


@pytest.mark.slow
def test_what_all_processes_find_wrong_is_said_once(tmp_path):
    process = start(2, tmp_path, "--data", "nowhere")
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1  # torchrun's own
    assert out.count("error: no such folder: nowhere\n") == 1


@pytest.mark.slow
def test_sigterm_through_torchrun_saves(tmp_path):
    """torchrun hands the signal to its processes and waits for them; what it returns itself is its own affair."""
    process = start(2, tmp_path, "--save-every", 1000, "--epochs", 40)
    wait_for(process, "epoch  1/40")
    os.kill(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert "stopped after step" in out
    step = int(checkpoints.names(tmp_path / "run" / "checkpoints")[-1].removeprefix("step_"))
    assert f"stopped after step {step} of 200" in out


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 2])
def test_sigterm_while_workers_are_started_saves(tmp_path, delay):
    """The process that they are forked from imports PyTorch then, and torchrun's signal goes to it, too."""
    process = start(2, tmp_path, "--epochs", 40)
    wait_for(process, "run kept in run")
    time.sleep(delay)
    os.kill(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    assert "stopped after step" in out, out
    assert "EOFError" not in out, out
    assert checkpoints.names(tmp_path / "run" / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_all_processes_hear_signals_when_the_run_says_that_it_goes(tmp_path, late):
    """One may be slower than the other: it was ended by the signal, and the other lost it with a traceback."""
    process = start(2, tmp_path, "--epochs", 40, LATE=str(late))
    wait_for(process, "run kept in run")
    os.kill(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    assert "stopped after step" in out, out
    assert "[rank" not in out, out
    assert checkpoints.names(tmp_path / "run" / "checkpoints")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
    """A limit on the size of files stands for the disk: weights fit, the optimiser's state beside them does not."""
    finish(1, tmp_path, "--epochs", 1)
    before = checkpoints.load(tmp_path / "run" / "checkpoints")
    largest = max(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*.*"))
    limited = f'ulimit -f {largest // 1024 // 2}; exec "$@"'
    shell = ["bash", "-c", limited, "bash", *command(1, "--epochs", 2, "--allow-change")]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(shell, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("error: cannot write the checkpoint run/checkpoints/step_000000006: ")
    assert line.endswith("; the last good one is run/checkpoints/step_000000005")
    after = checkpoints.load(tmp_path / "run" / "checkpoints")
    assert after.step == before.step == 5
    assert all(torch.equal(t, before.weights[key]) for key, t in after.weights.items())


@pytest.mark.slow
def test_two_processes_learn_the_digits(tmp_path):
    """By the recipe as it is: each sees half of every batch."""
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = [*TORCHRUN, SCRIPT, "--output", "learnt", "--workers", "0"]
    result = subprocess.run(options, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    last = rows_of(tmp_path / "learnt", "validation")[-1]
    assert last["top1"] >= 98
    assert last["images"] == 355
