"""The benchmark of GPUs, on next to nothing and on the CPU: that it runs, and goes on after whatever may stop it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import gpu
from benchmarks.determinism import COLUMNS, determinism_matrix, matrix_table
from benchmarks.devices import fault, machine_of, seconds
from benchmarks.floors import Machine, Operation, counted, floor, flops_floor
from benchmarks.gpu_cases import ALL, CORE, GROUPS, Case, Group, Ready
from benchmarks.gpu_checks import check_all, check_table
from benchmarks.gpu_sums import sums_table, time_sums, verdict
from benchmarks.gpu_tables import AIMS, aims_table, group_table, ratio
from benchmarks.ledger import DIED, Ledger
from benchmarks.report import markdown
from invertible import Coupling, Merge, Sequential, Split
from invertible.grid import PRESETS

CPU = torch.device("cpu")
ABOUT = {"device": "this"}
MACHINE = Machine({"float32": 1e9, "bfloat16": 4e9}, [(1000, 1e8), (100_000, 1e7)])
SMALL = Group("stack2", 2, 4, "tf32", ("store", "reconstruct"))


def ledger_at(path, **options):
    return Ledger(path / "gpu-1.json", ABOUT, **options)


def run(monkeypatch, tmp_path, *arguments):
    """The command, whose file is read."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    gpu.main(["--device", "cpu", "--tiny", "--rounds", "2", *arguments])
    return json.loads(max(tmp_path.glob("gpu-*.json"), key=lambda path: path.stat().st_mtime).read_text())


def test_a_floor_is_the_longer_of_operations_and_bytes():
    assert floor([Operation(10**9, 0, "float32")], MACHINE) == 1
    assert floor([Operation(10**9, 0, "bfloat16")], MACHINE) == 0.25
    assert floor([Operation(1, 1000, "float32")], MACHINE) == 1e-5  # in a cache
    assert floor([Operation(1, 10**7, "float32")], MACHINE) == 1  # in memory
    assert floor([Operation(10**9, 10**7, "float32"), Operation(0, 10**7, "int64")], MACHINE) == 2
    assert flops_floor([Operation(10**9, 10**9, "float32")], MACHINE) == 1


def test_operations_are_counted():
    with torch.no_grad():
        a, b = torch.rand(4, 5), torch.rand(5, 6)
        found = counted(lambda: (a @ b).view(-1).add(1))
    assert found == [Operation(2 * 4 * 5 * 6, 4 * (20 + 30 + 24), "float32"), Operation(0, 4 * 48, "float32")]


def test_best_rates_are_measured():
    found = machine_of(CPU, "bf16", tiny=True)
    assert set(found.rates) == {"float32", "bfloat16"}
    assert min(found.rates.values()) > 0 < found.bandwidth_of(2**40) <= found.bandwidth_of(1)
    assert seconds(lambda: None, CPU) < 1


def test_all_that_was_asked_for_is_in_a_group():
    names = [group.name for group in GROUPS]
    assert len(set(names)) == len(names)
    assert {Case(name).has("compiled") for name in ALL} == {True, False}
    assert len(ALL) == 18 == len(set(ALL))
    every = {(g.model, g.batch, g.precision) for g in GROUPS if g.cases == ALL}
    networks = [("irevnet_b", 64), ("irevnet_b", 256), ("irevnet_a", 64), ("revnet56", 64), ("stack100", 64)]
    assert every == {(*network, precision) for network in networks for precision in ("bf16", "tf32", "fp32")}
    cases = {(group.name, name) for group in GROUPS for name in group.cases}
    assert all(Case(name).parts for _, name in cases)
    for aim in AIMS:
        assert any({aim.case, aim.to or aim.case} <= set(group.cases) for group in GROUPS), aim
    assert set(CORE) <= {name for _, name in cases}
    with pytest.raises(ValueError, match="no such case: store\\+quickly"):
        _ = Case("store+quickly").parts


