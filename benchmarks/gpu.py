"""All that is to be known of a GPU, in one call that may end at any time: what is right, how fast, and how much memory.

    python -m benchmarks.gpu [--device cuda] [--quick] [--only NAME ...] [--minutes M] [--resume [FILE]] [--tiny]

First the best rates of the device are measured, and gradients and inverses are checked in every setting. Then groups of
cases are timed: three that have every aim, and the others after the same checks with compiled functions, the
determinism matrix, and sums on a grid by themselves. The cases of a group take turns, one step each per round; a ratio
is that of two cases in the same round, the median of the rounds with its 95 % bootstrap interval. A time is that
between two events of the GPU around a step, which begins when the device has nothing to do. The peak is the
allocator's, above what weights and gradients need (but not where an optimiser steps, as gradients are what it saves);
the slope is that of two depths. ``products`` is the share of the time that the products alone would need at the best
rate, ``floor`` that of all operations of the eager step, one after the other; what is fused may exceed it.

The file is written after every step of the way, and ``--resume`` goes on with it: what ended the process is not tried
again, and a group that was cut off twice comes after all others. What memory does not suffice for, and what can't be
compiled, is a row that says so. ``--only`` takes names of groups, such as ``irevnet_b*bf16``, or ``checks``,
``determinism``, ``grid``; ``--list`` prints them. ``--tiny`` runs all on next to nothing: its figures say nothing, and
no aim is judged by them. Prints tables and writes every number to gpu-TIME.json in $OUT, or in runs/benchmarks.
"""

import argparse
import os
import sys
import time
from collections.abc import Generator, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.determinism import determinism_matrix, matrix_table
from benchmarks.devices import about, broken, clear, fault, machine_of, precision, seconds
from benchmarks.floors import Machine, Operation, counted, floor, flops_floor
from benchmarks.gpu_cases import AIMED, GROUPS, Case, Group, Ready
from benchmarks.gpu_checks import check_all, check_table
from benchmarks.gpu_sums import sums_table, time_sums
from benchmarks.gpu_tables import aims_table, group_table
from benchmarks.ledger import DIED, RUNNING, Ledger, folder, newest
from benchmarks.triton_grid import ready_for
from invertible.testing import measure_memory

ROUNDS, QUICK, FEWEST = 31, 7, 3


