"""What depth costs: bytes of a training step, by strategy, beside torch's checkpoint and the peers.

    python -m benchmarks.depth [--depths 4 8 16 32 64 128]

Stacks of additive couplings with i-RevNet's bottleneck, 32 channels per stream, 14x14 pixels, batch 4, in training.
Bytes are the peak at the allocator, gradients of parameters allocated before; nothing is timed. How errors grow with
depth is in ``benchmarks.growth``. Prints a table, writes a picture to runs/benchmarks/depth-bytes.svg and every number
to runs/benchmarks/depth-TIME.json.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.contenders import TITLES, bottleneck, stack
from benchmarks.report import console_of, keep
from invertible.testing import measure_memory
from zoo.arguments import positive

__all__ = ["draw", "peak_of"]

CHANNELS, SHAPE = 32, (4, 64, 14, 14)


def peak_of(name: str, depth: int) -> int:
    """Bytes of a step at the most."""
    torch.manual_seed(0)
    net = stack(name, [bottleneck(CHANNELS) for _ in range(depth)])
    x = torch.randn(SHAPE, requires_grad=True)  # some peers train nothing otherwise

    def step() -> None:
        net(x).square().mean().backward()

    step()  # what kernels allocate once in a process is no part of it
    x.grad = None
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return measure_memory(step)[1].peak


def draw(found: dict[str, dict[int, int]], path: Path) -> None:
    """Peak against depth, one line for each contender."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, peaks in found.items():
        ours = not (name.startswith("ckpt") or name in ("memcnn", "revtorch", "revlib"))
        axes.plot(list(peaks), [p / 2**20 for p in peaks.values()], "o-" if ours else "x--", label=TITLES[name], ms=4)
    axes.set(xlabel="couplings", ylabel="peak of a training step, MiB", xscale="log", yscale="log")
    depths = list(next(iter(found.values())))
    axes.set_xticks(depths, list(map(str, depths)))
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, facecolor="white")


def main() -> None:
    """Counts, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=positive, nargs="+", default=[4, 8, 16, 32, 64, 128])
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = console_of(110)
    found: dict[str, dict[int, int]] = {}
    for name in TITLES:
        print(name, file=sys.stderr)
        try:
            found[name] = {depth: peak_of(name, depth) for depth in options.depths}
        except ModuleNotFoundError as error:
            console.print(f"without {error.name}: pip install '.[bench]'", markup=False, highlight=False)
    table = Table("peak, MiB", *map(str, options.depths))
    for name, peaks in found.items():
        table.add_row(TITLES[name], *(f"{peak / 2**20:.2f}" for peak in peaks.values()))
    console.print(table)
    path = Path("runs/benchmarks/depth-bytes.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(found, path)
    console.print(f"the picture is {path}", highlight=False)
    keep(console, "depth", bytes=found)


if __name__ == "__main__":
    main()
