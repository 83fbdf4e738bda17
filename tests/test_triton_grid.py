"""The grid's kernel against its eager twin, by Triton's interpreter; and what happens where there is no Triton."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import triton_grid
from invertible import Coupling, Grid, Merge, Sequential, Split
from invertible._fused import fused_sum


def compared(count):
    """How often the kernel served, in a process in which Triton interprets."""
    command = [sys.executable, "-m", "tests.triton_command", str(count)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."})
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.skipif(triton_grid.triton is None, reason="no Triton")
@pytest.mark.slow
def test_the_kernel_has_the_bits_of_its_eager_twin():
    seen = compared(400)
    assert min(seen.values()) > 20, seen


def test_without_triton_the_eager_twin_serves(monkeypatch):
    monkeypatch.setattr(triton_grid, "triton", None)
    net = Sequential(Split(), Coupling(torch.nn.Conv2d(4, 4, 1)), Merge(), grid="exact")
    x = torch.randn(2, 8, 3, 3)
    expected = net(x)
    triton_grid.put(net)
    assert not fused_sum(net[1].function).serves(x, x)
    assert torch.equal(net(x), expected)
    like = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert torch.equal(triton_grid.gradient(torch.ones(2, 3), like, -1), like - 1)


def test_what_the_kernel_takes(monkeypatch):
    monkeypatch.setattr(triton_grid, "ready_for", lambda *_: True)
    x = Grid(40).round(torch.randn(2, 8, 4, 4))
    last = x.to(memory_format=torch.channels_last)
    assert triton_grid.serves(x, x.float())
    assert triton_grid.serves(last, last)
    assert triton_grid.serves(x[:, :4], x[:, 4:])
    assert not triton_grid.serves(last[:, :4], last[:, 4:])
    assert not triton_grid.serves(x, last)
    assert not triton_grid.serves(x, x[:1])
    assert not triton_grid.serves(x[:0], x[:0])
    assert not triton_grid.serves(x[:, :, ::2], x[:, :, ::2])
