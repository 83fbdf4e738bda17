"""What the way back costs: the inverse's time over that of forward, without gradients.

    python -m benchmarks.inverse [--rounds 31]

Each case runs in a process of its own, on one thread; in each round it goes forward and back once, and a ratio is that
of the CPU times of the two: its median over all rounds, with a 95 % bootstrap interval. Prints a table and writes every
number to runs/benchmarks/inverse-TIME.json.
"""

import argparse
import time
from typing import Any

import torch
from rich.table import Table

import zoo
from benchmarks.contenders import workload
from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from invertible import Sequential

CASES = tuple(
    f"{which}, {mode}{grid}"
    for which in ("stack", "irevnet_b")
    for mode in ("eval", "train")
    for grid in ("", ", exact")
)


def serve_case(case: str) -> None:
    """Goes forward and back when asked."""
    torch.set_num_threads(1)
    which, mode, *grid = case.split(", ")
    whole, x = workload(which, "store", 16)
    net = whole.body if isinstance(whole, zoo.IRevNet) else whole
    if not isinstance(net, Sequential):
        raise TypeError(case)
    net.train(mode == "train")
    net.grid = "exact" if grid else None

    with torch.no_grad():
        y = net(x)
    ways = [("forward", net, x), ("inverse", net.inverse, y)]

    @torch.no_grad()
    def step() -> dict[str, float]:
        found = {}
        ways.reverse()  # neither is always the second, which finds its weights in the cache
        for name, way, value in ways:
            start = time.process_time()
            way(value)
            found[name] = time.process_time() - start
        return found

    serve({"step": step})


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_case(options.serve)
        return
    contenders = {case: Contender("benchmarks.inverse", "--serve", case) for case in CASES}
    try:
        times: dict[str, list[Any]] = rounds(contenders, "step", options.rounds)
    finally:
        for each in contenders.values():
            each.close()
    console = console_of(80)
    table = Table("", "inverse / forward, 95 % interval")
    for case, found in times.items():
        table.add_row(case, "{:.2f} [{:.2f}, {:.2f}]".format(*interval([t["inverse"] / t["forward"] for t in found])))
    console.print(table)
    keep(console, "inverse", times=times)


if __name__ == "__main__":
    main()
