"""Trains Glow on scikit-learn's digits without stored activations, and shows what a density of images is good for.

The digits are of 8 x 8 pixels, whole numbers from 0 to 16: 17 values. To each is added noise, uniform in [0, 1), so
that the bits per dimension that are printed bound those of the whole numbers from above; if all numbers were as
likely, there would be log2(17) = 4.09. Of each class every fifth digit is held out.

    python examples/glow_digits.py
    python examples/glow_digits.py --strategy store --epochs 10

In the folder --output are then samples.png, at several temperatures; interpolation.png, between the latent values of
two held-out digits; arithmetic.png, held-out digits of one class with the mean latent value of another class added and
that of their own taken away; likelihood.png; numbers.json; and model/, for zoo.pretrained.from_pretrained.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import zoo
from invertible import Flow
from zoo.arguments import count, positive, rate
from zoo.checkpoints import write
from zoo.digits import Digits, split_digits
from zoo.errors import DivergedError, InputError, diverging, reason
from zoo.flows import bits_per_dimension, samples
from zoo.plots import new_figure
from zoo.pretrained import save_pretrained
from zoo.progress import say
from zoo.run import BACKPROP

SHAPE, VALUES = (1, 8, 8), 17
TEMPERATURES = (0.5, 0.7, 0.85, 1.0)
PAIRS = ((1, 7), (3, 8), (5, 6), (9, 4))
"""From which class to which the arithmetic goes."""


def train(flow: Flow, training: Digits, held: Digits, options: argparse.Namespace, console: Console) -> list[Any]:
    """Trains by likelihood, and returns a row of figures for each epoch."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=options.lr)
    order = torch.Generator().manual_seed(options.seed)
    batches = math.ceil(len(training.images) / options.batch_size)
    rows, step, total = [], 0, batches * options.epochs
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total)
        for epoch in range(options.epochs):
            start, found = time.perf_counter(), []
            for batch in torch.randperm(len(training.images), generator=order).chunk(batches):
                for group in optimizer.param_groups:
                    group["lr"] = options.lr * min((step + 1) / 50, (1 + math.cos(math.pi * step / total)) / 2)
                found.append(learn(flow, training.images[batch], optimizer, step))
                step += 1
                bar.update(task, completed=step)
            seconds = time.perf_counter() - start
            rows.append({"epoch": epoch + 1, "training": sum(found) / len(found), "seconds": seconds})
            if epoch % 5 == 4 or epoch + 1 == options.epochs:
                rows[-1]["held_out"] = bits_of(flow, held.images, seed=options.seed)
            say(console, line_of(rows[-1], options.epochs))
    return rows


