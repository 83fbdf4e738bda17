"""What a budget of bytes costs in time: ten budgets between the smallest possible one and storing everything.

    python -m benchmarks.budget [--rounds 31] [--workloads bottleneck wide]

Each budget runs in a process of its own, on one thread. They take turns, one step each per round, and a ratio is that
of the CPU times to a step of Store() in the same round: its median over all rounds, with a 95 % bootstrap interval.
"Bound" is 1 + what the plan computes again, as a share of the forward pass's counted work, times the share of the
forward pass in a step of Store(), measured. Bytes kept and peaks are counted at the allocator, the kernels' workspaces
with the latter. "Products" tells how many of the functions' products are kept without the rest. Prints tables and
writes every number to runs/benchmarks/budget-TIME.json.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import zoo
from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from invertible import Budget, Coupling, Merge, Sequential, Split, Store
from invertible.testing import measure_memory

BUDGETS = 10


def wide(channels: int) -> nn.Module:
    """Two 3x3 convolutions at full width, as RevNets have: products are most of the work."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
    return nn.Sequential(*layers)


def workload(which: str) -> tuple[Sequential, Tensor]:
    """A network and its input."""
    torch.manual_seed(0)
    if which == "bottleneck":
        functions, x = [zoo.Bottleneck(48, 48) for _ in range(16)], torch.randn(16, 96, 28, 28)
    else:
        functions, x = [wide(96) for _ in range(12)], torch.randn(8, 192, 14, 14)
    return Sequential(Split(), *map(Coupling, functions), Merge()), x


def serve_contender(which: str, name: str) -> None:
    """Runs steps under one budget when asked."""
    torch.set_num_threads(1)
    net, x = workload(which)
    net.backprop = Store()
    plan = net.plan(x)
    budget = plan.most
    if name != "store":
        budget = plan.least + int(name) * (plan.most - plan.least) // (BUDGETS - 1)
        net.backprop = Budget(budget)
        plan = net.plan(x)

    def run() -> None:
        net(x).square().mean().backward()

    def step() -> dict[str, float]:
        net.zero_grad()
        start = time.process_time()
        loss = net(x).square().mean()
        middle = time.process_time()
        loss.backward()
        return {"forward": middle - start, "step": time.process_time() - start}

    def about() -> dict[str, Any]:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        y, memory = measure_memory(lambda: net(x))
        return {
            "bytes": budget,
            "planned": plan.peak,
            "kept": memory.kept - y.untyped_storage().nbytes(),
            "peak": measure_memory(run)[1].peak,
            "work": plan.work,
            "products": sum(len(row.products) for row in plan.rows),
        }

    serve({"step": step, "about": about})


def measure(which: str, count: int) -> dict[str, Any]:
    """All numbers of one workload."""
    names = ["store", *map(str, range(BUDGETS))]
    contenders = {name: Contender("benchmarks.budget", "--serve", which, name) for name in names}
    try:
        about = {name: each.ask("about") for name, each in contenders.items()}
        times = rounds(contenders, "step", count)
    finally:
        for each in contenders.values():
            each.close()
    share = statistics.median(t["forward"] / t["step"] for t in times["store"])
    found: dict[str, Any] = {}
    for name in names:
        ratio = interval([a["step"] / b["step"] for a, b in zip(times[name], times["store"], strict=True)])
        bound = 1 + about[name]["work"] * share
        found[name] = {**about[name], "times": times[name], "ratio": ratio, "bound": bound, "share": share}
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--workloads", nargs="+", default=["bottleneck", "wide"], choices=["bottleneck", "wide"])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_contender(*options.serve)
        return
    console = console_of(130)
    results: dict[str, Any] = {}
    for which in options.workloads:
        print(which, file=sys.stderr)
        rows = results[which] = measure(which, options.rounds)
        table = Table(
            "MiB", "planned peak", "counted peak", "kept", "products", "work again", "bound", "time", "time / bound",
            title=f"{which}: the forward pass is {rows['store']['share']:.2f} of a step of Store()",
        )  # fmt: skip
        for name, row in rows.items():
            table.add_row(
                "Store()" if name == "store" else f"{row['bytes'] / 2**20:.1f}",
                *(f"{row[key] / 2**20:.1f}" for key in ("planned", "peak", "kept")),
                str(row["products"]),
                f"{row['work']:.2f}",
                f"{row['bound']:.2f}",
                "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"]),
                f"{row['ratio'][0] / row['bound']:.2f}",
            )
        console.print(table)
    keep(console, "budget", results=results)


if __name__ == "__main__":
    main()
