"""``python -m zoo.analysis NAME --checkpoint RUN`` makes one of the paper's figures of a network, with its numbers."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from zoo.analysis import contraction, dimensionality, interpolation, roundoff, separation, spectrum
from zoo.arguments import positive
from zoo.configuring import default_device
from zoo.errors import InputError

ANALYSES = {
    "spectrum": (spectrum, "singular values of the features' differential at an image (Figure 4)"),
    "interpolation": (interpolation, "images on the line between the features of two (Figure 5)"),
    "separation": (separation, "accuracy of simple classifiers on the features after every block (Figure 6)"),
    "dimensionality": (dimensionality, "accuracy by the number of principal components (Figure 7)"),
    "contraction": (contraction, "distances within and between classes, and dimension, by depth (section 5)"),
    "roundoff": (roundoff, "how far off the inverse is, by image and by block (section 4.2)"),
}


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each analysis."""
    p = argparse.ArgumentParser(prog="python -m zoo.analysis", description="Analyses a network as the paper does.")
    commands = p.add_subparsers(dest="analysis", required=True, metavar="NAME")
    for name, (module, about) in ANALYSES.items():
        command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        command.add_argument(
            "--checkpoint",
            type=Path,
            required=True,
            metavar="DIR",
            help="a training run, or what save_pretrained wrote",
        )
        command.add_argument("--data", metavar="DIR", help="folder of the images (default: the embedded digits)")
        command.add_argument(
            "--output",
            type=Path,
            default=Path("runs/analysis"),
            metavar="DIR",
            help="where to (default: runs/analysis)",
        )
        command.add_argument("--size", type=positive, metavar="PIXELS", help="of the images (default: the run's)")
        command.add_argument("--device", default=default_device(), metavar="NAME", help="cpu, cuda, ...")
        command.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: 0)")
        module.add_arguments(command)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs an analysis and returns the exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    given = parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    try:
        ANALYSES[given.analysis][0].run(given, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no figure was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
