"""How time and memory grow with depth, width, resolution and batch; and what fits in 24 GiB.

    python -m benchmarks.scaling [--rounds 8]

Each strategy runs in a process of its own, on one thread; they take turns. The networks are stacks of additive
couplings with i-RevNet's function; what is not varied is 16 blocks, 16 channels per stream, 28x28 pixels, batch 4. Time
is the CPU time of a step, the median of the rounds; bytes are the peak at the allocator, gradients of parameters
allocated before. An exponent is the slope of a straight line through the logarithms. What fits in 24 GiB is not run:
the plan counts it, with parameters, their gradients and momentum. Bytes grow linearly with depth, so that two plans
tell how many blocks fit, and a third checks it up to 1000 blocks. Python's own objects are not counted. Prints tables
and writes every number to runs/benchmarks/scaling-TIME.json.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

import zoo
from benchmarks.contenders import bottleneck, strategy
from benchmarks.interleaved import Contender, rounds, serve
from benchmarks.report import console_of, keep
from invertible import Coupling, Merge, Sequential, Split
from invertible.testing import measure_memory

STRATEGIES = ("store", "recompute", "recompute_sqrt", "reconstruct")
USUAL = {"depth": 16, "channels": 16, "pixels": 28, "batch": 4}
AXES = {
    "depth": (10, 30, 100, 300, 1000),
    "channels": (16, 32, 64, 128),
    "pixels": (14, 28, 56, 112),
    "batch": (2, 4, 8, 16, 32),
}
MEMORY = 24 * 2**30


def stack(name: str, *, depth: int, channels: int) -> Sequential:
    """The network of a strategy."""
    torch.manual_seed(0)
    layers = [Split(), *(Coupling(bottleneck(channels)) for _ in range(depth)), Merge()]
    return Sequential(*layers, backprop=strategy(name, depth))


def serve_strategy(name: str) -> None:
    """Runs a step of one size after another when asked, or counts their bytes."""
    torch.set_num_threads(1)
    cases: list[tuple[str, int, Sequential, Tensor]] = []
    for axis, values in AXES.items():
        for value in values:
            size = {**USUAL, axis: value}
            x = torch.randn(size["batch"], 2 * size["channels"], size["pixels"], size["pixels"])
            cases.append((axis, value, stack(name, depth=size["depth"], channels=size["channels"]), x))

    def step() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {axis: [] for axis in AXES}
        for axis, _, net, x in cases:
            net.zero_grad()
            start = time.process_time()
            net(x).square().mean().backward()
            found[axis].append(time.process_time() - start)
        return found

    def memory() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {axis: [] for axis in AXES}
        for axis, _, net, x in cases:
            for p in net.parameters():
                p.grad = torch.zeros_like(p)

            def run(net: Sequential = net, x: Tensor = x) -> None:
                net(x).square().mean().backward()

            found[axis].append(measure_memory(run)[1].peak)
        return found

    serve({"step": step, "memory": memory})


def exponent(axis: str, values: list[float]) -> float:
    """The slope of the logarithms."""
    return float(np.polyfit(np.log(AXES[axis]), np.log(values), 1)[0])


def planned(net: Sequential, x: Tensor) -> int:
    """Bytes of training with momentum, as the plan counts them."""
    plan = net.plan(x)
    return plan.peak + plan.parameters + 2 * plan.gradients + x.numel() * x.element_size()


def largest(count: Callable[[int], int], few: int, more: int) -> tuple[int, int | None]:
    """The largest size that fits, if bytes grow linearly; ``None`` in place of its own count if it was not planned."""
    first, second = count(few), count(more)
    slope = (second - first) / (more - few)
    size = few + math.floor((MEMORY - first) / slope)
    found = count(size) if size <= 1000 else None
    if found is not None and found > MEMORY:
        raise ArithmeticError(f"{size} blocks do not fit: bytes do not grow linearly")
    return size, found


def deepest(name: str) -> tuple[int, int | None]:
    """Blocks of 64 channels per stream at 224x224 pixels, batch 8."""

    def count(depth: int) -> int:
        with torch.device("meta"):
            return planned(stack(name, depth=depth, channels=64), torch.rand(8, 128, 224, 224))

    return largest(count, 50, 100)


def widest(name: str) -> tuple[int, int]:
    """Side of the largest square image that the body of i-RevNet (b) trains on, one at a time."""

    def count(side: int) -> int:
        with torch.device("meta"):
            net = zoo.irevnet_b().body
            net.backprop = strategy(name, 100)
            return planned(net, torch.rand(1, 3, side, side))

    fits, too_large = 256, 1024
    while count(too_large) <= MEMORY:
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > 32:
        middle = (fits + too_large) // 64 * 32
        fits, too_large = (middle, too_large) if count(middle) <= MEMORY else (fits, middle)
    return fits, count(fits)


def measure(count: int) -> dict[str, Any]:
    """Times and bytes of all sizes."""
    contenders = {name: Contender("benchmarks.scaling", "--serve", name) for name in STRATEGIES}
    try:
        times = rounds(contenders, "step", count)
        memory = {name: each.ask("memory") for name, each in contenders.items()}
    finally:
        for each in contenders.values():
            each.close()
    found: dict[str, Any] = {}
    for name in STRATEGIES:
        middle = {
            axis: [statistics.median(t[axis][i] for t in times[name]) for i in range(len(AXES[axis]))] for axis in AXES
        }
        found[name] = {
            "times": times[name],
            "time": middle,
            "bytes": memory[name],
            "exponents": {axis: (exponent(axis, middle[axis]), exponent(axis, memory[name][axis])) for axis in AXES},
        }
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_strategy(options.serve)
        return
    console = console_of(110)
    results = measure(options.rounds)
    for axis, values in AXES.items():
        table = Table("", *map(str, values), "exponent", title=f"{axis}: milliseconds of a step, and MiB at the peak")
        for name, row in results.items():
            of_time, of_bytes = row["exponents"][axis]
            table.add_row(f"{name}, ms", *(f"{1000 * t:.0f}" for t in row["time"][axis]), f"{of_time:.2f}")
            table.add_row(f"{name}, MiB", *(f"{b / 2**20:.1f}" for b in row["bytes"][axis]), f"{of_bytes:.2f}")
        console.print(table)
    fits = {name: {"depth": deepest(name), "side": widest(name)} for name in ("store", "recompute", "reconstruct")}
    table = Table("", "blocks", "side of an image for the body of i-RevNet (b)", title="what fits in 24 GiB")
    for name, row in fits.items():
        table.add_row(name, f"{row['depth'][0]:,}", str(row["side"][0]))
    console.print(table)
    keep(console, "scaling", results=results, fits=fits)


if __name__ == "__main__":
    main()
