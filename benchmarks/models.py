"""What a training step costs, as a share of ResNet-50's: every model of the zoo for images of 224 pixels.

    python -m benchmarks.models [--rounds 31] [--batch 2]

Each model runs in a process of its own, on one thread, in single precision without a grid: i-RevNets, RevNets and the
Rev-ViT once with everything stored and once with reconstruction. A step is forward, sum, backward; parameters stay as
they are. A ratio is that of CPU times in one round: its median, with a 95 % bootstrap interval. Prints a table
and writes every number to runs/benchmarks/models-TIME.json; the figures go into zoo/cards.py.
"""

import argparse
import time

import torch
from rich.table import Table

import zoo
from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from invertible import Reconstruct, Store
from zoo.cards import CARDS
from zoo.network import ReversibleNetwork

REFERENCE = "resnet50 store"
STRATEGIES = {"store": Store(), "reconstruct": Reconstruct(on_drift="record")}


def cases() -> list[str]:
    """Model and strategy, for all that classify images of 224 pixels."""
    names = [name for name, card in CARDS.items() if card.size == 224]
    with torch.device("meta"):
        reversible = {name for name in names if isinstance(zoo.create(name), ReversibleNetwork)}
    return [f"{name} {kept}" for name in names for kept in STRATEGIES if kept == "store" or name in reversible]


def serve_case(case: str, batch: int) -> None:
    """Takes a step when asked, and answers with its CPU time in seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, kept = case.split()
    net = zoo.create(name)
    if isinstance(net, ReversibleNetwork):
        net.backprop = STRATEGIES[kept]
    x = torch.rand(batch, 3, 224, 224)

    def step() -> float:
        start = time.process_time()
        net(x).sum().backward()
        net.zero_grad()
        return time.process_time() - start

    serve({"step": step})


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batch", type=int, default=2, help="images in a step")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_case(options.serve, options.batch)
        return
    batch = str(options.batch)
    contenders = {case: Contender("benchmarks.models", "--serve", case, "--batch", batch) for case in cases()}
    try:
        times = rounds(contenders, "step", options.rounds)
    finally:
        for each in contenders.values():
            each.close()
    console = console_of(80)
    table = Table("", "seconds", "of ResNet-50's, 95 % interval")
    for case, found in times.items():
        ratios = [a / b for a, b in zip(found, times[REFERENCE], strict=True)]
        table.add_row(case, f"{interval(found)[0]:.2f}", "{:.2f} [{:.2f}, {:.2f}]".format(*interval(ratios)))
    console.print(table)
    keep(console, "models", times=times)


if __name__ == "__main__":
    main()
