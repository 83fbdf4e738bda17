"""How fast JPEG files become a normalised float batch: ours against torchvision's ImageFolder with its transforms.

    python -m benchmarks.loader [--rounds 31]

Sixty-four JPEGs of 500 by 375 pixels, as large as ImageNet's, are cut from the photographs at hand. Each contender, in
a process of its own on one thread, reads 32 of them, takes a random crop of 224 pixels, flips one in two, and gives a
batch of float32 with ImageNet's mean and standard deviation:

torchvision  ImageFolder, and the transforms of torchvision's reference training script on Pillow images
pillow       zoo.data with Pillow
torchcodec   zoo.data with torchcodec (if it is installed)

The speed is images per second of CPU time, and a ratio that of CPU times in the same round: its median over all rounds,
with a 95 % bootstrap interval. Prints a table and writes every number to runs/benchmarks/loader-TIME.json.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import cbook
from PIL import Image
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from zoo.augment import Preparation
from zoo.data import ImageTree, Samples, images, loader, training_transform
from zoo.recipes import RECIPES

NAMES = ("torchvision", "pillow", "torchcodec")
TREE = Path("runs/benchmarks/jpegs")
IMAGES, BATCH = 64, 32
RECIPE = dataclasses.replace(RECIPES["released_irevnet_b"], colour="none", channels_last=False)


def write_tree() -> int:
    """Writes the JPEGs, unless they are there, and returns their bytes on average."""
    portrait = np.array(Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).resize((768, 900)))
    sources = [*load_sample_images().images, portrait]
    for number in range(IMAGES):
        path = TREE / f"class{number % 4}" / f"{number:03d}.JPEG"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = sources[number % 3]
            top, left = 2 * number % (pixels.shape[0] - 375), 3 * number % (pixels.shape[1] - 500)
            part = Image.fromarray(pixels[top : top + 375, left : left + 500])
            part.save(path, quality=92)
    return round(statistics.mean(path.stat().st_size for path in TREE.rglob("*.JPEG")))


def torchvisions() -> Any:
    """Torchvision's data set and its reference transforms."""
    steps = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(RECIPE.mean, RECIPE.std)]
    data = ImageFolder(str(TREE), v2.Compose(steps))
    return lambda indices: default_collate([data[i] for i in indices])[0]


def ours() -> Any:
    """The loader and what the device does, on the CPU."""
    data, prepare = Samples(ImageTree(TREE), training_transform(RECIPE)), Preparation(RECIPE)

    def batch(indices: list[int]) -> torch.Tensor:
        [found] = loader(data, [[(0, i) for i in indices]], workers=0)
        return prepare(found.images, found.draws)

    return batch


def serve_contender(name: str) -> None:
    """Makes a batch when asked."""
    torch.set_num_threads(1)
    batch = torchvisions() if name == "torchvision" else ours()
    starts = itertools.cycle(range(0, IMAGES, BATCH))

    def step() -> float:
        first = next(starts)
        start = time.process_time()
        made = batch(list(range(first, first + BATCH)))
        if made.shape != (BATCH, 3, 224, 224) or made.dtype != torch.float32:
            raise ValueError(made.shape)
        return time.process_time() - start

    serve({"step": step})


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        if options.serve == "pillow":
            images._fast = None  # pyright: ignore[reportPrivateUsage]
        serve_contender(options.serve)
        return
    size = write_tree()
    names = [name for name in NAMES if name != "torchcodec" or images._fast is not None]  # pyright: ignore[reportPrivateUsage]
    contenders = {name: Contender("benchmarks.loader", "--serve", name) for name in names}
    try:
        times: dict[str, list[Any]] = rounds(contenders, "step", options.rounds)
    finally:
        for each in contenders.values():
            each.close()
    console = console_of(80)
    table = Table("", "images/s and core", "speed / torchvision's, 95 % interval")
    for name, found in times.items():
        ratios = [theirs / mine for theirs, mine in zip(times["torchvision"], found, strict=True)]
        cell = "{:.2f} [{:.2f}, {:.2f}]".format(*interval(ratios))
        table.add_row(name, f"{BATCH / statistics.median(found):.0f}", cell)
    console.print(table)
    console.print(f"JPEGs of {size / 1000:.0f} kB on average")
    keep(console, "loader", times=times, jpeg_bytes=size)


if __name__ == "__main__":
    main()
