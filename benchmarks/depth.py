"""What depth costs: bytes of a training step, and how far off inverses and gradients are.

    python -m benchmarks.depth [--depths 4 8 16 32 64 128] [--seeds 5]

Stacks of additive couplings with i-RevNet's bottleneck, 32 channels per stream, 14x14 pixels, batch 4, in training.
Bytes are the peak at the allocator, gradients of parameters allocated before. The error of the inverse is the relative
one, of the whole batch. That of gradients is between `Reconstruct` and `Store`, all parameters together, at the same
precision: what reconstruction adds, and nothing else; drift is what `net.drift` says of it. "Rounding" is how far off
the gradients of `Store` are from those in double precision: what the precision costs anyway. Each seed has its weights
and images; lines are medians, bands go from the smallest to the largest. Nothing is timed.
Writes the pictures to runs/benchmarks/depth-bytes.svg and depth-errors.svg and every number to
runs/benchmarks/depth-TIME.json.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from benchmarks.contenders import bottleneck, stack
from benchmarks.report import console_of, keep
from invertible import Coupling, Merge, Reconstruct, Sequential, Split
from invertible.testing import measure_memory

CHANNELS, SHAPE = 32, (4, 64, 14, 14)
COUNTED = {
    "store": "Store()",
    "ckpt": "torch's checkpoint, per block",
    "recompute": "Recompute()",
    "ckpt_sqrt": "torch's checkpoint, √depth segments",
    "recompute_sqrt": "Recompute(every=√depth)",
    "memcnn": "MemCNN",
    "revtorch": "RevTorch",
    "revlib": "revlib",
    "reconstruct": "Reconstruct()",
}
SETTINGS: dict[str, tuple[torch.dtype, bool, Literal["exact"] | None]] = {
    "bfloat16 autocast": (torch.float32, True, None),
    "float32": (torch.float32, False, None),
    "float64": (torch.float64, False, None),
    'bfloat16 autocast, grid="exact"': (torch.float32, True, "exact"),
    'float32, grid="exact"': (torch.float32, False, "exact"),
}
"""The dtype of weights and images, whether autocast is on, and the grid."""


def peak_of(name: str, depth: int) -> int:
    """Bytes of a step at the most."""
    torch.manual_seed(0)
    net = stack(name, [bottleneck(CHANNELS) for _ in range(depth)])
    x = torch.randn(SHAPE, requires_grad=True)  # some peers train nothing otherwise
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return measure_memory(lambda: net(x).square().mean().backward())[1].peak


def gradients_of(net: Sequential, x: Tensor, autocast: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """Those of all parameters in one vector, in double precision."""
    net.zero_grad()
    with autocast():
        loss = net(x).square().mean()
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])


def errors_of(setting: str, depth: int, seed: int) -> dict[str, float]:
    """Of the inverse and of the gradients, and the drift."""
    dtype, mixed, grid = SETTINGS[setting]

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()

    torch.manual_seed(seed)
    functions: list[nn.Module] = [bottleneck(CHANNELS) for _ in range(depth)]
    net = Sequential(Split(), *map(Coupling, functions), Merge())
    x = torch.randn(SHAPE)
    right = gradients_of(copy.deepcopy(net).double(), x.double(), nullcontext)
    net, x = net.to(dtype), x.to(dtype)
    if grid is not None:
        net.grid = grid
        x = net.snap(x)
    with torch.no_grad(), autocast():
        back = net.inverse(net(x))
    kept = gradients_of(net, x, autocast)
    net.backprop = Reconstruct(on_drift="record")
    again = gradients_of(net, x, autocast)
    drift = 0.0 if grid else float(net.drift or 0.0)  # on a grid it says whether any bit differs
    return {
        "inverse": ((back - x).norm() / x.norm()).item(),
        "gradients": ((again - kept).norm() / kept.norm()).item(),
        "drift": drift,
        "rounding": ((kept - right).norm() / right.norm()).item(),
    }


def middle(found: dict[str, dict[int, list[dict[str, float]]]], setting: str, depth: int, what: str) -> float:
    """The median of the seeds."""
    return statistics.median(each[what] for each in found[setting][depth])


def draw_bytes(found: dict[str, dict[int, int]], path: Path) -> None:
    """Peak against depth, one line for each contender."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, peaks in found.items():
        ours = not (name.startswith("ckpt") or name in ("memcnn", "revtorch", "revlib"))
        axes.plot(list(peaks), [p / 2**20 for p in peaks.values()], "o-" if ours else "x--", label=COUNTED[name], ms=4)
    axes.set(xlabel="couplings", ylabel="peak of a training step, MiB", xscale="log", yscale="log")
    ticks(axes, next(iter(found.values())))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, facecolor="white")


