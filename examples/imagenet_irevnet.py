"""Trains an i-RevNet, evaluates it, and runs it backwards to the pixels.

Without arguments: writes scikit-learn's 1,797 handwritten digits as an
ImageNet-style tree of image files, trains the small i-RevNet on them, and
inverts the validation images from its last features. With --data DIR: the
same for ImageNet, as folders or as its tar files. Under torchrun: on all
processes that it starts. The same command goes on with a run that was cut off.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

import zoo
from zoo import plots
from zoo.arguments import byte_count, count, positive, rate, share, workers
from zoo.augment import Preparation
from zoo.building import build, find_device, load_net
from zoo.checkpoints import CHECKPOINTS
from zoo.configuring import default_device, fresh, prepared, recipe_of
from zoo.courses import courses_of
from zoo.data import open_data
from zoo.data.order import steps_in_epoch
from zoo.distributed import PARALLEL, World, joined
from zoo.dry_run import costs, size_of
from zoo.errors import DivergedError, InputError
from zoo.inversion import InversionError, file_batches, invert_batches, relative_errors
from zoo.progress import Reporter, say
from zoo.recipes import RECIPES
from zoo.run import AUTOCAST, BACKPROP, GRIDS
from zoo.schedule import steps, warmup_steps
from zoo.stopping import Interrupted, Terminated, stopping
from zoo.training import Trainer

INVERT_TAKES = {"invert", "resume", "model", "size", "grid", "device", "seed", "output", "recipe"}
PICTURES = 10  # as many as fit side by side


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A run is kept in runs/NAME: config.json, metrics.jsonl, checkpoints/,\n"
        "model.safetensors, curves.png, reconstructions.png. docs/imagenet.md leads\n"
        "from ImageNet's tar files to the number.",
    )
    what = p.add_argument_group("what to train")
    what.add_argument("--data", metavar="DIR", help="folder of the images (default: the embedded digits)")
    what.add_argument("--recipe", metavar="NAME", help=f"{', '.join(RECIPES)} (default: the paper's (b), or digits)")
    what.add_argument(
        "--model", metavar="NAME", help=f"{', '.join(zoo.names(kind='classifier'))} (default: the recipe's)"
    )
    what.add_argument("--epochs", type=positive, metavar="N", help="passes over the training images")
    what.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per step, over all processes; the rate follows"
    )
    what.add_argument("--lr", type=rate, metavar="X", help="largest learning rate, instead of the linear rule's")
    what.add_argument("--size", type=positive, metavar="PIXELS", help="height and width that the network sees")
    what.add_argument("--seed", type=count, metavar="N", help="of weights, order and augmentation (default: 0)")
    how = p.add_argument_group("how to compute")
    how.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    how.add_argument(
        "--backprop",
        choices=list(BACKPROP),
        help="what is kept for the gradients: everything, inputs or outputs of blocks (default: reconstruct)",
    )
    how.add_argument("--budget", type=byte_count, metavar="BYTES", help="of activations, such as 20G, instead of that")
    how.add_argument(
        "--grid",
        choices=list(GRIDS),
        help="what values between blocks are rounded to: on a grid the inverse has no error (default: exact)",
    )
    how.add_argument("--autocast", choices=AUTOCAST, help="what products are computed in (default: the recipe's)")
    how.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="how images and weights lie in a GPU's memory (default: the recipe's)",
    )
    how.add_argument("--parallel", choices=PARALLEL, help="how processes share the network (default: ddp)")
    how.add_argument("--accumulate", type=positive, metavar="N", help="parts that each process takes its batch in")
    how.add_argument("--compile", action="store_true", default=None, help="compile the functions of the blocks")
    how.add_argument("--deterministic", action="store_true", default=None, help="the same bits each time, on a GPU too")
    how.add_argument(
        "--workers", type=workers, metavar="N", help="processes that read images (default: one per core but one, to 8)"
    )
    how.add_argument("--max-bad", type=share, metavar="X", help="share of unreadable images that ends (default 0.001)")
    how.add_argument(
        "--skip-bad", action="store_true", default=None, help="leave out unreadable validation images, and count them"
    )
    how.add_argument("--max-skipped", type=positive, metavar="N", help="steps in a row without a finite loss (10)")
    keep = p.add_argument_group("what to keep")
    keep.add_argument("--output", type=Path, metavar="DIR", help="folder of the run (default: one in runs/)")
    keep.add_argument(
        "--resume", metavar="auto|never|DIR", help="go on with what is in the folder (auto, the default), or with DIR"
    )
    keep.add_argument("--allow-change", action="store_true", default=None, help="go on with another configuration")
    keep.add_argument("--save-every", type=positive, metavar="STEPS", help="checkpoints besides those of each epoch")
    keep.add_argument("--keep", type=positive, metavar="N", help="newest checkpoints that stay (default: 3)")
    keep.add_argument("--keep-every", type=positive, metavar="STEPS", help="those that stay, too")
    keep.add_argument("--log-every", type=positive, metavar="STEPS", help="from one row of the log to the next")
    keep.add_argument("--tensorboard", action="store_true", default=None, help="write the log for TensorBoard, too")
    instead = p.add_argument_group("instead of training").add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", default=None, help="say what would be done, and what it takes"
    )
    instead.add_argument("--evaluate", action="store_true", default=None, help="evaluate the run of --resume DIR")
    instead.add_argument(
        "--invert",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="run these images forward and backwards, through the run of --resume DIR or untrained weights",
    )
    instead.add_argument(
        "--curves", nargs="+", type=Path, metavar="DIR", help="draw these runs in one picture, --output or curves.png"
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    given = {key: value for key, value in vars(parser().parse_args(arguments)).items() if value is not None}
    console = Console()
    try:
        if "curves" in given:
            return draw_curves(given, console)
        if "invert" in given:
            return invert(given, console)
        with joined(given.get("device", default_device())) as world:
            try:
                return train(given, world, console if world.main else None)
            except (InputError, OSError) as error:
                return failed(error) if world.first_to_say(str(error)) else 2
    except (InputError, OSError) as error:  # a full disk, a folder that is a file, a name that is too long
        return failed(error)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return failed(InputError("a process that reads images was killed; go on with fewer --workers"))  # at any line
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def failed(error: Exception) -> int:
    """Says what is wrong, in a line."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def train(given: dict[str, Any], world: World, console: Console | None) -> int:
    """Trains, or goes on, or only evaluates or counts; then reports."""

    def tell(line: str) -> None:
        if console is not None:
            say(console, line)

    if "evaluate" in given and given.get("resume", "auto") in {"auto", "never"}:
        raise InputError("--evaluate needs a run: add --resume DIR")
    run, folder = prepared(given, world, tell)
    if run.recipe.threads:
        torch.set_num_threads(run.recipe.threads)
    if "dry_run" in given:
        return dry_run(run, world, tell)
    trainer = Trainer(run, folder, world=world)
    with closing(trainer.books):
        return carried_out(trainer, given, console)


