"""Fits a flow to densities in the plane, and draws data, density and samples side by side.

The densities are known, so that what the flow misses is, too: the mean log-density of points that it has not seen is
printed beside the known one. The difference is the Kullback-Leibler divergence.

    python examples/density_2d.py
    python examples/density_2d.py --density spirals --steps 4000
    python examples/density_2d.py --flow nice
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from invertible import Flow
from zoo.arguments import count, positive
from zoo.errors import InputError
from zoo.flows import iresnet, nice, spline_flow
from zoo.flows.densities import DENSITIES, Density
from zoo.flows.fitting import fit
from zoo.plots import new_figure

FLOWS = {
    "spline_flow": spline_flow,
    "nice": lambda: nice(couplings=8),
    "iresnet": lambda: iresnet(log_det="exact"),
}
HELD_OUT, SHOWN, PIXELS = 20_000, 3000, 200


def fitted(density: Density, options: argparse.Namespace) -> Flow:
    """A flow that has seen a batch of new points in each step."""
    torch.manual_seed(options.seed)
    flow, draw = FLOWS[options.flow](), Generator().manual_seed(options.seed)
    fit(flow.parameters(), lambda: -flow(value=density.sample(256, draw)).mean(), steps=options.steps, lr=3e-3)
    return flow.eval()


def picture(flow: Flow, extent: float) -> Tensor:
    """The density on a grid of pixels, first the row of the least second feature."""
    steps = torch.linspace(-extent, extent, PIXELS)
    second, first = torch.meshgrid(steps, steps, indexing="ij")
    with torch.no_grad():
        return flow(value=torch.stack((first, second), -1).reshape(-1, 2)).exp().reshape(PIXELS, PIXELS)


def draw_row(row: Any, name: str, density: Density, flow: Flow, generator: Generator) -> None:
    """Draws data, density and samples."""
    extent = density.extent
    torch.manual_seed(0)
    parts = {"data": density.sample(SHOWN, generator), "samples": flow().sample((SHOWN,))}
    for axes, what in zip(row, ("data", "density", "samples"), strict=True):
        if what == "density":
            values = picture(flow, extent)
            top = float(values.flatten().quantile(0.998))  # a few narrow peaks would leave the rest dark
            limits = (-extent, extent, -extent, extent)
            image = axes.imshow(values.numpy(), origin="lower", extent=limits, cmap="magma_r", vmin=0, vmax=top)
            row[0].figure.colorbar(image, ax=axes, shrink=0.8, label="density (per unit of area)")
        else:
            axes.scatter(*parts[what].T, s=1, linewidths=0, alpha=0.6, color="black" if what == "data" else "C0")
        axes.set(
            xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", title=f"{name}: {what}", xlabel="$x_1$"
        )
        axes.set_ylabel("$x_2$")


def run(options: argparse.Namespace) -> Path:
    """Fits, prints and draws; returns the picture's file."""
    options.output.mkdir(parents=True, exist_ok=True)  # first: it may be no folder
    names = options.density or list(DENSITIES)
    figure = new_figure(9.5, 2.9 * len(names))
    rows = figure.subplots(len(names), 3, squeeze=False)
    unseen = Generator().manual_seed(options.seed + 1)
    for name, row in zip(names, rows, strict=True):
        density = DENSITIES[name]()
        flow = fitted(density, options)
        points = density.sample(HELD_OUT, unseen)
        with torch.no_grad():
            found, known = float(flow(value=points).mean()), float(density.log_prob(points).mean())
        what = f"held-out log-likelihood {found:.3f} nats, that of the density itself {known:.3f}"
        print(f"{name}: {what}, divergence {known - found:.3f}", flush=True)
        draw_row(row, name, density, flow, unseen)
    path = options.output / "density_2d.png"
    figure.savefig(path, dpi=90)
    return path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--density", nargs="+", choices=list(DENSITIES), metavar="NAME", help=f"{', '.join(DENSITIES)} (all)"
    )
    p.add_argument("--flow", choices=list(FLOWS), default="spline_flow", help="which one (default: spline_flow)")
    p.add_argument("--steps", type=positive, default=1000, metavar="N", help="of 256 points each (default: 1000)")
    p.add_argument("--seed", type=count, default=0, metavar="N", help="of weights and points (default: 0)")
    p.add_argument("--output", type=Path, default=Path("runs/density_2d"), metavar="DIR", help="where the picture goes")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)  # faster for networks this small
    try:
        print(f"drawn in {run(options)}")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no picture was drawn", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
