"""Densities in the plane: our spline flow beside zuko's, at equal parameters.

    python -m benchmarks.flows [--steps 300] [--seeds 5] [--rounds 31]

Three contenders: our flow of couplings; zuko's couplings with its spline, as many; and zuko's NSF, whose transforms are
autoregressive, half as many since each transforms both features. For two features NSF with passes=2, its coupling
form, is the same flow as the default. Theirs get the width of hidden layers that comes nearest to our parameters. All
see the same batches, standardised alike, by the same Adam and the same rate. First all are fitted, in two processes at
a time, and their mean log-density of points that they did not see is taken from the known one's: that is the
Kullback-Leibler divergence. Then steps and samples are timed: CPU times on one thread, by turns.
Prints two tables and writes every number to runs/benchmarks/flows-TIME.json.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Generator, Tensor, nn

from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from zoo.arguments import number, positive
from zoo.flows.densities import DENSITIES
from zoo.flows.fitting import fit
from zoo.flows.vectors import spline_flow

COUPLINGS, WIDTH, BINS, BATCH, LR = 6, 64, 8, 256, 3e-3
POINTS = 20_000  # held out, and as many to standardise by
REPEATS = 10  # steps of one answer


def zuko_couplings(width: int) -> nn.Module:
    """Couplings of zuko with its spline, that alternate as ours do."""
    from zuko.flows.coupling import NICE  # pyright: ignore[reportMissingImports]
    from zuko.transforms import MonotonicRQSTransform  # pyright: ignore[reportMissingImports]

    shapes = [(BINS,), (BINS,), (BINS - 1,)]
    return NICE(2, transforms=COUPLINGS, hidden_features=(width,) * 2, univariate=MonotonicRQSTransform, shapes=shapes)


def zuko_nsf(width: int) -> nn.Module:
    """Zuko's own neural spline flow, with its own number of transforms, 3."""
    from zuko.flows import NSF  # pyright: ignore[reportMissingImports]

    return NSF(2, transforms=COUPLINGS // 2, hidden_features=(width,) * 2, bins=BINS)


CONTENDERS: dict[str, Callable[[int], nn.Module]] = {
    "spline_flow": lambda width: spline_flow(2, couplings=COUPLINGS, width=width, bins=BINS),
    "zuko, couplings": zuko_couplings,
    "zuko.flows.NSF": zuko_nsf,
}


def count(net: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in net.parameters())


def width_of(name: str) -> int:
    """The width at which a contender has as many parameters as ours, or nearly."""
    with torch.random.fork_rng(devices=[]):
        ours = count(CONTENDERS["spline_flow"](WIDTH))
        return min(range(WIDTH - 16, WIDTH + 48), key=lambda width: abs(count(CONTENDERS[name](width)) - ours))


def log_prob(name: str, net: nn.Module, x: Tensor) -> Tensor:
    """Of a batch, by the call to train by."""
    return net(value=x) if name == "spline_flow" else net().log_prob(x)


def fitted(case: tuple[str, str, int], steps: int) -> float:
    """How far a fitted flow is from a density, in nats."""
    torch.set_num_threads(1)
    name, which, seed = case
    width = width_of(name)
    density = DENSITIES[which]()
    known = density.sample(POINTS, Generator().manual_seed(1000))
    mean, scale = known.mean(0), known.std(0)
    draw = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = CONTENDERS[name](width)

    def loss() -> Tensor:
        return -log_prob(name, net, (density.sample(BATCH, draw) - mean) / scale).mean()

    fit(net.parameters(), loss, steps=steps, lr=LR)
    held_out = density.sample(POINTS, Generator().manual_seed(2000))
    with torch.no_grad():
        ours = log_prob(name, net.eval(), (held_out - mean) / scale) - scale.log().sum()
        return float((density.log_prob(held_out) - ours).mean())


def serve_case(name: str) -> None:
    """Takes steps, or draws samples, when asked, and answers with CPU seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = CONTENDERS[name](width_of(name))
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, fused=True)
    x = torch.randn(BATCH, 2)

    def step() -> None:
        optimizer.zero_grad()
        (-log_prob(name, net, x).mean()).backward()
        optimizer.step()

    def timed(what: Callable[[], Any]) -> float:
        start = time.process_time()
        for _ in range(REPEATS):
            what()
        return (time.process_time() - start) / REPEATS

    serve({"both": lambda: {"step": timed(step), "sample": timed(lambda: net().sample((BATCH,)))}})


def fit_all(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """The divergences, by density and contender."""
    cases = [(name, which, i) for name in CONTENDERS for which in options.densities for i in range(options.seeds)]
    found: dict[str, dict[str, list[float]]] = {d: {name: [] for name in CONTENDERS} for d in options.densities}
    with ProcessPoolExecutor(2) as pool:
        for (name, density, _), value in zip(cases, pool.map(partial(fitted, steps=options.steps), cases), strict=True):
            found[density][name].append(value)
    return found


def time_all(count_of_rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of a step and of samples, by round."""
    contenders = {name: Contender("benchmarks.flows", "--serve", name) for name in CONTENDERS}
    try:
        found = rounds(contenders, "both", count_of_rounds)
        return {what: {name: [each[what] for each in v] for name, v in found.items()} for what in ("step", "sample")}
    finally:
        for each in contenders.values():
            each.close()


def at_least_two(text: str) -> int:
    """A whole number that has a standard deviation."""
    return number(text, int, 2, 2**63 - 1, "a whole number from 2 on")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=300, help="of each fit")
    parser.add_argument("--seeds", type=at_least_two, default=5, help="fits of each contender to each density")
    parser.add_argument("--rounds", type=positive, default=31, help="of the times")
    parser.add_argument("--densities", nargs="+", choices=list(DENSITIES), default=["moons", "checkerboard", "spirals"])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_case(options.serve)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come, too
    console = console_of(110)
    parameters = {name: count(make(width_of(name))) for name, make in CONTENDERS.items()}
    divergences = fit_all(options)
    table = Table("KL in nats: mean ± standard deviation", *options.densities)
    for name in CONTENDERS:
        cells = [
            f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in (d[name] for d in divergences.values())
        ]
        table.add_row(name, *cells)
    console.print(table)
    times = time_all(options.rounds)
    table = Table("", "parameters", *(f"{what}: ms, of ours, 95 % interval" for what in times))
    for name in CONTENDERS:
        cells: list[str] = []
        for found in times.values():
            ratios = [a / b for a, b in zip(found[name], found["spline_flow"], strict=True)]
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*interval(ratios))
            cells.append(f"{1e3 * interval(found[name])[0]:.1f}, {ratio}")
        table.add_row(name, f"{parameters[name]:,}", *cells)
    console.print(table)
    keep(console, "flows", parameters=parameters, divergences=divergences, times=times)


if __name__ == "__main__":
    main()