def prepare(group: Group, case: Case, device: torch.device, row: dict[str, Any]) -> Ready:
    """Builds a case, warms it up, and takes down its peak, its slope and its operations."""
    if case.has("graph") and device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    if case.has("triton") and not ready_for(torch.empty(0, device=device)):
        raise NotImplementedError("Triton needs a GPU")
    if group.depth is not None and case.first not in ("forward", "inverse") and group.note not in ("depth", "whole"):
        shallow = _peak(Ready(group, case, device, depth=group.depth // 2))
        clear(device)
    else:
        shallow = None
    start = time.perf_counter()
    ready = Ready(group, case, device)
    ready.step()
    row["first"] = time.perf_counter() - start
    row["peak"] = _peak(ready)
    if shallow is not None and group.depth is not None:
        row["slope"] = (row["peak"] - shallow) / (group.depth - group.depth // 2)
    row["drift"] = ready.drift
    if case.has("graph"):
        ready.capture()
    ready.step()
    return ready


def _peak(ready: Ready) -> int:
    """Bytes at the peak of a step, when all is warm."""
    ready.step()
    ready.fill_gradients()
    run = ready.step if ready.y is not None else ready.train
    with ready.settings():
        return measure_memory(run, ready.device)[1].peak


def operations(group: Group, case: Case, device: torch.device) -> list[Operation]:
    """What a step does, as the eager network does it."""
    ready = Ready(group, Case(case.eager), device)
    ready.step()
    return counted(ready.step)


def run_group(ledger: Ledger, group: Group, device: torch.device, machine: Machine, rounds: int) -> None:
    """Prepares all cases of a group, and lets those that run take turns."""
    found = ledger.group(group.name)
    torch.compiler.reset()  # torch keeps a few graphs of each kind
    ready: dict[str, Ready] = {}
    totals: dict[str, dict[str, float]] = {}
    found |= {"batch": group.batch, "tries": ledger.tries(group.name) + 1}
    for name in group.cases:
        if ledger.over or found["cases"].get(name, {}).get("status") == DIED:
            continue
        row = found["cases"][name] = {"status": RUNNING, "times": []}
        ledger.save()
        try:
            ready[name] = prepare(group, Case(name), device, row)
            eager = Case(name).eager
            if eager not in totals:
                totals[eager] = _floors(operations(group, Case(name), device), machine)
            row.update(totals[eager], status="prepared")
        except Exception as error:
            row["status"] = fault(error)
            ready.pop(name, None)
            if broken(device):
                row["status"] = DIED
                ledger.save()
                raise
        clear(device)
        ledger.save()
    _take_turns(ledger, found["cases"], ready, device, rounds)


def _floors(found: list[Operation], machine: Machine) -> dict[str, float]:
    return {
        "flops": sum(op.flops for op in found),
        "bytes": sum(op.bytes for op in found),
        "products": flops_floor(found, machine),
        "floor": floor(found, machine),
    }


def _take_turns(
    ledger: Ledger, rows: dict[str, Any], ready: dict[str, Ready], device: torch.device, rounds: int
) -> None:
    """One step of each per round, in an order that turns; a case that fails later is out, with what it has.

    The round before the first is not timed: memory that was given back has to be asked for again.
    """
    for i in range(-1, rounds):
        if ledger.over and i >= FEWEST:
            break
        names = list(ready)
        for name in names[i % max(1, len(names)) :] + names[: i % max(1, len(names))]:
            try:
                taken = seconds(ready[name].step, device)
                rows[name]["times"] += [taken] if i >= 0 else []
            except Exception as error:
                rows[name]["status"] = fault(error)
                del ready[name]
                if broken(device):
                    rows[name]["status"] = DIED
                    raise
        ledger.save()
    for name in ready:
        rows[name]["status"] = "timed"


def machines(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """The best rates, for each precision."""
    found = {name: machine_of(device, name, tiny=tiny) for name in ("fp32", "tf32", "bf16")}
    return {name: {"rates": each.rates, "bandwidth": each.bandwidth} for name, each in found.items()}


def _machine(found: dict[str, Any]) -> Machine:
    return Machine(found["rates"], [(int(size), rate) for size, rate in found["bandwidth"]])


def wanted(name: str, only: list[str] | None) -> bool:
    """Whether a name is like one of these; all are, if there are none."""
    return only is None or any(fnmatch(name, pattern) for pattern in only)


def run_all(ledger: Ledger, device: torch.device, options: argparse.Namespace) -> None:
    """Everything, as long as there is time: the groups that have all aims come before what takes long."""
    limits = ledger.once("machine", lambda: machines(device, tiny=options.tiny))
    if limits is None:
        return
    _checks(ledger, device, options, compiled=False)
    groups = [each for each in GROUPS if wanted(each.name, options.only)]
    if options.quick and options.only is None:
        groups = [each for each in groups if each.note != "all"]
    aimed = [each for each in groups if each in GROUPS[:AIMED]]
    _groups(ledger, aimed, device, options, limits)
    if not options.tiny:
        _checks(ledger, device, options, compiled=True)
    if wanted("determinism", options.only):
        small: dict[str, Any] = {"channels": 16, "size": 8, "depth": 2, "compiled": False} if options.tiny else {}
        rows = ledger.rows("determinism", lambda skip: _sound(determinism_matrix(device, skip=skip, **small), device))
        print(f"\n{matrix_table(rows)}" if rows else "", flush=True)
    if wanted("grid", options.only):
        settings: dict[str, Any] = {"rounds": rounds_of(options), "tiny": options.tiny}
        machine = _machine(limits["fp32"])
        rows = ledger.rows("grid", lambda skip: _sound(time_sums(device, machine, skip=skip, **settings), device))
        print(f"\n{sums_table(rows, judged=not options.tiny)}" if rows else "", flush=True)
    _groups(ledger, [each for each in groups if each not in aimed], device, options, limits)


def rounds_of(options: argparse.Namespace) -> int:
    """How often each case has its turn."""
    return options.rounds or (QUICK if options.quick else ROUNDS)


def _sound(rows: Iterable[dict[str, Any]], device: torch.device) -> Generator[dict[str, Any]]:
    """Rows, as long as what they are of did not break the device for this process."""
    for row in rows:
        if broken(device):
            raise RuntimeError(f"the device is broken after {row}")
        yield row


def _checks(ledger: Ledger, device: torch.device, options: argparse.Namespace, *, compiled: bool) -> None:
    """Gradients and inverses."""
    if wanted("checks", options.only):
        settings = {"compiled": compiled, "tiny": options.tiny}
        key = "checks, compiled" if compiled else "checks"
        rows = ledger.rows(key, lambda skip: _sound(check_all(device, skip=skip, **settings), device))
        print(f"\n{check_table(rows)}" if rows else "", flush=True)


def _groups(
    ledger: Ledger, groups: list[Group], device: torch.device, options: argparse.Namespace, limits: dict[str, Any]
) -> None:
    """Times groups. One that time or the process's end has cut off twice comes after all others."""
    named = {group.name: group for group in (each.tiny() if options.tiny else each for each in groups)}
    for name, group in sorted(named.items(), key=lambda item: ledger.tries(item[0]) >= 2):
        if not ledger.found["groups"].get(name, {}).get("done") and not ledger.over:
            with precision(group.precision):
                run_group(ledger, group, device, _machine(limits[group.precision]), rounds_of(options))
            clear(device)
            ledger.found["groups"][name]["done"] = not ledger.over
            ledger.save()
        if name in ledger.found["groups"]:
            print(f"\n{group_table(name, ledger.found['groups'][name])}", flush=True)


def said_of(found: dict[str, Any]) -> str:
    """What stands below a table: device, versions, and each command with its date."""
    return "\n".join([", ".join(f"{key} {value}" for key, value in found["about"].items()), *found["commands"]])


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds, and not every setting of every network")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="groups like irevnet_b*, or checks, determinism, grid"
    )
    parser.add_argument("--minutes", type=float, help="after so many nothing new is begun")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} unless given")
    parser.add_argument("--resume", nargs="?", const="", metavar="FILE", help="go on with a file, or with the newest")
    parser.add_argument("--tiny", action="store_true", help="everything on next to nothing, to see that it runs")
    parser.add_argument("--list", action="store_true", help="print the names of groups and their cases")
    options = parser.parse_args(arguments)
    names = ["checks", "determinism", "grid", *(group.name for group in GROUPS)]
    for pattern in options.only or ():
        if not any(wanted(name, [pattern]) for name in names):
            parser.error(f"--only: nothing is named {pattern}; see --list")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    options = parsed(arguments)
    if options.list:
        print("\n".join(f"{group.name}: {' '.join(group.cases)}" for group in GROUPS))
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic algorithms refuse to run
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events are of the current one
    path = folder() / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.json"
    old = None
    if options.resume is not None:
        old = Path(options.resume) if options.resume else newest(folder())
        if old is None or not old.exists():
            raise SystemExit(f"nothing to go on with: no {options.resume or folder() / 'gpu-*.json'}")
        path = folder() / old.name
    of = {**about(device), "tiny": options.tiny}
    try:
        ledger = Ledger(path, of, resume=old, minutes=options.minutes)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    ledger.found.setdefault("commands", []).append(f"{time.strftime('%Y-%m-%d')}: {command}")
    try:
        run_all(ledger, device, options)
    finally:
        ledger.save()
        print(f"\n{aims_table(ledger.found['groups'], judged=not options.tiny)}\n\n{said_of(ledger.found)}")
        print(f"every number is in {path}")
        if ledger.over:
            print("the time was up before the end; go on with --resume")


if __name__ == "__main__":
    main()
