"""Memory-saving training side by side: time, memory, and what goes wrong.

    python -m benchmarks.backprop [--rounds 31] [--workloads stack irevnet_b] [--contenders store reconstruct ...]

Each contender runs in a process of its own, on one thread. They take turns, one step each per round, and a ratio is
that of the CPU times of two contenders in the same round: its median over all rounds, with a 95 % bootstrap interval.
Bytes are counted by the profiler's memory events, with the parameters' gradients allocated before. Prints tables and
writes every number to runs/benchmarks/backprop-TIME.json.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from rich.table import Table

from benchmarks.backprop_checks import CHECKS, run_all
from benchmarks.contenders import CONTENDERS, count_evaluations, workload
from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from invertible.testing import measure_memory

DEPTH = 16
DEEPER = 32


def serve_contender(which: str, name: str) -> None:
    """Runs steps of one contender when asked."""
    torch.set_num_threads(1)
    net, x = workload(which, name, DEPTH)
    x.requires_grad_()  # or some peers would train nothing

    def step() -> dict[str, float]:
        net.zero_grad()
        start = time.process_time()
        loss = net(x).square().mean()
        middle = time.process_time()
        loss.backward()
        end = time.process_time()
        return {"forward": middle - start, "step": end - start}

    def memory() -> dict[str, Any]:
        return {"peak": peak(net), "evaluations": evaluations()}

    def peak(net: torch.nn.Module) -> int:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        x.grad = torch.zeros_like(x)
        _, counted = measure_memory(lambda: net(x).square().mean().backward())
        return counted.peak

    def evaluations() -> float:
        fresh, _ = workload(which, name, DEPTH)
        count, blocks = count_evaluations(fresh)
        fresh(x).square().mean().backward()
        return count() / blocks

    def deeper() -> int:
        return peak(workload(which, name, DEEPER)[0])

    serve({"step": step, "memory": memory, "deeper": deeper, "checks": lambda: run_all(name)})


def measure(which: str, names: list[str], count: int, *, slope: bool = True) -> dict[str, Any]:
    """All numbers of one workload; with the bytes per added block, where there is a deeper one."""
    contenders = {name: Contender("benchmarks.backprop", "--serve", which, name) for name in names}
    found: dict[str, Any] = {}
    try:
        memory: dict[str, Any] = {}
        slopes: dict[str, float] = {}
        for name, each in contenders.items():
            memory[name] = each.ask("memory")
            if slope and which == "stack":
                slopes[name] = (each.ask("deeper") - memory[name]["peak"]) / (DEEPER - DEPTH)
            each.close()  # the profiler has made it large; to take turns they start anew
        times = rounds(contenders, "step", count)
    finally:
        for each in contenders.values():
            each.close()
    for name in names:
        row = {"times": times[name], "ratio": ratio(times, name, names[0]), **memory[name], "slope": slopes.get(name)}
        if "store_compiled" in names:
            row["ratio_compiled"] = ratio(times, name, "store_compiled")
        found[name] = row
    return found


def ratio(times: dict[str, Any], name: str, other: str) -> tuple[float, float, float]:
    """Of the steps of two contenders in the same round: the median and its interval."""
    return interval([a["step"] / b["step"] for a, b in zip(times[name], times[other], strict=True)])


def forward_share(rows: dict[str, Any], first: str) -> float:
    """The share of a plain step that is its forward pass."""
    return statistics.median(t["forward"] / t["step"] for t in rows[first]["times"])


def table(which: str, rows: dict[str, Any], first: str) -> Table:
    """Time and memory of one workload."""
    share = forward_share(rows, first)
    title = f"{which}: ratio to {first}; its forward pass is {share:.2f} of its step, so that two are {1 + share:.2f}"
    result = Table("", "time, 95 % interval", "to store_compiled", "F per block", "peak MiB", "KiB/block", title=title)
    for name, row in rows.items():
        result.add_row(
            name,
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"]),
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio_compiled"]) if "ratio_compiled" in row else "",
            f"{row['evaluations']:.2f}",
            f"{row['peak'] / 2**20:.1f}",
            "" if row["slope"] is None else f"{row['slope'] / 2**10:.1f}",
        )
    return result


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--workloads", nargs="*", default=["stack", "irevnet_b"], choices=["stack", "irevnet_b"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_contender(*options.serve)
        return
    console = console_of(160)
    results: dict[str, Any] = {}
    for which in options.workloads:
        print(which, file=sys.stderr)
        results[which] = measure(which, options.contenders, options.rounds)
        console.print(table(which, results[which], options.contenders[0]))
    checks: dict[str, dict[str, str]] = {}
    without = {"hand", "floor", "exact"}
    columns = [name for name in options.contenders if name not in without and not name.endswith(("_sqrt", "_compiled"))]
    for name in columns:
        contender = Contender("benchmarks.backprop", "--serve", "stack", name)
        checks[name] = contender.ask("checks")
        contender.close()
    answers = Table("", *columns, title="what goes wrong, and whether it is said")
    for title in CHECKS:
        answers.add_row(title, *(checks[name][title] for name in columns))
    console.print(answers)
    keep(console, "backprop", results=results, checks=checks)


if __name__ == "__main__":
    main()
