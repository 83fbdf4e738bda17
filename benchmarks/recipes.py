"""Steps of the ImageNet recipes at full size: images per second and peak of activations, by what is kept.

    python -m benchmarks.recipes [--device cuda] [--batch 64] [--steps 10] [--recipes NAME ...] [--backprop NAME ...]

Each recipe's network trains on random images of the recipe's size, by the recipe's own step: autocast, grid, colours,
mixing, optimiser; ``resnet50`` is torchvision's, by the recipe of the paper. The first step is for the peak, and to
be warm; the speed is that of the others together, by the clock. Prints a table and writes every number to
runs/benchmarks/recipes-TIME.json. Meant for a GPU; on a CPU take `--batch 2 --steps 1`.
"""

import argparse
import dataclasses
import time
from typing import Any

import torch
from rich.table import Table

from benchmarks.report import console_of, keep
from zoo.augment import DRAWS
from zoo.configuring import default_device
from zoo.data import Batch
from zoo.distributed import World
from zoo.learner import Learner
from zoo.recipes import RECIPES, Recipe
from zoo.run import BACKPROP, Run

CLASSES = 1000


def recipes() -> dict[str, Recipe]:
    """The ImageNet recipes, and ResNet-50 by the paper's."""
    found = {name: recipe for name, recipe in RECIPES.items() if name != "digits"}
    return found | {"resnet50": dataclasses.replace(RECIPES["paper_irevnet_b"], model="resnet50")}


def measure(recipe: Recipe, device: torch.device, batch: int, count: int) -> dict[str, Any]:
    """Takes some steps, and says how fast they were and what they needed."""
    learner = Learner(Run(recipe, device=str(device)), CLASSES, device, World())
    learner.net.train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, recipe.size, recipe.size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    data = Batch(images, labels, torch.rand(batch, DRAWS, generator=generator), [], [])
    outcomes = [learner.step([data], recipe.lr * batch / recipe.batch_size, 1)]
    start = time.perf_counter()
    outcomes += [learner.step([data], 1e-3, i) for i in range(2, 2 + count)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if not all(outcome.finite for outcome in outcomes):
        raise FloatingPointError(f"{recipe.name}: {[outcome.trouble for outcome in outcomes]}")
    return {"images_per_second": batch * count / seconds, "peak": learner.peak, "drift": outcomes[-1].drift}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recipes", nargs="+", choices=list(recipes()), default=list(recipes()))
    parser.add_argument("--backprop", nargs="+", choices=list(BACKPROP), default=list(BACKPROP))
    options = parser.parse_args()
    device = torch.device(options.device)
    console = console_of(100)
    table = Table("recipe", "kept", "images/s", "peak of activations, MiB per image", "drift")
    found: list[dict[str, Any]] = []
    for name in options.recipes:
        for kept in options.backprop if name != "resnet50" else ["store"]:
            recipe = dataclasses.replace(recipes()[name], backprop=kept)
            row = {"recipe": name, "backprop": kept, **measure(recipe, device, options.batch, options.steps)}
            found.append(row)
            drift = "-" if row["drift"] is None else f"{row['drift']:.1e}"
            peak = f"{row['peak'] / options.batch / 2**20:.1f}"
            table.add_row(name, kept, f"{row['images_per_second']:.2f}", peak, drift)
            console.print(f"{name}, {kept}: done", highlight=False)
    console.print(table)
    keep(console, "recipes", device=str(device), batch=options.batch, rows=found)


if __name__ == "__main__":
    main()
