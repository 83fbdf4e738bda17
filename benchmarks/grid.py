"""What a grid costs: training steps by Reconstruct on a grid and without one.

    python -m benchmarks.grid [--rounds 31] [--contenders none exact32 exact ...] [--stacks 8x192x14x14 8x64x28x28]

Stacks of 12 additive couplings with i-RevNet's function; a stack's name is the shape of a stream. Each contender runs
in a process of its own, on one thread. They take turns, one step each per round, and a ratio is that of the CPU times
of two contenders in the same round: its median over all rounds, with a 95 % bootstrap interval. "Accounting" is the
CPU time of checksums and probes alone, over that of a step. Prints tables and writes every number to
runs/benchmarks/grid-TIME.json.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from rich.table import Table

import zoo
from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from invertible import Coupling, Merge, Reconstruct, Sequential, Split
from invertible.backprop._drift import Checksum, Probes
from invertible.testing import measure_memory

CONTENDERS = ("none", "exact32", "exact", "none_compiled", "exact32_compiled", "exact_compiled")
DEPTH = 12


def stack(name: str, channels: int) -> Sequential:
    """The network of a contender."""
    torch.manual_seed(0)
    couplings = [Coupling(zoo.Bottleneck(channels, channels)) for _ in range(DEPTH)]
    net = Sequential(Split(), *couplings, Merge(), backprop=Reconstruct())
    grid = name.removesuffix("_compiled")
    if grid == "exact" or grid == "exact32":
        net.grid = grid
    if name.endswith("_compiled"):
        net.compile_functions()
    return net


def serve_contender(shape: tuple[int, ...], name: str) -> None:
    """Runs steps of one contender when asked."""
    torch.set_num_threads(1)
    net = stack(name, shape[1])
    x = torch.randn(shape[0], 2 * shape[1], *shape[2:])

    def run() -> None:
        net(x).float().square().mean().backward()  # as a head does

    def step() -> float:
        net.zero_grad()
        start = time.process_time()
        run()
        return time.process_time() - start

    def accounting() -> float:
        streams = [part.contiguous() for part in net.snap(x).chunk(2, 1)]
        start = time.process_time()
        float((Probes if net.grid is None else Checksum)(streams).drift(streams))
        return time.process_time() - start

    def memory() -> int:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        return measure_memory(run)[1].peak

    serve({"step": step, "accounting": accounting, "memory": memory})


def measure(shape: str, names: list[str], count: int) -> dict[str, Any]:
    """All numbers of one stack."""
    contenders = {name: Contender("benchmarks.grid", "--serve", shape, name) for name in names}
    try:
        memory = {name: each.ask("memory") for name, each in contenders.items()}
        times = rounds(contenders, "step", count)
        accounting = rounds(contenders, "accounting", count)
    finally:
        for each in contenders.values():
            each.close()
    found: dict[str, Any] = {}
    for name in names:
        found[name] = {
            "times": times[name],
            "accounting": accounting[name],
            "share": statistics.median(accounting[name]) / statistics.median(times[name]),
            "peak": memory[name],
            "ratio": interval([a / b for a, b in zip(times[name], times[names[0]], strict=True)]),
        }
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--stacks", nargs="+", default=["8x192x14x14", "8x64x28x28"], metavar="SHAPE")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_contender(tuple(map(int, options.serve[0].split("x"))), options.serve[1])
        return
    console = console_of(110)
    results: dict[str, Any] = {}
    for shape in options.stacks:
        print(shape, file=sys.stderr)
        results[shape] = measure(shape, options.contenders, options.rounds)
        first = options.contenders[0]
        table = Table("grid", "time, 95 % interval", "accounting", "peak MiB", title=f"{shape}: ratio to {first}")
        for name, row in results[shape].items():
            ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row["ratio"])
            table.add_row(name, ratio, f"{100 * row['share']:.2f} %", f"{row['peak'] / 2**20:.1f}")
        console.print(table)
    keep(console, "grid", results=results)


if __name__ == "__main__":
    main()
