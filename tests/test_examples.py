"""The second example: training within a limit of memory that the system enforces."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-W", "error", str(ROOT / "examples" / "volume_segmentation.py")]


@pytest.mark.slow
@pytest.mark.parametrize(("backprop", "fits"), [("store", False), ("reconstruct", True)])
def test_a_volume_network_fits_only_without_stored_activations(backprop, fits):
    command = [*COMMAND, "--backprop", backprop, "--steps", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if fits or "no limit here" in result.stdout:  # only Linux limits the memory of a process, and the example says so
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1].startswith("step   1/1  loss ")
        assert ("drift" in result.stdout) == (backprop == "reconstruct")
    else:
        assert result.returncode == 1
        assert result.stderr == "error: does not fit: 32 blocks with --backprop store need more than 96 MiB\n"
