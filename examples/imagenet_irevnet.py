"""Trains an i-RevNet, evaluates it, and runs it backwards to the pixels.

Without arguments: writes scikit-learn's 1,797 handwritten digits as an
ImageNet-style tree of image files, trains the small i-RevNet on them, and
inverts the validation images from its last features. With --data DIR: the
same for ImageNet, or any folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import zoo
from zoo import plots
from zoo.data import evaluation_transform
from zoo.errors import InputError
from zoo.inversion import InversionError, invert_files, relative_errors
from zoo.progress import Reporter
from zoo.recipes import RECIPES, Recipe
from zoo.training import Interrupted, Run, Trainer, build, find_device

RESUME_KEEPS = {"data", "device", "workers", "resume", "evaluate", "invert"}  # the rest is the run's own


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A run is kept in runs/NAME: config.json, metrics.jsonl, checkpoint.pt,\n"
        "model.safetensors, curves.png, reconstructions.png.",
    )
    p.add_argument("--data", metavar="DIR", help="folder with train/ and val/ (default: the embedded digits)")
    p.add_argument("--model", metavar="NAME", help=f"{', '.join(zoo.names())} (default: the recipe's)")
    p.add_argument("--epochs", type=_positive, metavar="N", help="passes over the training images")
    p.add_argument("--batch-size", type=_positive, metavar="N", help="images per step")
    p.add_argument("--lr", type=_rate, metavar="X", help="largest learning rate")
    p.add_argument("--size", type=_positive, metavar="PIXELS", help="height and width that the network sees")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    p.add_argument("--seed", type=_count, metavar="N", help="of weights, order and augmentation (default: 0)")
    p.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="processes that read images (default: one per core but one, at most 8)",
    )
    p.add_argument("--output", type=Path, metavar="DIR", help="folder of the run (default: a new one in runs/)")
    p.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    p.add_argument("--evaluate", action="store_true", default=None, help="do not train: evaluate the run of --resume")
    p.add_argument(
        "--invert",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="do not train: run these images forward and backwards, through the run of --resume or untrained weights",
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    given = {key: value for key, value in vars(parser().parse_args(arguments)).items() if value is not None}
    console = Console()
    trainer: Trainer | None = None
    try:
        if "invert" in given:
            invert(given, console)
            return 0
        trainer = prepare(given)
        if trainer.run.recipe.threads:
            torch.set_num_threads(trainer.run.recipe.threads)
        reporter = Reporter(console, total=trainer.total, done=trainer.step)
        if "evaluate" not in given:
            reporter.say(f"{trainer.run.recipe.model} on {len(trainer.training)} images, run kept in {trainer.folder}")
            trainer.fit(reporter)
        report(trainer, reporter)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as interrupt:
        saved = isinstance(interrupt, Interrupted) and trainer is not None
        print(stopped(trainer) if saved and trainer else "stopped", file=sys.stderr)
        return 130
    return 0


def prepare(given: dict[str, Any]) -> Trainer:
    """Builds the run that the options ask for, or takes up an old one."""
    places = {key: given[key] for key in ("data", "device", "workers") if key in given}
    if "resume" in given:
        refused = sorted(given.keys() - RESUME_KEEPS)
        if refused:
            option = "--" + refused[0].replace("_", "-")
            raise InputError(f"--resume goes on with the run as it was configured; drop {option}")
        return Trainer.resume(given["resume"], **places)
    if "evaluate" in given:
        raise InputError("--evaluate needs a run: add --resume DIR")
    recipe = chosen(given)
    seed = given.get("seed", 0)
    workers = given.get("workers", min(8, (os.cpu_count() or 1) - 1))
    run = Run(recipe, given.get("data"), seed=seed, device=given.get("device", default_device()), workers=workers)
    folder = given.get("output") or fresh(Path("runs") / f"{recipe.name}-{recipe.model}-seed{seed}")
    if (folder / "config.json").exists():
        raise InputError(
            f"{folder} holds a run already; go on with it by --resume {folder}, or choose another --output"
        )
    return Trainer(run, folder)


def chosen(given: dict[str, Any]) -> Recipe:
    """The recipe, with what the options change."""
    recipe = RECIPES["imagenet" if "data" in given else "digits"]
    changes = {key: given[key] for key in ("model", "batch_size", "lr", "size") if key in given}
    if "epochs" in given:
        changes |= {"epochs": given["epochs"], "iterations": None}
    if "size" in given:
        changes["resize"] = round(recipe.resize * given["size"] / recipe.size)
    return dataclasses.replace(recipe, **changes)


def fresh(folder: Path) -> Path:
    """The folder, or with a number behind it if there is one already."""
    candidates = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in range(1, sys.maxsize))
    return next(path for path in candidates if not path.exists())


def report(trainer: Trainer, reporter: Reporter) -> None:
    """Evaluates, inverts, and prints the table."""
    result, error = trainer.evaluate(), trainer.invert()
    cells = {
        "top-1 accuracy": f"{result.top1:.2f} %",
        "top-5 accuracy": f"{result.top5:.2f} %",
        "validation loss": f"{result.loss:.4f} nats",
        "training time": f"{trainer.seconds:.1f} s",
        "training speed": f"{trainer.images_per_second:.0f} images/s",
        "parameters": f"{sum(p.numel() for p in trainer.net.parameters()):,}",
    }
    if error is not None:
        cells |= {"inversion error ε": mean_median_max(error)}
    reporter.table(f"{trainer.run.recipe.model}: {result.images} validation images", cells)
    reporter.say(f"curves.png, reconstructions.png, model.safetensors and the rest are in {trainer.folder}")


def invert(given: dict[str, Any], console: Console) -> None:
    """Runs image files through a network and back, and says how far off each is."""
    if "resume" in given:
        trainer = prepare(given)
        net, recipe, folder, device = trainer.net, trainer.run.recipe, trainer.folder, trainer.device
    else:
        recipe, device = chosen(given), find_device(given.get("device", default_device()))
        folder = given.get("output") or fresh(Path("runs") / "inverted")
        torch.manual_seed(given.get("seed", 0))
        net = build(recipe, num_classes=1000).to(device)
        console.print(f"{recipe.model} with untrained weights; --resume DIR takes those of a run", highlight=False)
    if not isinstance(net, zoo.IRevNet):
        raise InputError(f"{recipe.model} has no inverse; --model takes {', '.join(zoo.names())}")
    images, recovered = invert_files(net, given["invert"], evaluation_transform(recipe), device=device)
    errors = relative_errors(recovered, images)
    for path, error in zip(given["invert"], errors.tolist(), strict=True):
        console.print(f"{path}: relative error {error:.1e}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"ε = {mean_median_max(InversionError.of(errors))}", highlight=False)
    plots.reconstructions(images.cpu(), recovered.cpu(), folder / "inverted.png")
    console.print(f"{folder / 'inverted.png'}", highlight=False)


def mean_median_max(error: InversionError) -> str:
    """The paper's measure first, then median and maximum."""
    return f"{error.mean:.2e} (median {error.median:.2e}, maximum {error.maximum:.2e})"


def stopped(trainer: Trainer) -> str:
    """What to say after Ctrl-C."""
    done = f"stopped after step {trainer.step} of {trainer.total}; what was learnt is kept"
    return f"{done}. Go on with:\n  python {sys.argv[0]} --resume {trainer.folder}"


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return number


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
