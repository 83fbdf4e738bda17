"""Learns the posterior of small inverse problems from simulations alone, and compares it with the exact one.

A flow learns the density of two unknowns given two measurements. Of a linear problem the posterior is normal; of the
two-moons problem it is two crescents. Both are known exactly, so that the divergence of the learnt one can be
printed: the mean over unknowns and measurements of log p(unknowns | measured), exact less learnt, in nats.

    python examples/posterior.py
    python examples/posterior.py --problem two_moons --steps 8000
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
from zoo.flows import spline_flow
from zoo.flows.fitting import fit
from zoo.flows.inverse_problems import LinearGaussian, Problem, TwoMoons
from zoo.plots import new_figure

PROBLEMS = {"linear": LinearGaussian, "two_moons": TwoMoons}
HELD_OUT, SHOWN = 10_000, 2000


def learnt(problem: Problem, options: argparse.Namespace) -> Flow:
    """A conditional flow that has seen a batch of new simulations in each step."""
    torch.manual_seed(options.seed)
    flow, draw = spline_flow(2, condition_features=2), Generator().manual_seed(options.seed)

    def loss() -> Tensor:
        unknowns, measured = problem.sample(256, draw)
        return -flow(measured, value=unknowns).mean()

    fit(flow.parameters(), loss, steps=options.steps, lr=3e-3)
    return flow.eval()


def divergence(problem: Problem, flow: Flow, generator: Generator) -> float:
    """Of the learnt posterior from the exact one, in nats, over simulations that it has not seen."""
    unknowns, measured = problem.sample(HELD_OUT, generator)
    with torch.no_grad():
        return float((problem.log_posterior(unknowns, measured) - flow(measured, value=unknowns)).mean())


def draw_rows(rows: Any, name: str, problem: Problem, flow: Flow, generator: Generator) -> None:
    """Draws samples of the exact posterior above those of the learnt one."""
    torch.manual_seed(0)
    found = flow(problem.shown).sample((SHOWN,))
    for column, measured in enumerate(problem.shown):
        exact = problem.posterior(measured, SHOWN, generator)
        given = ", ".join(f"{value:g}" for value in measured.tolist())
        for axes, points, what in ((rows[0, column], exact, "exact"), (rows[1, column], found[:, column], "learnt")):
            axes.scatter(*points.T, s=1, linewidths=0, alpha=0.6, color="black" if what == "exact" else "C0")
            extent = problem.extent
            axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xlabel="first unknown")
            axes.set(ylabel="second unknown", title=f"{name}, {what}\nmeasured ({given})")


def run(options: argparse.Namespace) -> Path:
    """Learns, prints and draws; returns the picture's file."""
    options.output.mkdir(parents=True, exist_ok=True)  # first: it may be no folder
    names = options.problem or list(PROBLEMS)
    figure = new_figure(8, 5.8 * len(names))
    rows = figure.subplots(2 * len(names), 3)
    unseen = Generator().manual_seed(options.seed + 1)
    for i, name in enumerate(names):
        problem = PROBLEMS[name]()
        flow = learnt(problem, options)
        print(f"{name}: divergence from the exact posterior {divergence(problem, flow, unseen):.3f} nats", flush=True)
        draw_rows(rows[2 * i : 2 * i + 2], name.replace("_", " "), problem, flow, unseen)
    path = options.output / "posterior.png"
    figure.savefig(path, dpi=90)
    return path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--problem", nargs="+", choices=list(PROBLEMS), metavar="NAME", help=f"{', '.join(PROBLEMS)} (all)")
    p.add_argument("--steps", type=positive, default=1500, metavar="N", help="of 256 simulations each (default: 1500)")
    p.add_argument("--seed", type=count, default=0, metavar="N", help="of weights and simulations (default: 0)")
    p.add_argument("--output", type=Path, default=Path("runs/posterior"), metavar="DIR", help="where the picture goes")
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
