"""The benchmark of GPUs compares like with like: each case is what its name says, under the settings it should have."""

import pytest
import torch
from torch import nn

from benchmarks import fits, gpu, gpu_checks
from benchmarks.devices import precision, seconds, switched
from benchmarks.floors import Operation
from benchmarks.gpu_cases import Case, Group, Ready
from benchmarks.gpu_tables import aims_table, reference_of
from invertible import Recompute, Reconstruct, Store
from tests.test_benchmark_gpu import CPU, MACHINE, SMALL, ledger_at


def flags():
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32


def test_flags_are_set_and_set_back():
    before = flags()
    for name, allowed in (("fp32", False), ("tf32", True), ("bf16", True)):
        with precision(name):
            assert flags() == (allowed, allowed)
        assert flags() == before
    cudnn = torch.backends.cudnn
    with switched(benchmark=True, deterministic=True, deterministic_algorithms=True):
        assert cudnn.benchmark
        assert cudnn.deterministic
        assert torch.are_deterministic_algorithms_enabled()
    assert not any((cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()))


def test_a_gpu_is_timed_from_idle_to_idle(monkeypatch):
    told = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            told.append("record")

        def elapsed_time(self, other):
            return 250.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: told.append("wait"))
    assert seconds(lambda: told.append("step"), torch.device("cuda")) == 0.25
    assert told == ["wait", "record", "step", "record", "wait"]


class Seen(nn.Module):
    """A function that takes down how it is run."""

    runs: list = []

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(48, 48, 1)

    def forward(self, x):
        Seen.runs.append((torch.is_autocast_enabled("cpu"), x.dtype))
        return self.inner(x)


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
@pytest.mark.parametrize(
    "name", ["store", "reconstruct", "recompute+exact32", "reconstruct+exact", "floor", "hand", "ckpt"]
)
def test_a_case_is_what_its_name_says(monkeypatch, name, kind):
    """Autocast is there in forward and in every replay, whoever replays."""
    monkeypatch.setattr("benchmarks.gpu_cases.bottleneck", lambda _: Seen())
    ready = Ready(Group("stack2", 2, 4, kind), Case(name), CPU)
    Seen.runs = []
    ready.step()
    stream = torch.float64 if name == "reconstruct+exact" else torch.float32
    assert len(Seen.runs) == (2 if name in ("store", "hand") else 4)
    assert {cast for cast, _ in Seen.runs} == {kind == "bf16"}
    strategy = {"store": Store, "reconstruct": Reconstruct, "recompute": Recompute}.get(Case(name).first)
    if strategy is not None:
        assert isinstance(ready.net.backprop, strategy)
        assert getattr(ready.net.grid, "dtype", torch.float32) == stream


def test_the_memory_format_is_that_of_the_name():
    for name, form in (("store", torch.contiguous_format), ("store+last", torch.channels_last)):
        ready = Ready(SMALL, Case(name), CPU)
        weights = [p for p in ready.net.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert all(t.is_contiguous(memory_format=form) for t in (ready.x, *weights))


def test_the_slope_is_of_two_depths(monkeypatch):
    peaks = iter((1000, 1600))  # of 3 blocks and of 7
    monkeypatch.setattr(gpu, "_peak", lambda _: next(peaks))
    row = {}
    gpu.prepare(Group("stack7", 2, 4, "tf32"), Case("store"), CPU, row)
    assert (row["peak"], row["slope"]) == (1600, 150)


def test_products_are_without_bytes():
    found = gpu._floors([Operation(10**9, 10**8, "float32")], MACHINE)
    assert (found["products"], found["floor"]) == (1, 10)
    assert (found["flops"], found["bytes"]) == (10**9, 10**8)


def test_cases_take_turns_in_an_order_that_turns(tmp_path):
    told = []

    class Named:
        def __init__(self, name):
            self.step = lambda: told.append(name)

    rows = {name: {"times": []} for name in "abc"}
    gpu._take_turns(ledger_at(tmp_path), rows, {name: Named(name) for name in "abc"}, CPU, 3)
    assert "".join(told[3:]) == "abcbcacab"


def test_what_is_compared_with_what():
    rows = {"store": {}, "inverse+compiled": {}}
    assert reference_of("reconstruct", rows) == "store"
    assert reference_of("inverse+compiled", rows) == "forward+compiled"
    timed = {"status": "timed", "times": [1.0] * 9}
    assert "MISSED" not in aims_table({"x": {"cases": {"store": timed, "reconstruct+compiled": timed}}})  # at most 1


@pytest.mark.parametrize("again", [0.0, 1e-6])
def test_a_grid_is_right_to_the_last_bit(monkeypatch, again):
    """Where kernels don't repeat their own gradients, those of nobody have to be the same bits; the way back has."""

    def checked(net, x, grid, cast, *, compiled):
        assert torch.is_autocast_enabled("cpu") is False
        with cast:
            casts.append(torch.is_autocast_enabled("cpu"))
        return {"gradients": {"Store": again, "Reconstruct": 1e-5}, "inverse": inverse}

    monkeypatch.setattr(gpu_checks, "_checked", checked)
    for inverse in (0.0, 1e-5):
        casts = []
        for row in gpu_checks.check_all(CPU, compiled=False, tiny=True):
            assert row["right"] == (row["grid"] is None or (again > 0 and inverse == 0)), row
        assert casts == [False] * 6 + [True] * 3


def test_pixels_are_those_of_what_was_counted(monkeypatch):
    monkeypatch.setattr(fits, "network", lambda _, batch, side: side)
    monkeypatch.setattr(fits, "bytes_of_step", lambda side, _: side**2)
    assert fits.answer("pixels_b", "store", 320**2) == (320, 320**2)
    assert fits.answer("pixels_b", "store", 320**2 - 1) == (288, 288**2)