def learn(flow: Flow, images: Tensor, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Takes a step, and returns the bits per dimension before it.

    Raises:
        DivergedError: if they are not finite.
    """
    with diverging(f"at step {step}", otherwise=""):
        try:
            loss = bits_per_dimension(flow(value=images), SHAPE).mean()
        except ValueError as error:  # of torch's normal distribution
            if "found invalid values" in str(error):
                raise DivergedError(f"the latent values are not finite at step {step}; try a lower --lr") from None
            raise
        if not loss.isfinite():
            raise DivergedError(f"the likelihood is {loss.item()} at step {step}; try a lower --lr")
        optimizer.zero_grad()
        loss.backward()
    clip_grad_norm_(flow.parameters(), 5.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def bits_of(flow: Flow, images: Tensor, *, seed: int, draws: int = 8) -> float:
    """The mean bits per dimension over images and several draws of the noise, which are the same for a seed."""
    training = flow.training
    flow.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = [bits_per_dimension(flow(value=images), SHAPE).mean() for _ in range(draws)]
    flow.train(training)
    return float(torch.stack(found).mean())


def line_of(row: dict[str, Any], epochs: int) -> str:
    """What is printed of an epoch."""
    held = f"  held out {row['held_out']:.3f}" if "held_out" in row else ""
    epoch = f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}"
    return f"{epoch}  training {row['training']:.3f}{held} bits per dimension  {row['seconds']:.2f} s"


def combined(*terms: tuple[float, Any]) -> Any:
    """A sum of latent values, each times a number."""
    if isinstance(terms[0][1], tuple):
        return tuple(combined(*((a, z[i]) for a, z in terms)) for i in range(len(terms[0][1])))
    return sum(a * z for a, z in terms)


def mean_of(z: Any) -> Any:
    """The mean over the batch, as a batch of one."""
    return tuple(map(mean_of, z)) if isinstance(z, tuple) else z.mean(0, keepdim=True)


@torch.no_grad()
def interpolation(flow: Flow, held: Digits) -> dict[str, Tensor]:
    """Rows of images between two held-out digits: the first of a class, and of another."""
    rows = {}
    for a, b in PAIRS:
        z = [flow.transform(held.of(label)[:1]) for label in (a, b)]
        between = [combined((1 - t, z[0]), (t, z[1])) for t in torch.linspace(0, 1, 9).tolist()]
        rows[f"{a} to {b}"] = torch.cat([flow.transform.inverse(each) for each in between])
    return rows


@torch.no_grad()
def arithmetic(flow: Flow, training: Digits, held: Digits) -> dict[str, tuple[Tensor, Tensor]]:
    """Held-out digits of a class, and what becomes of them if the difference of two classes' means is added."""
    moved = {}
    for a, b in PAIRS:
        means = [mean_of(flow.transform(training.of(label))) for label in (a, b)]
        images = held.of(a)
        z = combined((1, flow.transform(images)), (1, means[1]), (-1, means[0]))
        moved[f"{a} to {b}"] = images, flow.transform.inverse(z)
    return moved


def arrived(images: Tensor, label: int, training: Digits) -> float:
    """The share of images whose nearest training digit, by pixels, is of this class."""
    nearest = torch.cdist(images.flatten(1), training.images.flatten(1)).argmin(1)
    return float((training.labels[nearest] == label).float().mean())


def draw_rows(rows: dict[str, Tensor], title: str, path: Path) -> None:
    """Draws rows of images, each with its name, dark on white."""
    columns = max(map(len, rows.values()))
    figure = new_figure(0.55 * columns + 1.2, 0.58 * len(rows) + 0.6)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (name, images), line in zip(rows.items(), grid, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, image in zip(line, images, strict=False):
            axes.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=VALUES - 1, interpolation="nearest")
        line[0].text(-0.3, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110, format="png")


def draw_likelihood(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws bits per dimension over the epochs."""
    figure = new_figure(5.5, 3.4)
    axes = figure.subplots()
    axes.plot([row["epoch"] for row in rows], [row["training"] for row in rows], label="training")
    held = [row for row in rows if "held_out" in row]
    axes.plot([row["epoch"] for row in held], [row["held_out"] for row in held], "--", marker=".", label="held out")
    axes.axhline(math.log2(VALUES), color="grey", linewidth=0.8, linestyle=":", label="all values as likely")
    axes.set(xlabel="epoch", ylabel="bits per dimension, dequantised")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, format="png")


def show(flow: Flow, training: Digits, held: Digits, rows: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Writes pictures, numbers and the model, and returns the numbers."""
    flow.eval()
    torch.manual_seed(options.seed)
    drawn = {f"T = {t:g}": samples(flow, 14, temperature=t) for t in TEMPERATURES}
    draw_rows(drawn, "samples, by temperature", options.output / "samples.png")
    draw_rows(
        interpolation(flow, held),
        "between two held-out digits, in the latent space",
        options.output / "interpolation.png",
    )
    moved = arithmetic(flow, training, held)
    parts = [(name, *(images[:9] for images in pair)) for name, pair in moved.items()]
    lines = {key: each for name, before, after in parts for key, each in ((name[0], before), (f"→ {name[-1]}", after))}
    draw_rows(lines, "held-out digits, moved from class to class", options.output / "arithmetic.png")
    draw_likelihood(rows, options.output / "likelihood.png")
    drift = flow.transform.drift  # pyright: ignore[reportAttributeAccessIssue] (a Sequential)
    numbers = {
        "bits_per_dimension": {
            "training": bits_of(flow, training.images, seed=options.seed),
            "held_out": bits_of(flow, held.images, seed=options.seed),
        },
        "dequantisation": "uniform noise in [0, 1) on whole numbers 0 to 16; the mean over 8 draws of it",
        "moved_to_class": {name: arrived(after, int(name[-1]), training) for name, (_, after) in moved.items()},
        "parameters": sum(p.numel() for p in flow.parameters()),
        "drift": drift,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "epochs": rows,
    }
    write(options.output / "numbers.json", (json.dumps(numbers, indent=2) + "\n").encode())
    save_pretrained(flow, options.output / "model")
    return numbers


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=positive, default=60, metavar="N", help="passes over the data (default: 60)")
    p.add_argument("--levels", type=positive, default=2, metavar="N", help="scales, at most 3 (default: 2)")
    p.add_argument("--steps", type=positive, default=6, metavar="N", help="of flow, at each level (default: 6)")
    p.add_argument("--width", type=positive, default=64, metavar="N", help="channels of functions (default: 64)")
    p.add_argument("--batch-size", type=positive, default=128, metavar="N", help="digits in a step (default: 128)")
    p.add_argument("--lr", type=rate, default=2e-3, metavar="X", help="largest learning rate (default: 0.002)")
    p.add_argument("--strategy", choices=list(BACKPROP), default="reconstruct", help="what is kept for the gradients")
    p.add_argument("--seed", type=count, default=0, metavar="N", help="of weights, order and noise (default: 0)")
    p.add_argument(
        "--output", type=Path, default=Path("runs/glow_digits"), metavar="DIR", help="what is written, where"
    )
    return p


def run(options: argparse.Namespace, console: Console) -> None:
    """Trains, and writes what there is to see."""
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {options.output}: {reason(error)}") from None
    training, held = split_digits()
    torch.manual_seed(options.seed)
    depth = {"levels": options.levels, "steps": options.steps, "width": options.width}
    flow: Any = zoo.create("glow", shape=SHAPE, values=VALUES, **depth)
    flow.transform.backprop = BACKPROP[options.strategy]
    many = f"{sum(p.numel() for p in flow.parameters()):,} parameters"
    say(console, f"{len(training.images)} digits, {len(held.images)} held out; {many}, strategy {options.strategy}")
    rows = train(flow, training, held, options, console)
    numbers = show(flow, training, held, rows, options)
    bits = numbers["bits_per_dimension"]
    say(console, f"training {bits['training']:.3f}, held out {bits['held_out']:.3f} bits per dimension, dequantised")
    say(console, f"written to {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 for wrong input, or 130 if it was interrupted."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)  # faster for networks this small
    try:
        run(options, Console(highlight=False))
    except (ValueError, OSError) as error:  # an InputError is one
        file = getattr(error, "filename", None)
        print(f"error: {f'{file}: ' if file else ''}{reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; nothing was saved in {options.output}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
