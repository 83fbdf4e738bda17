"""What the way back costs: the inverse's time over that of forward, without gradients.

    python -m benchmarks.inverse [--rounds 31] [--cases "stack, eval" ...]

Each case runs in a process of its own, on one thread; in each round it goes forward and back once, and a ratio is that
of the CPU times of the two: its median over all rounds, with a 95 % bootstrap interval. Images per second are those of
the median round. "Compiled" is with ``net.compile_functions()``. Prints a table and writes every number to
runs/benchmarks/inverse-TIME.json. For a GPU there is ``python -m benchmarks.gpu --only '*inverse'``.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from rich.table import Table

import zoo
from benchmarks.contenders import workload
from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from invertible import Sequential

CASES = (
    *(
        f"{which}, {mode}{grid}"
        for which in ("stack", "irevnet_b")
        for mode in ("eval", "train")
        for grid in ("", ", exact")
    ),
    "stack, eval, compiled",
    "stack, eval, exact, compiled",
)


def serve_case(case: str) -> None:
    """Goes forward and back when asked."""
    torch.set_num_threads(1)
    which, mode, *options = case.split(", ")
    whole, x = workload(which, "store", 16)
    net = whole.body if isinstance(whole, zoo.IRevNet) else whole
    if not isinstance(net, Sequential):
        raise TypeError(case)
    net.train(mode == "train")
    net.grid = "exact" if "exact" in options else None
    if "compiled" in options:
        net.compile_functions()
    with torch.no_grad():
        y = net(x)
    ways = [("forward", net, x), ("inverse", net.inverse, y)]

    @torch.no_grad()
    def step() -> dict[str, float]:
        found: dict[str, float] = {"batch": len(x)}
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
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_case(options.serve)
        return
    contenders = {case: Contender("benchmarks.inverse", "--serve", case) for case in options.cases}
    try:
        times: dict[str, list[Any]] = rounds(contenders, "step", options.rounds)
    finally:
        for each in contenders.values():
            each.close()
    console = console_of(100)
    table = Table("", "inverse / forward, 95 % interval", "images/s forward", "back")
    for case, found in times.items():
        ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*interval([t["inverse"] / t["forward"] for t in found]))
        speeds = (found[0]["batch"] / statistics.median(t[way] for t in found) for way in ("forward", "inverse"))
        table.add_row(case, ratio, *(f"{speed:.1f}" for speed in speeds))
    console.print(table)
    keep(console, "inverse", times=times)


if __name__ == "__main__":
    main()
