"""Batches of images: decoded and cropped in worker processes, with whatever could not be read replaced or left out."""

import atexit
import weakref
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms import v2

from zoo.augment import DRAWS
from zoo.data.images import decode_image
from zoo.data.order import seed_of
from zoo.data.sources import Source
from zoo.data.workers import worker_options
from zoo.errors import InputError
from zoo.recipes import Recipe

__all__ = ["Batch", "Samples", "batches_of", "evaluation_transform", "loader", "training_transform"]

ATTEMPTS = 20
"""Images that are tried in place of one that can't be read."""


def training_transform(recipe: Recipe) -> v2.Compose:
    """The recipe's random crop, flip and the like, from a uint8 image to one of the recipe's size.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> training_transform(RECIPES["digits"])(torch.zeros(3, 40, 30, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])
    """
    steps: list[Any] = [
        v2.RandomResizedCrop(recipe.size, scale=recipe.crop_scale, ratio=recipe.crop_ratio, antialias=True)
    ]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.trivial_augment:
        steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    if recipe.colour == "jitter":
        steps.append(v2.ColorJitter(brightness=0.87, contrast=0.5, saturation=0.5, hue=0.2))
    if recipe.random_erase:
        steps.append(v2.RandomErasing(recipe.random_erase, value=[round(255 * mean) for mean in recipe.mean]))  # pyright: ignore[reportArgumentType]
    return v2.Compose(steps)


def evaluation_transform(recipe: Recipe) -> v2.Compose:
    """The recipe's scaling of the shorter side and centre crop, from a uint8 image to one of its evaluation size.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> evaluation_transform(RECIPES["paper_irevnet_b"])(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
    """
    return v2.Compose([v2.Resize(recipe.resize, antialias=True), v2.CenterCrop(recipe.evaluation_size)])


class Sample(NamedTuple):
    """One image, or what has become of it."""

    image: Tensor | None
    """uint8; ``None`` if it is left out."""
    label: int
    draws: Tensor
    """Uniform random numbers for what is done with it on the device."""
    address: tuple[int, int]
    bad: list[tuple[str, str]]
    """Names of images that could not be read on the way to it, and why."""


class Batch(NamedTuple):
    """Images as the workers make them.

    Example:
        >>> images, labels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([1, 0])
        >>> batch = Batch(images, labels, torch.rand(2, 5), addresses=[(0, 7), (0, 3)], bad=[])
        >>> [index for _, index in batch.addresses]
        [7, 3]
    """

    images: Tensor
    """``(batch, 3, height, width)``, uint8."""
    labels: Tensor
    """``(batch,)``, int64."""
    draws: Tensor
    """``(batch, 5)``, uniform random numbers."""
    addresses: list[tuple[int, int]]
    """Epoch and index of each image, as asked for."""
    bad: list[tuple[str, str]]
    """Names of images that could not be read, and why."""


