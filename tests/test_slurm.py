"""The batch script: SLURM's commands are stand-ins, and the command lines are read by those who will read them."""

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from examples.imagenet_irevnet import parser

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train.sbatch"
STEP = """
shift_options() { while [[ $1 == --* ]]; do shift; done; "$@"; }
if [[ $* == *torchrun* ]]; then
    printf '%s\\n' "$@" > arguments
    echo "${SRUN_CPUS_PER_TASK-none}" > cores
    trap 'echo saved >> log; exit 1' USR1 TERM
    [[ -n ${CODE:-} ]] && exit "$CODE"
    echo $$ > partial && mv partial step
    while :; do sleep 0.02; done
else
    shift_options "$@"
fi
"""
STAND_INS = {
    "srun": STEP,
    "scancel": 'echo "scancel $*" >> log; kill -USR1 "$(cat step)"',
    "scontrol": '[[ $1 == show ]] && echo node1 && echo node2 || echo "scontrol $*" >> log',
}


def surroundings(folder, **more):
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    return {"PATH": f"{folder}:{os.environ['PATH']}", **job, **more}


COMMAND = ["bash", SCRIPT, "data", "runs/b"]


def run(folder, *options, **more):
    done = subprocess.run(
        [*COMMAND, *options], cwd=folder, env=surroundings(folder, **more), capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.returncode


@contextmanager
def running(folder):
    """The batch script, and the number of the process that trains."""
    process = subprocess.Popen(COMMAND, cwd=folder, env=surroundings(folder), start_new_session=True)
    try:
        for _ in range(3000):
            if (folder / "step").exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        yield process, int((folder / "step").read_text())
        process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its steps
        process.wait()


def log(folder):
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def test_it_is_a_shell_script_with_its_options_at_the_top():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert [i for i, line in enumerate(lines) if line.startswith("#SBATCH")] == [1, 2, 3, 4]  # sbatch reads no further
    assert first > 4


def test_without_its_two_folders_it_says_how_it_is_called():
    done = subprocess.run(["bash", SCRIPT, "data"], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith("usage: sbatch train.sbatch IMAGES RUN [OPTION ...]")


def test_its_command_line_is_understood(tmp_path):
    assert run(tmp_path, "--recipe", "modern", CODE="0") == 0
    name, *arguments = (tmp_path / "arguments").read_text().splitlines()
    launched = get_args_parser().parse_args(arguments)
    assert (name, launched.nnodes, launched.nproc_per_node) == ("torchrun", "2", "4")
    assert (launched.rdzv_endpoint, launched.rdzv_id) == ("node1:29500", "7")
    assert launched.signals_to_handle == "SIGTERM,SIGUSR1"
    assert (ROOT / launched.training_script).is_file()
    given = parser().parse_args(launched.training_script_args)
    assert (given.data, given.output, given.recipe) == ("data", Path("runs/b"), "modern")
    assert log(tmp_path) == []  # what is done does not come again


def test_a_step_has_the_cores_that_the_job_was_given(tmp_path):
    assert run(tmp_path, CODE="0", SLURM_CPUS_PER_TASK="96") == 0
    assert (tmp_path / "cores").read_text() == "96\n"
    assert run(tmp_path, CODE="0") == 0
    assert (tmp_path / "cores").read_text() == "none\n"


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_the_tests_themselves_hear_signals(which):
    """What pytest ignores its children ignore, and a shell can't undo that."""
    assert signal.getsignal(which) == signal.SIG_DFL


def test_before_the_time_is_up_it_saves_and_comes_again(tmp_path):
    with running(tmp_path) as (process, _):
        process.send_signal(signal.SIGUSR1)
    assert log(tmp_path) == ["scancel --signal=USR1 7", "saved", "scontrol requeue 7"]


def test_a_job_that_is_preempted_saves_and_leaves_the_queue_to_slurm(tmp_path):
    with running(tmp_path) as (process, step):
        process.send_signal(signal.SIGTERM)
        os.kill(step, signal.SIGTERM)  # SLURM tells the steps, too
    assert log(tmp_path) == ["saved"]


def test_what_has_failed_does_not_come_again(tmp_path):
    assert run(tmp_path, CODE="3") == 3
    assert log(tmp_path) == []


@pytest.mark.parametrize("again", [False, True])
def test_images_are_copied_to_the_nodes_with_their_age(tmp_path, again):
    (tmp_path / "data" / "train").mkdir(parents=True)
    image = tmp_path / "data" / "train" / "a.tar"
    image.write_bytes(b"tar")
    os.utime(image, ns=(10**18 + 7, 10**18 + 7))
    local = tmp_path / "local" / "images"
    for _ in range(1 + again):
        assert run(tmp_path, LOCAL=str(local), CODE="0") == 0
    copied = local / "train" / "a.tar"
    assert copied.read_bytes() == b"tar"
    assert copied.stat().st_mtime_ns == 10**18 + 7
    assert str(local) in (tmp_path / "arguments").read_text().splitlines()