def draw_errors(found: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> None:
    """Errors against depth, without those that are zero: these are named in the legend."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    titles = {"inverse": "error of the inverse", "gradients": "error of reconstructed gradients"}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (what, title) in zip(panels, titles.items(), strict=True):
        for i, (setting, depths) in enumerate(found.items()):
            low, high = ([pick(each[what] for each in depths[d]) for d in depths] for pick in (min, max))
            line = [middle(found, setting, d, what) for d in depths]
            if max(high) == 0:
                axes.plot([], [], color=f"C{i}", label=f"{setting}: 0, to the bit")
                continue
            axes.plot(list(depths), line, "o-", color=f"C{i}", ms=4, label=setting)
            if what == "gradients" and setting != "float64":
                rounding = [middle(found, setting, d, "rounding") for d in depths]
                axes.plot(list(depths), rounding, ":", color=f"C{i}", label=f"{setting}: rounding, stored")
            axes.fill_between(list(depths), low, high, color=f"C{i}", alpha=0.25, linewidth=0)
        axes.set(title=title, xlabel="couplings", xscale="log", yscale="log")
        ticks(axes, next(iter(found.values())))
    panels[0].set_ylabel("relative error")
    figure.legend(*panels[1].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, facecolor="white")


def ticks(axes: Axes, depths: Sequence[int] | dict[int, Any]) -> None:
    """Writes the depths themselves below the axis."""
    axes.set_xticks(list(depths), [str(d) for d in depths])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def bytes_table(found: dict[str, dict[int, int]], depths: Sequence[int]) -> Table:
    """MiB at the peak."""
    result = Table("peak, MiB", *map(str, depths))
    for name, peaks in found.items():
        result.add_row(COUNTED[name], *(f"{p / 2**20:.2f}" for p in peaks.values()))
    return result


def errors_table(found: dict[str, dict[int, list[dict[str, float]]]], what: str, depths: Sequence[int]) -> Table:
    """Medians."""
    result = Table(what, *map(str, depths))
    for setting in found:
        result.add_row(setting, *(f"{middle(found, setting, d, what):.0e}" for d in depths))
    return result


def main() -> None:
    """Counts, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = console_of(110)
    counted: dict[str, dict[int, int]] = {}
    for name in COUNTED:
        print(name, file=sys.stderr)
        try:
            counted[name] = {depth: peak_of(name, depth) for depth in options.depths}
        except ModuleNotFoundError as error:
            console.print(f"without {error.name}: pip install '.[bench]'", highlight=False)
    console.print(bytes_table(counted, options.depths))
    errors: dict[str, dict[int, list[dict[str, float]]]] = {}
    for setting in SETTINGS:
        print(setting, file=sys.stderr)
        errors[setting] = {
            depth: [errors_of(setting, depth, seed) for seed in range(options.seeds)] for depth in options.depths
        }
    for what in ("inverse", "gradients", "drift", "rounding"):
        console.print(errors_table(errors, what, options.depths))
    folder = Path("runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    draw_bytes(counted, folder / "depth-bytes.svg")
    draw_errors(errors, folder / "depth-errors.svg")
    console.print(f"the pictures are {folder}/depth-bytes.svg and {folder}/depth-errors.svg", highlight=False)
    keep(console, "depth", bytes=counted, errors=errors)


if __name__ == "__main__":
    main()
