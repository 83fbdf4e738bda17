"""How round-off grows with depth: the inverse, the drift that a training step reports, and the gradients.

    python -m benchmarks.growth [--depths 10 30 100 300] [--seeds 3] [--channels 16] [--size 16]

Stacks of additive couplings whose functions are batch norm, ReLU and a 3 by 3 convolution, as torch initialises them,
in training mode; 16 channels, 8 in each stream, 16 by 16 pixels, batch 8, of normal noise. Columns, each the median
over the seeds:

* ``inverse``: ``|inverse(forward(x)) - x| / |x|``;
* ``drift``: what ``net.drift`` says after a step by ``Reconstruct``;
* ``gradients``: how far all parameters' gradients of that step are from those of ``Store`` in the same arithmetic,
  relatively;
* ``arithmetic``: how far those of ``Store`` are from those of ``Store`` in float64: what the arithmetic costs anyway;
* ``bound``, for float32: half of its epsilon times the product of the inverse couplings' Lipschitz constants at the
  input, each from the largest singular value of its function's derivative by power iteration.

Prints a table, draws medians and ranges to runs/benchmarks/growth.svg and writes every number to
runs/benchmarks/growth-TIME.json.
"""

import argparse
import copy
import math
import statistics
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.report import console_of, keep, markdown
from invertible import Coupling, DriftWarning, Merge, Reconstruct, Sequential, Split, Store
from invertible.backprop import Strategy
from zoo.arguments import positive

__all__ = ["ARITHMETIC", "bound", "draw", "errors"]

BATCH, POWER_STEPS = 8, 20

ARITHMETIC: dict[str, tuple[torch.dtype, bool, Literal["exact", "exact32"] | None]] = {
    "float32": (torch.float32, False, None),
    "float64": (torch.float64, False, None),
    "functions in bfloat16": (torch.float32, True, None),
    "all in bfloat16": (torch.bfloat16, False, None),
    'functions in bfloat16, grid "exact32"': (torch.float32, True, "exact32"),
    'functions in bfloat16, grid "exact"': (torch.float32, True, "exact"),
}
"""The dtype of the weights, whether autocast computes the functions in bfloat16, and the grid."""


def stack(depth: int, channels: int) -> Sequential:
    """Couplings as torch initialises their functions."""

    def function() -> nn.Module:
        half = channels // 2
        return nn.Sequential(nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1))

    return Sequential(Split(), *(Coupling(function()) for _ in range(depth)), Merge())


def gradients(net: Sequential, x: Tensor, cotangent: Tensor, strategy: Strategy, autocast: bool) -> Tensor:
    """All parameters' gradients of one step, in float64."""
    net.backprop = strategy
    net.zero_grad()
    with _autocast(autocast):
        y = net(x)
    y.backward(cotangent.to(y.dtype))
    return torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])


