"""``python -m zoo.analysis NAME --checkpoint RUN`` makes one of the paper's figures of a network, with its numbers."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from zoo.analysis import (
    contraction,
    curves,
    dimensionality,
    everything,
    interpolation,
    metamers,
    perturbation,
    roundoff,
    sensitivity,
    separation,
    spectrum,
)
from zoo.analysis.figures import check_output
from zoo.analysis.subject import add_beside, threads_for
from zoo.arguments import count, positive
from zoo.configuring import default_device
from zoo.errors import InputError, in_memory
from zoo.stopping import stopped_by_sigterm

ANALYSES = {
    "curves": (curves, "training loss and validation of one run or several (Figure 3)"),
    "spectrum": (spectrum, "singular values of the features' differential at an image (Figure 4)"),
    "interpolation": (interpolation, "images on the line between the features of two (Figure 5)"),
    "separation": (separation, "accuracy of simple classifiers on the features after every block (Figure 6)"),
    "dimensionality": (dimensionality, "accuracy by the number of principal components (Figure 7)"),
    "contraction": (contraction, "distances within and between classes, and dimension, by depth (section 5)"),
    "roundoff": (roundoff, "how far off the inverse is, by image and by block (section 4.2)"),
    "sensitivity": (sensitivity, "the condition of each block, and where the inverse amplifies"),
    "perturbation": (perturbation, "what comes back of features, or values at a block, with noise added"),
    "metamers": (metamers, "images with the logits of one image and the features of another, nearly"),
}

_ALL = "all"
_OF_RUNS = ("curves",)
"""These look at what a run has written, and at no image."""


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each analysis, and one for all of them."""
    p = argparse.ArgumentParser(prog="python -m zoo.analysis", description="Analyses a network as the paper does.")
    commands = p.add_subparsers(dest="analysis", required=True, metavar="NAME")
    for name, (module, about) in ANALYSES.items():
        command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        _add_shared(command, images=name not in _OF_RUNS)
        module.add_arguments(command)
    about = "all of these with their defaults"
    command = commands.add_parser(_ALL, help=about, description=f"Makes {about}. What can't be made is left out.")
    _add_shared(command, images=True)
    add_beside(command)
    return p


def _add_shared(command: argparse.ArgumentParser, *, images: bool) -> None:
    """The arguments that analyses have in common; with those of what looks at images."""
    command.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a training run, or what save_pretrained wrote" if images else "a training run",
    )
    command.add_argument(
        "--output", type=Path, default=Path("runs/analysis"), metavar="DIR", help="where to (default: runs/analysis)"
    )
    if images:
        command.add_argument("--data", metavar="DIR", help="folder of the images (default: the embedded digits)")
        command.add_argument("--size", type=positive, metavar="PIXELS", help="of the images (default: the run's)")
        command.add_argument("--device", default=default_device(), metavar="NAME", help="cpu, cuda, ...")
        command.add_argument("--seed", type=count, default=0, metavar="N", help="of all that is random (default: 0)")


def main(arguments: list[str] | None = None) -> int:
    """Runs an analysis and returns the exit code: 0, 2 for wrong input, 130 after Ctrl-C, 143 after SIGTERM."""
    given = parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    with stopped_by_sigterm() as terminated:
        try:
            check_output(given.output)
            torch.set_num_threads(threads_for(given.checkpoint) or torch.get_num_threads())
            if given.analysis == _ALL:
                return everything.run(given, console, ANALYSES, parser())
            with in_memory():
                ANALYSES[given.analysis][0].run(given, console)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:  # an analysis may say what it has kept
            print(f"stopped; {stop.args[0] if stop.args else 'no figure was written'}", file=sys.stderr)
            return 143 if terminated() else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