def carried_out(trainer: Trainer, given: dict[str, Any], console: Console | None) -> int:
    """Does what is asked for with a run, and says so in the main process."""
    run, folder = trainer.run, trainer.folder

    def tell(line: str) -> None:
        if console is not None:
            say(console, line)

    if "evaluate" not in given:
        trainer.claim()
    restored = given.get("resume") != "never" and trainer.restore(say=tell)
    if "evaluate" in given and not restored:
        raise InputError(f"no checkpoint in {folder}: nothing to evaluate")
    reporter = Reporter(console, total=trainer.total, done=trainer.step, log_every=run.recipe.log_every)
    try:
        with stopping() as trainer.stop:
            trainer.world.gathered(None)  # a signal ends no process when the lines below say that the run goes
            if "evaluate" not in given:
                announce(trainer, tell, restored=restored)
                trainer.fit(reporter)
            cells = report(trainer, reporter)
            if "evaluate" not in given:
                trainer.finish(cells)
    except (Interrupted, Terminated, KeyboardInterrupt) as stop:
        if console is not None:
            print(stopped(trainer, stop), file=sys.stderr)
        return 0 if isinstance(stop, Terminated) else 130
    return 0


def announce(trainer: Trainer, tell: Callable[[str], None], *, restored: bool) -> None:
    """Says what begins, where, and after which step."""
    recipe = trainer.run.recipe
    warm = warmup_steps(recipe, per_epoch=trainer.per_epoch)
    if warm >= trainer.total:
        tell(f"the warm-up takes {warm} steps, and the run has {trainer.total}: the learning rate only rises")
    on = f"{recipe.model} on {len(trainer.training)} images, run kept in {trainer.folder}"
    tell(on + (f", going on after step {trainer.step} of {trainer.total}" if restored else ""))


