"""Trains an i-RevNet, evaluates it, and runs it backwards to the pixels.

Without arguments: writes scikit-learn's 1,797 handwritten digits as an
ImageNet-style tree of image files, trains the small i-RevNet on them, and
inverts the validation images from its last features. With --data DIR: the
same for ImageNet, or any folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
"""

import argparse
import dataclasses
import os
import shlex
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
from zoo.progress import Reporter, say
from zoo.recipes import RECIPES, Recipe
from zoo.run import BACKPROP, GRIDS, Run
from zoo.training import Interrupted, Trainer, build, find_device, load_net

RESUME_KEEPS = {
    "data",
    "device",
    "workers",
    "backprop",
    "grid",
    "resume",
    "evaluate",
    "invert",
}  # the rest is the run's own
INVERT_TAKES = {"invert", "resume", "model", "size", "grid", "device", "seed", "output"}
PICTURES = 10  # as many as fit side by side


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
    p.add_argument(
        "--backprop",
        choices=list(BACKPROP),
        help="what is kept for the gradients: everything, inputs or outputs of blocks (default: reconstruct)",
    )
    p.add_argument(
        "--grid",
        choices=list(GRIDS),
        help="what values between blocks are rounded to: on a grid the inverse has no error (default: exact)",
    )
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
    instead = p.add_mutually_exclusive_group()
    instead.add_argument(
        "--evaluate", action="store_true", default=None, help="do not train: evaluate the run of --resume"
    )
    instead.add_argument(
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
    except OSError as error:  # a full disk, a folder that is a file, a name that is too long
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as interrupt:
        kept = trainer is not None and (trainer.folder / "checkpoint.pt").exists()
        print(stopped(trainer, interrupt) if trainer and kept else "stopped", file=sys.stderr)
        return 130
    return 0


def prepare(given: dict[str, Any]) -> Trainer:
    """Builds the run that the options ask for, or takes up an old one."""
    places = {key: given[key] for key in ("data", "device", "workers", "backprop", "grid") if key in given}
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
    backprop = given.get("backprop", "reconstruct")
    device = given.get("device", default_device())
    grid = given.get("grid", "exact")
    run = Run(recipe, given.get("data"), seed=seed, device=device, workers=workers, backprop=backprop, grid=grid)
    folder = given.get("output") or fresh(Path("runs") / f"{recipe.name}-{recipe.model}-seed{seed}")
    if (folder / "checkpoint.pt").exists():
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
    if trainer.peak is not None:
        cells |= {"peak of activations": f"{trainer.peak / 2**20:.1f} MiB ({trainer.run.backprop})"}
    if trainer.drift is not None:
        cells |= {"largest drift": f"{trainer.drift:.1e}" if trainer.drift else "0"}
    if error is not None:
        cells |= {"inversion error ε": mean_median_max(error)}
    reporter.table(f"{trainer.run.recipe.model}: {result.images} validation images", cells)
    reporter.say(f"curves.png, reconstructions.png, model.safetensors and the rest are in {trainer.folder}")


def invert(given: dict[str, Any], console: Console) -> None:
    """Runs image files through a network and back, and says how far off each is."""
    refused = sorted(given.keys() - (INVERT_TAKES & RESUME_KEEPS if "resume" in given else INVERT_TAKES))
    if refused:
        raise InputError(f"--invert has no use for --{refused[0].replace('_', '-')} here; drop it")
    device = find_device(given.get("device", default_device()))
    if "resume" in given:
        net, run = load_net(given["resume"], device)
        recipe, folder = run.recipe, given["resume"]
    else:
        recipe = chosen(given)
        folder = given.get("output") or fresh(Path("runs") / "inverted")
        torch.manual_seed(given.get("seed", 0))
        net = build(recipe, num_classes=1000).to(device)
        say(console, f"{recipe.model} with untrained weights; --resume DIR takes those of a run")
        given.setdefault("grid", "exact")
    if not isinstance(net, zoo.IRevNet):
        raise InputError(f"{recipe.model} has no inverse; --model takes {', '.join(zoo.names())}")
    if "grid" in given:
        net.grid = GRIDS[given["grid"]]
    errors: list[torch.Tensor] = []
    pictures: list[tuple[torch.Tensor, torch.Tensor]] = []
    results = invert_files(net, given["invert"], evaluation_transform(recipe), device=device)
    for path, (image, recovered) in zip(given["invert"], results, strict=True):
        errors.append(relative_errors(recovered, image).cpu())
        pictures = [*pictures, (image[0].cpu(), recovered[0].cpu())][:PICTURES]
        say(console, f"{path}: relative error {errors[-1].item():.1e}")
    say(console, f"ε = {mean_median_max(InversionError.of(torch.cat(errors)))}")
    images, recoveries = (torch.stack(list(column)) for column in zip(*pictures, strict=True))
    plots.reconstructions(images, recoveries, folder / "inverted.png")
    say(console, f"{folder / 'inverted.png'}")


def mean_median_max(error: InversionError) -> str:
    """The paper's measure first, then median and maximum."""
    if error.maximum == 0:
        return "0 (every pixel, bit for bit)"
    return f"{error.mean:.2e} (median {error.median:.2e}, maximum {error.maximum:.2e})"


def stopped(trainer: Trainer, interrupt: BaseException) -> str:
    """What to say after Ctrl-C."""
    whole = isinstance(interrupt, Interrupted)  # a second Ctrl-C ends the program before it can save
    kept = f"after step {trainer.step} of {trainer.total}; what was learnt is kept" if whole else "at the last save"
    command = shlex.join([sys.executable, sys.argv[0], "--resume", str(trainer.folder)])
    return f"stopped {kept}. Go on with:\n  {command}"


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
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must not be negative nor above 2**63, got {text}")
    return number


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
