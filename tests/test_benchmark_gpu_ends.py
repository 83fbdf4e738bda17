"""What ends a run of the GPU's benchmark, and what the next one does then: time, a kill, a broken device."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu
from benchmarks.devices import broken, fault
from benchmarks.gpu_cases import AIMED, GROUPS
from benchmarks.gpu_tables import AIMS
from benchmarks.ledger import DIED
from tests.test_benchmark_gpu import CPU, MACHINE, SMALL, ledger_at


def test_rows_go_on_where_they_ended(tmp_path):
    """Each is written at once; the one in which a process ended is not made again, and no other is made twice."""
    made = []

    def make(skip):
        for i in range(skip, 5):
            made.append(i)
            if i == 2:
                raise KeyboardInterrupt  # the process ends
            yield {"row": i}

    ledger = ledger_at(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ledger.rows("checks", make)
    now = [0.0]
    again = ledger_at(tmp_path, resume=ledger.path, minutes=1, clock=lambda: now[0])

    def slow(skip):
        for row in make(skip):
            now[0] = 61.0
            yield row

    assert again.rows("checks", slow) == [{"row": 0}, {"row": 1}, {"row": 3}]
    last = ledger_at(tmp_path, resume=ledger.path)
    assert last.rows("checks", make) == [{"row": 0}, {"row": 1}, {"row": 3}, {"row": 4}]
    assert last.rows("checks", lambda _: pytest.fail("all are there")) == [{"row": i} for i in (0, 1, 3, 4)]
    assert made == [0, 1, 2, 3, 4]


def test_a_group_that_is_cut_off_each_time_does_not_keep_the_others_waiting(tmp_path, monkeypatch, capsys):
    begun = []
    now = [0.0]

    def long(ledger, group, *_):
        found = ledger.group(group.name)
        found["tries"] = ledger.tries(group.name) + 1
        begun.append(group.batch)
        now[0] += 30 if group.batch == 2 else 120

    monkeypatch.setattr(gpu, "run_group", long)
    monkeypatch.setattr(gpu, "clear", lambda _: None)
    monkeypatch.setattr(gpu, "GROUPS", [replace(SMALL, batch=batch) for batch in (1, 2, 3)])
    options = gpu.parsed(["--only", "stack2*"])
    ledger_at(tmp_path).once("machine", lambda: {"tf32": {"rates": {"float32": 1.0}, "bandwidth": []}})
    for _ in range(3):
        now[0] = 0.0
        path = tmp_path / "gpu-1.json"
        gpu.run_all(ledger_at(tmp_path, resume=path, minutes=1, clock=lambda: now[0]), CPU, options)
    assert begun == [1, 1, 2, 3]
    capsys.readouterr()


def test_what_has_all_aims_comes_first(tmp_path, monkeypatch, capsys):
    for aim in AIMS:
        assert any({aim.case, aim.to or aim.case} <= set(group.cases) for group in GROUPS[:AIMED]), aim
    told = []
    monkeypatch.setattr(gpu, "run_group", lambda ledger, group, *_: told.append(group.name) or ledger.group(group.name))
    monkeypatch.setattr(gpu, "clear", lambda _: None)
    for name in ("check_all", "determinism_matrix", "time_sums"):
        monkeypatch.setattr(gpu, name, lambda *_, name=name, **options: told.append(name) or ())
    ledger = ledger_at(tmp_path)
    rates = {"rates": {"float32": 1.0}, "bandwidth": []}
    ledger.once("machine", lambda: dict.fromkeys(("fp32", "tf32", "bf16"), rates))
    gpu.run_all(ledger, CPU, gpu.parsed([]))
    names = [group.name for group in GROUPS]
    assert told == ["check_all", *names[:3], "check_all", "determinism_matrix", "time_sums", *names[3:]]
    capsys.readouterr()


def test_a_name_that_nothing_has_is_refused(capsys):
    for pattern in ("stack100", "check"):
        with pytest.raises(SystemExit):
            gpu.parsed(["--only", "checks", pattern])
        assert f"nothing is named {pattern}; see --list" in capsys.readouterr().err


def test_a_device_that_is_broken_ends_the_process(tmp_path, monkeypatch):
    """After an illegal access all else fails: these are no findings, and what did it is not tried again."""

    def failing(group, case, device, row):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "prepare", failing)
    monkeypatch.setattr(gpu, "broken", lambda _: True)
    ledger = ledger_at(tmp_path)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.run_group(ledger, SMALL, CPU, MACHINE, 1)
    assert ledger.found["groups"][SMALL.name]["cases"] == {"store": {"status": DIED, "times": []}}
    with pytest.raises(RuntimeError, match="the device is broken after"):
        ledger.rows("checks", lambda _: gpu._sound([{"row": 1}], CPU))
    assert ledger_at(tmp_path, resume=ledger.path).rows("checks", lambda _: (row for row in ())) == []


def test_whether_a_device_is_broken(monkeypatch):
    def fail(_):
        raise RuntimeError("CUDA error")

    assert not broken(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert broken(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert not broken(torch.device("cuda"))
    for text in ("CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):
        assert fault(RuntimeError(text)) == "out of memory"


def test_events_are_of_the_device_that_is_named(tmp_path, monkeypatch, capsys):
    """And below the tables there is what they are of."""
    current = []
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(gpu, "about", lambda device: {"device": f"the {device}"})
    gpu.main(["--device", "cuda:1", "--minutes", "0"])
    assert current == [torch.device("cuda:1")]
    out = capsys.readouterr().out
    assert "device the cuda:1, tiny False\n" in out
    assert ": python -m benchmarks.gpu --device cuda:1 --minutes 0\n" in out


def test_the_first_round_is_not_timed(tmp_path):
    """Memory was given back after each case was prepared."""

    class Counted:
        calls = 0

        def step(self):
            self.calls += 1

    ledger, rows, ready = ledger_at(tmp_path), {"a": {"times": []}}, {"a": Counted()}
    gpu._take_turns(ledger, rows, ready, CPU, 5)
    assert (ready["a"].calls, len(rows["a"]["times"])) == (6, 5)