def dry_run(run: Any, world: World, tell: Any) -> int:
    """Says what the run is, and what it takes."""
    with world.main_first():
        data = open_data(run.data)
    recipe, classes = run.recipe, len(data.classes)
    per_epoch = steps_in_epoch(len(data.training), recipe.batch_size, world=run.world_size, parts=run.accumulate)
    total = steps(recipe, per_epoch=per_epoch)
    for name, value in dataclasses.asdict(run).items():
        if name != "recipe":
            tell(f"{name} = {json.dumps(value)}")
    for name, value in dataclasses.asdict(recipe).items():
        tell(f"recipe.{name} = {json.dumps(value)}")
    size = size_of(run, classes)
    tell(f"images: {len(data.training):,} for training, {len(data.validation):,} for validation, {classes} classes")
    tell(f"steps: {total:,} of {recipe.batch_size} images, {per_epoch:,} in an epoch")
    tell(f"parameters: {size.parameters:,}")
    tell(f"forward pass of an image: {size.flops / 1e9:.2f} GFLOP (a multiplication and an addition are two)")
    tell(f"parameters, gradients, momentum, average: {size.held / 2**20:,.1f} MiB")
    device = find_device(run.device)
    available = memory_of(device)
    found = list(costs(run, classes))
    counted = (
        "activations of a training step, counted:"
        if found
        else "under autocast activations are counted of i-RevNets only"
    )
    tell(f"memory of {device}: {available / 2**30:.1f} GiB; {counted}")
    for name, cost in found:
        fits = cost.largest(available - size.held)
        tell(f"  {name}: {cost.per_image / 2**20:,.1f} MiB per image, largest batch per process that fits {fits:,}")
    return 0