class Samples(Dataset[Any]):
    """Images of a source through a transform, addressed by ``(epoch, index)``.

    Random transforms are drawn from ``(seed, epoch, index)``, so that an item is the same whichever process reads it,
    and whenever.

    Args:
        source: the images.
        transform: of uint8 images ``(3, height, width)`` to such of one size.
        seed: of the random transforms.
        bad: what to do about an image that can't be read: ``"raise"``; ``"replace"`` it by another one, which depends
            on seed, epoch and index alone; ``"skip"`` it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from zoo.data import ImageTree
        >>> from zoo.recipes import RECIPES
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (path := Path(folder) / "cat/0.png").parent.mkdir()
        ...     Image.new("RGB", (40, 30)).save(path)
        ...     sample = Samples(ImageTree(Path(folder)), training_transform(RECIPES["digits"]))[2, 0]  # in epoch 2
        >>> sample.image.shape, sample.label
        (torch.Size([3, 32, 32]), 0)
    """

    def __init__(self, source: Source, transform: v2.Compose, *, seed: int = 0, bad: str = "raise") -> None:
        self.source, self.transform, self.seed, self.bad = source, transform, seed, bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, address: tuple[int, int]) -> Sample:
        index, attempt = address[1], 0
        failed: list[tuple[str, str]] = []
        while True:
            try:
                image, draws = self._draw(index, seed_of(self.seed, *address))
                return Sample(image, int(self.source.labels[index]), draws, address, failed)
            except InputError as error:
                failed.append((self.source.name(index), str(error)))
                if self.bad == "skip":
                    return Sample(None, 0, torch.empty(0), address, failed)
                if self.bad == "raise" or attempt == ATTEMPTS:
                    raise
            attempt += 1
            index = seed_of(self.seed, *address, attempt) % len(self.source)

    def _draw(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        image = decode_image(self.source.read(index), self.source.name(index))
        # A worker's generator is its own; the main process' belongs to the network.
        with torch.random.fork_rng(devices=[], enabled=get_worker_info() is None):
            torch.default_generator.manual_seed(seed)
            draws = torch.rand(DRAWS)
            return self.transform(image), draws


class _Guarded(Dataset[Any]):
    """Returns the error for a bad image instead of raising it, so that it leaves a worker process in one line."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __getitem__(self, address: tuple[int, int]) -> Sample | InputError:
        try:
            return self.data[address]
        except InputError as error:
            return error


def loader(
    data: Samples, batches: Iterable[Sequence[tuple[int, int]]], *, workers: int, pin: bool = False
) -> Generator[Batch]:
    """Yields batches, read ahead by worker processes.

    Args:
        data: the images.
        batches: which of them, step by step.
        workers: processes; 0 reads in this one.
        pin: whether to put batches into page-locked memory, for a GPU.

    Raises:
        InputError: if an image can't be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from zoo.data import ImageTree
        >>> from zoo.recipes import RECIPES
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat/0.png", "dog/0.png"):
        ...         (Path(folder) / name).parent.mkdir()
        ...         Image.new("RGB", (40, 30)).save(Path(folder) / name)
        ...     samples = Samples(ImageTree(Path(folder)), evaluation_transform(RECIPES["digits"]))
        ...     [batch.labels.tolist() for batch in loader(samples, [[(0, 1), (0, 0)], [(0, 0)]], workers=0)]
        [[1, 0], [0]]
    """
    source: DataLoader[Any] = DataLoader(
        _Guarded(data),
        batch_sampler=cast("Sampler[list[Any]]", batches),  # torch takes any iterable of addresses
        collate_fn=_collate,
        pin_memory=pin,
        **worker_options(workers),
    )
    made = _unguarded(source)
    _open.add(made)
    return made


def _unguarded(source: DataLoader[Any]) -> Generator[Batch]:
    batches = iter(source)
    try:
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "a process that reads images was killed, for lack of memory perhaps; go on with fewer --workers"
        ) from None
    finally:
        del batches  # now, and with it the workers


_open: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Ends the workers of loaders that were not closed; at its own end Python would ask them by a signal, and wait."""
    for each in list(_open):
        each.close()


def batches_of(indices: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
    """Addresses of these images in epoch 0, in batches of which the last may be smaller.

    Example:
        >>> batches_of(range(3), 2)
        [[(0, 0), (0, 1)], [(0, 2)]]
    """
    return [[(0, i) for i in indices[first : first + size]] for first in range(0, len(indices), size)]


def _collate(items: list[Sample | InputError]) -> Batch | InputError:
    good: list[Sample] = []
    bad: list[tuple[str, str]] = []
    for item in items:
        if isinstance(item, InputError):
            return item
        bad += item.bad
        if item.image is not None:
            good.append(item)
    images = torch.stack([cast("Tensor", item.image) for item in good]) if good else torch.empty(0)
    labels = torch.tensor([item.label for item in good], dtype=torch.int64)
    draws = torch.stack([item.draws for item in good]) if good else torch.empty(0, DRAWS)
    return Batch(images, labels, draws, [item.address for item in good], bad)