def errors(arithmetic: str, depth: int, *, seed: int = 0, channels: int = 16, size: int = 16) -> dict[str, float]:
    """The columns of the table, for one stack."""
    dtype, autocast, grid = ARITHMETIC[arithmetic]
    torch.manual_seed(seed)
    reference = stack(depth, channels).double()
    x, cotangent = (torch.randn(BATCH, channels, size, size, dtype=torch.float64) for _ in range(2))
    net = copy.deepcopy(reference).to(dtype)
    net.grid = grid
    x = net.snap(x.to(dtype)).to(dtype)
    with torch.no_grad(), _autocast(autocast):
        back = net.inverse(net(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # of bfloat16
        stored = gradients(net, x, cotangent, Store(), autocast)
        found = gradients(net, x, cotangent, Reconstruct(on_drift="record"), autocast)
    wide = gradients(reference, x.double(), cotangent, Store(), autocast=False)
    return {
        "inverse": distance(back, x),
        "drift": math.nan if net.drift is None else float(net.drift),
        "gradients": distance(found, stored),
        "arithmetic": distance(stored, wide),
        "bound": bound(net, x) if arithmetic == "float32" else math.nan,
    }


def bound(net: Sequential, x: Tensor) -> float:
    """Half of epsilon times the product of the inverse couplings' Lipschitz constants at ``x``."""
    product = torch.finfo(x.dtype).eps / 2
    value = net[0](x)
    for coupling in (layer for layer in net if isinstance(layer, Coupling)):
        a = slope(coupling.function, value[1])
        product *= (a + math.sqrt(a * a + 4)) / 2
        with torch.no_grad():
            value = coupling(value)
    return product


def slope(function: nn.Module, x: Tensor) -> float:
    """The largest singular value of a function's derivative, by power iteration; it moves no statistics."""
    function = copy.deepcopy(function)
    x = x.detach().requires_grad_()
    y = function(x)
    u = torch.zeros_like(y, requires_grad=True)
    (back,) = torch.autograd.grad(y, x, u, create_graph=True)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    largest = 0.0
    for _ in range(POWER_STEPS):
        (forth,) = torch.autograd.grad(back, u, v / v.norm(), retain_graph=True)
        largest = float(forth.norm())
        (v,) = torch.autograd.grad(y, x, forth, retain_graph=True)
    return largest


def distance(found: Tensor, expected: Tensor) -> float:
    """The relative error, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _autocast(on: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The inverse's and the gradients' errors against depth; what is zero at every depth is in the legend alone."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    titles = {"inverse": "the inverse", "gradients": "gradients, reconstructed against stored"}
    panels = figure.subplots(1, 2, sharey=True)
    depths = sorted({row["depth"] for row in rows})
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for i, values in enumerate(dict.fromkeys(row["values"] for row in rows)):
            at = [[row for row in rows if row["values"] == values and row["depth"] == depth] for depth in depths]
            found = [[each[column] for each in some] for some in at]
            if max(map(max, found)) == 0:
                axes.plot([], [], color=f"C{i}", label=f"{values}: 0")
                continue
            axes.plot(depths, list(map(statistics.median, found)), "o-", color=f"C{i}", ms=4, label=values)
            axes.fill_between(depths, list(map(min, found)), list(map(max, found)), color=f"C{i}", alpha=0.2, lw=0)
            if column == "gradients" and values != "float64":
                rounding = [statistics.median(each["arithmetic"] for each in some) for some in at]
                label = "the same colours: stored, against float64" if i == 0 else None
                axes.plot(depths, rounding, ":", color=f"C{i}", label=label)
        axes.set(title=title, xlabel="couplings", xscale="log", yscale="log")
        axes.set_xticks(depths, list(map(str, depths)))
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error")
    figure.legend(*panels[1].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, facecolor="white")


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=positive, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--channels", type=positive, default=16, help="an even number")
    parser.add_argument("--size", type=positive, default=16)
    options = parser.parse_args()
    if options.channels % 2:
        parser.error(f"argument --channels: must be even, got {options.channels}")
    torch.set_num_threads(1)
    columns = ("inverse", "drift", "gradients", "arithmetic", "bound")
    cells: list[list[str]] = []
    rows: list[dict[str, Any]] = []
    for arithmetic in ARITHMETIC:
        for depth in options.depths:
            sizes = {"channels": options.channels, "size": options.size}
            found = [errors(arithmetic, depth, seed=seed, **sizes) for seed in range(options.seeds)]
            rows += [{"values": arithmetic, "depth": depth, **each} for each in found]
            medians = [statistics.median(each[name] for each in found) for name in columns]
            cells.append([arithmetic, str(depth), *("" if math.isnan(m) else _shown(m) for m in medians)])
    console = console_of(140)
    console.print(markdown(["values", "depth", *columns], cells), highlight=False)
    keep(console, "growth", rows=rows)
    path = Path("runs/benchmarks/growth.svg")
    draw(rows, path)
    console.print(f"the picture is {path}", highlight=False)


def _shown(value: float) -> str:
    return f"{value:.0e}" if value else "0"


if __name__ == "__main__":
    main()