def memory_of(device: torch.device) -> int:
    """Bytes: of a GPU all, of this machine what is free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise InputError("--dry-run can't tell how much memory is free here; on Linux it can")


def report(trainer: Trainer, reporter: Reporter) -> dict[str, str]:
    """Evaluates, inverts, prints the table, and returns what is in it."""
    result = trainer.evaluate()
    cells = {
        "top-1 accuracy": f"{result.top1:.2f} %",
        "top-5 accuracy": f"{result.top5:.2f} %",
        "validation loss": f"{result.loss:.4f} nats",
        "training time": f"{trainer.books.seconds:.1f} s",
        "training speed": f"{trainer.images_per_second:.0f} images/s",
        "parameters": f"{sum(p.numel() for p in trainer.net.parameters()):,}",
    }
    if trainer.peak is not None:
        kept = trainer.run.kept if isinstance(trainer.net, zoo.ReversibleNetwork) else "store"
        cells |= {"peak of activations": f"{trainer.peak / 2**20:.1f} MiB ({kept})"}
    if trainer.books.drift is not None:
        cells |= {"largest drift": f"{trainer.books.drift:.1e}" if trainer.books.drift else "0"}
    if trainer.books.skipped:
        cells |= {"steps skipped": f"{trainer.books.skipped}, for a loss that was not finite"}
    if trainer.books.bad:
        cells |= {"unreadable images": f"{len(trainer.books.bad)}, replaced; bad_images.jsonl names them"}
    if result.unread:
        cells |= {"validation images left out": f"{result.unread}, which can't be read"}
    pictures = "curves.png"
    unwritten: InputError | None = None
    try:
        error = trainer.invert()
        pictures += "" if error is None else ", reconstructions.png"
        cells |= {} if error is None else {"inversion error ε": mean_median_max(error)}
    except DivergedError as error:  # what was learnt is none the worse
        cells |= {"inversion error ε": str(error).partition(";")[0]}
    except InputError as error:  # the accuracy, which may have taken hours, is told all the same
        unwritten = error
    reporter.table(f"{trainer.run.recipe.model}: {result.images} validation images", cells)
    if unwritten is not None:
        raise unwritten
    reporter.say(f"{pictures}, model.safetensors and the rest are in {trainer.folder}")
    return cells


def invert(given: dict[str, Any], console: Console) -> int:
    """Runs image files through a network and back, and says how far off each is."""
    resumed = given.get("resume", "auto") not in {"auto", "never"}
    takes = INVERT_TAKES - {"model", "size", "seed", "output", "recipe"} if resumed else INVERT_TAKES
    refused = sorted(given.keys() - takes)
    if refused:
        raise InputError(f"--invert has no use for --{refused[0].replace('_', '-')} here; drop it")
    device = find_device(given.get("device", default_device()))
    if resumed:
        net, run = load_net(Path(given["resume"]), device)
        recipe, folder = run.recipe, Path(given["resume"])
    else:
        recipe = recipe_of(given)
        folder = given.get("output") or fresh(Path("runs") / "inverted")
        torch.manual_seed(given.get("seed", 0))
        net = build(recipe, num_classes=1000).to(device)
        say(console, f"{recipe.model} with untrained weights; --resume DIR takes those of a run")
        given.setdefault("grid", "exact")
    if not isinstance(net, zoo.IRevNet):
        raise InputError(f"{recipe.model} has no inverse; --model takes an i-RevNet, such as irevnet_b")
    if "grid" in given:
        net.grid = GRIDS[given["grid"]]
    errors: list[torch.Tensor] = []
    pictures: list[tuple[torch.Tensor, torch.Tensor]] = []
    restored = Preparation(recipe).restored
    results = invert_batches(net, file_batches(given["invert"], recipe, device))
    for path, (image, recovered) in zip(given["invert"], results, strict=True):
        errors.append(relative_errors(recovered, image).cpu())
        pictures = [*pictures, (restored(image)[0].cpu(), restored(recovered)[0].cpu())][:PICTURES]
        say(console, f"{path}: relative error {errors[-1].item():.1e}")
    say(console, f"ε = {mean_median_max(InversionError.of(torch.cat(errors)))}")
    images, recoveries = (torch.stack(list(column)) for column in zip(*pictures, strict=True))
    plots.reconstructions(images, recoveries, folder / "inverted.png")
    say(console, f"{folder / 'inverted.png'}")
    return 0


def draw_curves(given: dict[str, Any], console: Console) -> int:
    """Draws several runs in one picture."""
    refused = sorted(given.keys() - {"curves", "output"})
    if refused:
        raise InputError(f"--curves has no use for --{refused[0].replace('_', '-')}; drop it")
    path = given.get("output", Path("curves.png"))
    plots.save(plots.draw_curves(courses_of(given["curves"])), path)
    say(console, str(path))
    return 0


def mean_median_max(error: InversionError) -> str:
    """The paper's measure first, then median and maximum."""
    if error.maximum == 0:
        return "0 (every pixel, bit for bit)"
    return f"{error.mean:.2e} (median {error.median:.2e}, maximum {error.maximum:.2e})"


def stopped(trainer: Trainer, stop: BaseException) -> str:
    """What to say after Ctrl-C or a scheduler's signal."""
    if isinstance(stop, KeyboardInterrupt) and not list((trainer.folder / CHECKPOINTS).glob("step_*")):
        return "stopped"
    whole = not isinstance(stop, KeyboardInterrupt)  # a second Ctrl-C ends the program before it can save
    kept = f"after step {trainer.step} of {trainer.total}; what was learnt is kept" if whole else "at the last save"
    launcher = [sys.executable]
    if trainer.world.size > 1:
        launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "N")]
    command = shlex.join([*launcher, sys.argv[0], "--resume", str(trainer.folder)])
    return f"stopped {kept}. Go on with:\n  {command}"


if __name__ == "__main__":
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    sys.exit((record(main) if under_torchrun else main)())  # writes a traceback where torchrun finds it