@pytest.mark.parametrize(
    "name", ["store", "recompute", "reconstruct+exact", "reconstruct+exact32+record", "hand", "ckpt"]
)
def test_cases_train_the_same_network(name):
    gradients = []
    for each in ("store", name):
        ready = Ready(SMALL, Case(each), CPU)
        ready.step()
        gradients.append([p.grad for p in ready.net.parameters()])
        assert not isinstance(ready.net, Sequential) or (ready.net.grid is not None) == ("exact" in each)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_what_memory_does_not_suffice_for_is_a_row(tmp_path, monkeypatch):
    def full(group, case, device, *, depth=None):
        if case.first == "store":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        if case.has("compiled"):
            raise RuntimeError("inductor: no compiler\nand a long story")
        return Ready(group, case, device, depth=depth)

    monkeypatch.setattr(gpu, "Ready", full)
    ledger = ledger_at(tmp_path)
    group = Group("stack2", 2, 4, "tf32", ("store", "reconstruct+compiled", "reconstruct", "store+exact"))
    gpu.run_group(ledger, group, CPU, MACHINE, 3)
    rows = ledger.found["groups"][group.name]["cases"]
    assert [row["status"] for row in rows.values()] == [
        "out of memory", "RuntimeError: inductor: no compiler", "timed", "out of memory"
    ]  # fmt: skip
    assert len(rows["reconstruct"]["times"]) == 3
    table = group_table(group.name, ledger.found["groups"][group.name])
    assert "| store " in table
    assert "out of memory" in table
    assert "inductor: no compiler" in table
    assert fault(MemoryError()) == fault(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out of memory"


def test_a_case_that_fails_later_keeps_what_it_has(tmp_path):
    class Failing:
        calls = 0

        def step(self):
            self.calls += 1
            if self.calls > 3:  # the first is not timed
                raise torch.OutOfMemoryError("full")

    ledger, rows = ledger_at(tmp_path), {"a": {"times": []}, "b": {"times": []}}
    fine = Failing()
    fine.calls = -100
    gpu._take_turns(ledger, rows, {"a": Failing(), "b": fine}, CPU, 5)
    assert (rows["a"]["status"], len(rows["a"]["times"])) == ("out of memory", 2)
    assert (rows["b"]["status"], len(rows["b"]["times"])) == ("timed", 5)


def test_a_run_goes_on_where_it_ended(tmp_path):
    ledger = ledger_at(tmp_path)
    assert ledger.once("machine", lambda: {"rates": 1}) == {"rates": 1}
    one, two = ledger.group("one"), ledger.group("two")
    one |= {"done": True, "cases": {"store": {"status": "timed", "times": [1.0]}}}
    ledger.found["groups"]["one"] = one
    two["cases"] = {"store": {"status": "timed", "times": [1.0]}, "reconstruct": {"status": "running", "times": []}}
    ledger.save()
    again = ledger_at(tmp_path, resume=tmp_path / "gpu-1.json")
    assert again.once("machine", lambda: pytest.fail("it is there")) == {"rates": 1}
    assert again.group("one")["cases"]["store"]["times"] == [1.0]
    assert again.group("two")["cases"] == {"reconstruct": {"status": DIED, "times": []}}
    with pytest.raises(ValueError, match=r"is of .*this.*, and this is .*other"):
        Ledger(tmp_path / "gpu-2.json", {"device": "other"}, resume=tmp_path / "gpu-1.json")
    elsewhere = Ledger(tmp_path / "new" / "gpu-1.json", ABOUT, resume=tmp_path / "gpu-1.json")
    assert json.loads(elsewhere.path.read_text())["groups"]["one"] == one


def test_what_ended_the_process_is_not_tried_again(tmp_path):
    ledger = ledger_at(tmp_path)
    ledger.group(SMALL.name)["cases"]["store"] = {"status": DIED, "times": []}
    gpu.run_group(ledger, SMALL, CPU, MACHINE, 1)
    rows = ledger.found["groups"][SMALL.name]["cases"]
    assert [row["status"] for row in rows.values()] == [DIED, "timed"]


def test_after_its_minutes_nothing_is_begun(tmp_path):
    now = [0.0]
    ledger = ledger_at(tmp_path, minutes=2, clock=lambda: now[0])
    assert ledger.once("early", lambda: 1) == 1
    now[0] = 121
    assert ledger.over
    assert ledger.once("late", lambda: pytest.fail("no time")) is None
    gpu.run_group(ledger, SMALL, CPU, MACHINE, 1)
    assert ledger.found["groups"][SMALL.name]["cases"] == {}


def test_a_command_without_time_ends_and_says_so(tmp_path, monkeypatch, capsys):
    found = run(monkeypatch, tmp_path, "--minutes", "0")
    assert found["groups"] == {}
    assert "go on with --resume" in (out := capsys.readouterr().out)
    assert len(re.findall(r"\| open +\|$", out, re.MULTILINE)) == len(AIMS)
    with pytest.raises(SystemExit, match="nothing to go on with: no elsewhere"):
        run(monkeypatch, tmp_path, "--resume", "elsewhere")
    (file,) = tmp_path.glob("gpu-*.json")
    file.write_text(json.dumps(found | {"about": {"tiny": False}}))
    with pytest.raises(SystemExit, match=r"is of .*False.*, and this is "):
        run(monkeypatch, tmp_path, "--resume", str(file))


def test_tables_say_what_was_measured_and_nothing_else():
    times = [2.0] * 9
    timed = {"status": "timed", "times": times, "peak": 2**21, "slope": 0.0, "products": 0.5, "floor": 1.0}
    rows = {"store": timed | {"slope": 2**10}, "reconstruct": timed | {"times": [3.0] * 9}, "floor": timed}
    table = group_table("x", {"cases": rows, "batch": 4})
    assert "1.50 [1.50, 1.50]" in table
    assert "2.0" in table
    assert ratio(rows, "store+compiled", "store") is None
    aims = aims_table({"x": {"cases": rows}})
    assert aims.count("open") == len(AIMS) - 2
    assert "1.50 [1.50, 1.50], MISSED" in aims
    unjudged = aims_table({"x": {"cases": rows}}, judged=False)
    assert "1.50 [1.50, 1.50], not judged" in unjudged
    assert "MISSED" not in unjudged
    assert unjudged.count("not judged") == 2
    assert markdown(("a", "b"), [("1", "22222")]).splitlines()[1] == "| --- | ----- |"


def test_sums_on_a_grid_are_timed(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr("benchmarks.gpu_sums.PRESETS", {"exact": PRESETS["exact"]})
    rows = list(time_sums(CPU, MACHINE, rounds=2, tiny=True))
    assert [row["direction"] for row in time_sums(CPU, MACHINE, rounds=1, tiny=True, skip=3)] == ["backward"]
    assert {(row["grid"], row["dtype"], row["direction"]) for row in rows} == {
        ("exact", dtype, way) for dtype in ("float32", "bfloat16") for way in ("forward", "backward")
    }
    assert all(len(row["times"]["eager"]) == 2 for row in rows)
    assert all(len(row["times"]["compiled"]) == 2 for row in rows if row["direction"] == "forward")
    assert [row["floor"] for row in rows[:2]] == [8192 * 20 / 1e7, 8192 * 12 / 1e7]
    table = sums_table(rows)
    assert table.count("Triton needs a GPU") == len(rows)
    assert table.endswith("slower: not judged")


def test_the_rule_of_the_kernel():
    def row(compiled, direction="forward"):
        return {"direction": direction, "times": {"compiled": [compiled] * 9, "triton": [1.0] * 9}}

    assert verdict([row(1.05), row(2.0, "backward")]).endswith("it is in 0 of 1 settings, so don't")
    assert verdict([row(1.05), row(1.2)]).endswith("it is in 1 of 2 settings, so adopt it there")
    assert verdict([row(1.2)], judged=False).endswith("not judged")


def test_the_matrix_tells_what_is_the_same():
    rows = list(determinism_matrix(CPU, channels=8, size=4, batch=4, depth=2, compiled=False))
    assert [row["setting"] for row in rows] == ["as it is", "bf16 autocast", "deterministic algorithms"]
    for row in rows:
        assert set(row) == {"setting", *COLUMNS}
        assert all(row[column] is True for column in ("again", "replay", "back", "gradients"))
    assert rows[0]["base"] is True
    assert 0 < rows[1]["base"] <= 1  # so differences are seen
    assert 0 < rows[1]["switched"] <= 1
    assert "same" in matrix_table([{**rows[0], "one": "RuntimeError: so"}])


def test_the_checks_see_a_wrong_gradient(monkeypatch):
    good = list(check_all(CPU, compiled=False, tiny=True))
    assert len(good) == 9
    assert all(row["right"] for row in good), check_table(good)

    class Wrong(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return x * (1 + type(self).calls)

    monkeypatch.setattr(
        "benchmarks.gpu_checks.stack", lambda *_: Sequential(Split(), Coupling(Wrong()), Coupling(Wrong()), Merge())
    )
    bad = list(check_all(CPU, compiled=False, tiny=True))
    assert not any(row["right"] for row in bad)
    assert "WRONG" in check_table(bad)
    assert "DriftError" in bad[0]["error"]
    assert "InexactInverseError" in bad[1]["error"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_command_on_next_to_nothing(tmp_path, monkeypatch, capsys):
    few = [replace(group, cases=tuple(c for c in group.cases if "exact32" not in c)) for group in GROUPS]
    monkeypatch.setattr(gpu, "GROUPS", few)
    only = [
        "stack100-64-28-tf32",
        "irevnet_b*tf32-inverse",
        "irevnet_b*graphs",
        "irevnet_a*optimizer",
        "*peers",
        "*streams",
        "*sums",
    ]
    found = run(monkeypatch, tmp_path, "--only", "checks", "determinism", "grid", *only)
    groups = found["groups"]
    assert len(groups) == 7  # on next to nothing both groups of streams are one
    assert all(group["done"] for group in groups.values())
    for name, group in groups.items():
        for case, row in group["cases"].items():
            known = case.endswith(("graph", "triton")) or case in ("memcnn", "revtorch", "revlib")
            assert row["status"] == "timed" or known, (name, case, row["status"])
    rows = groups["stack4-2-8-tf32"]["cases"]
    assert rows["reconstruct"]["slope"] < rows["store"]["slope"] / 10
    assert all(row["floor"] > 0 and row["peak"] > 0 for row in rows.values() if row["status"] == "timed")
    optimizer = groups["irevnet_small-2-32-bf16-optimizer"]["cases"]
    assert optimizer["reconstruct+inside"]["peak"] < optimizer["reconstruct+after"]["peak"]
    told = capsys.readouterr().out
    assert "CUDA graphs need a GPU" in told
    assert "Triton needs a GPU" in told
    assert "MISSED" not in told
    assert run(monkeypatch, tmp_path, "--resume", "--only", "checks", *only)["groups"] == groups
