"""Images from trees of class folders, in an order that depends on the seed and the step alone."""

import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from zoo.errors import InputError, reason
from zoo.recipes import Recipe

__all__ = ["ImageTree", "StepSampler", "evaluation_transform", "load_image", "loader", "training_transform"]


def training_transform(recipe: Recipe) -> v2.Compose:
    """The recipe's random crop and flip, from a Pillow image to a uint8 tensor ``(3, size, size)``."""
    steps: list[Any] = [v2.RandomResizedCrop(recipe.size, scale=recipe.crop_scale, ratio=recipe.crop_ratio)]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.PILToTensor()])


def evaluation_transform(recipe: Recipe) -> v2.Compose:
    """The recipe's scaling and centre crop, from a Pillow image to a uint8 tensor ``(3, size, size)``."""
    return v2.Compose([v2.Resize(recipe.resize), v2.CenterCrop(recipe.size), v2.PILToTensor()])


def load_image(path: Path) -> Image.Image:
    """Reads an image file as RGB.

    Raises:
        InputError: if there is no such file, or it is not a whole image.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits per pixel, which "convert" would clip, not scale
                return Image.fromarray(
                    (np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8)
                ).convert("RGB")
            return image.convert("RGB")  # decodes it all, so that a truncated file is found here
    except UnidentifiedImageError:
        raise InputError(f"cannot read the image {path}: not an image file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path}: {reason(error)}") from error


class ImageTree(Dataset[tuple[Tensor, int]]):
    """The images of ``root/CLASS/...``, in the manner of ImageNet.

    Items are addressed by ``(epoch, index)``: random transforms are drawn from ``(seed, epoch, index)``, so that an
    item is the same whichever process reads it, and whenever.

    Args:
        root: a folder with one folder per class.
        transform: from a Pillow image to a tensor.
        classes: the names of the classes; ``None`` takes the folders' own, sorted.
        seed: of the random transforms.

    Raises:
        InputError: if there is no such folder, no image in it, a class without images, or a folder that is not one of
            ``classes``.
    """

    def __init__(
        self, root: Path, transform: v2.Compose, *, classes: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        if not root.is_dir():
            raise InputError(f"no such folder: {root}")
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not folders:
            raise InputError(f"no class folders in {root}")
        self.classes = folders if classes is None else list(classes)
        unknown = [folder for folder in folders if folder not in self.classes]
        if unknown:
            raise InputError(f"unknown class folder {root / unknown[0]}: the training data has no class of this name")
        missing = [name for name in self.classes if name not in folders]
        if missing:
            raise InputError(f"no folder for class {missing[0]!r} in {root}")
        numbers = {name: number for number, name in enumerate(self.classes)}
        try:
            self.samples = make_dataset(str(root), numbers, extensions=IMG_EXTENSIONS)
        except FileNotFoundError:
            filled = {
                path.relative_to(root).parts[0] for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS
            }
            empty = next(name for name in self.classes if name not in filled)
            raise InputError(f"no images in {root} for the class {empty}") from None
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = address
        path, label = self.samples[index]
        image = load_image(Path(path))
        seed = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
        # A worker's generator is its own; the main process' belongs to the network.
        with torch.random.fork_rng(devices=[], enabled=get_worker_info() is None):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of the steps ``start`` to ``stop``: a pure function of seed and step, so that a run can go on.

    Each epoch visits the images in an order of its own and leaves out the last incomplete batch.

    Args:
        length: the number of images.
        batch_size: images per step, at most ``length``.
        seed: of the order.
        start: the first step, counted from the beginning of the run.
        stop: the step after the last.

    Example:
        >>> list(StepSampler(5, 2, seed=0, start=1, stop=3)) == list(StepSampler(5, 2, seed=0, start=0, stop=3))[1:]
        True
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, start: int, stop: int) -> None:
        if batch_size > length:
            raise InputError(f"the batch size {batch_size} is more than the {length} training images")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps = self.length // self.batch_size
        for epoch in itertools.count(self.start // steps):
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(seed)).tolist()
            for step in range(max(self.start, epoch * steps), (epoch + 1) * steps):
                if step >= self.stop:
                    return
                first = (step - epoch * steps) * self.batch_size
                yield [(epoch, index) for index in order[first : first + self.batch_size]]


class _Guarded(Dataset[Any]):
    """Returns the error for a bad image instead of raising it, so that it leaves a worker process in one line."""

    def __init__(self, data: ImageTree) -> None:
        self.data = data

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, int] | InputError:
        try:
            return self.data[address]
        except InputError as error:
            return error


def loader(
    data: ImageTree, batches: Iterable[list[tuple[int, int]]], *, workers: int, pin: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of uint8 images ``(batch, 3, size, size)`` and labels.

    Args:
        data: the images.
        batches: which of them, step by step.
        workers: processes that read ahead; 0 reads in this one.
        pin: whether to put batches into page-locked memory, for a GPU.

    Raises:
        InputError: if an image can't be read.
    """
    source: DataLoader[Any] = DataLoader(
        _Guarded(data),
        batch_sampler=cast("Sampler[list[Any]]", batches),  # torch takes any iterable of addresses
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupts,
        pin_memory=pin,
    )
    for batch in source:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _collate(items: list[tuple[Tensor, int] | InputError]) -> tuple[Tensor, Tensor] | InputError:
    good: list[tuple[Tensor, int]] = []
    for item in items:
        if isinstance(item, InputError):
            return item
        good.append(item)
    return torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good])


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends this one
    torch.set_num_threads(1)
