"""What is analysed: the network of a checkpoint, and the images that it sees."""

import argparse
import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.augment import Preparation
from zoo.building import find_device, load_net
from zoo.cards import card
from zoo.data import Data, Samples, Source, batches_of, evaluation_transform, loader, open_data
from zoo.errors import InputError, UnsuitedError
from zoo.flows.cards import FlowCard
from zoo.irevnet import IRevNet
from zoo.pretrained import from_pretrained
from zoo.recipes import RECIPES, Recipe
from zoo.registry import config_of
from zoo.run import Run
from zoo.unet import IUNet

__all__ = [
    "Reversible",
    "Subject",
    "add_beside",
    "checkpoint_folder",
    "copy_without_grid",
    "images_of",
    "is_pretrained",
    "open_subject",
    "reversible",
    "spread",
    "threads_for",
]

Reversible = IRevNet | IUNet
"""The networks of the zoo whose features have an inverse."""


@dataclass(frozen=True)
class Subject:
    """A network in ``eval`` mode, and how images are made for it.

    Example:
        >>> import zoo
        >>> from zoo.recipes import RECIPES
        >>> net = zoo.create("irevnet_small", num_classes=10, blocks=(1, 1)).eval()
        >>> subject = Subject(net, "irevnet_small", RECIPES["digits"], Path("runs/mine"), torch.device("cpu"))
        >>> subject.restored(torch.full((1, 3, 32, 32), 0.5)).mean()
        tensor(0.5000)
    """

    net: nn.Module
    model: str
    """Its name in the zoo."""
    recipe: Recipe
    """Whose evaluation transform images go through."""
    checkpoint: Path
    device: torch.device

    def batches(self, source: Source, indices: Sequence[int], size: int, *, workers: int = 0) -> Iterator[Tensor]:
        """The images of these numbers as the network sees them, in batches, read ahead by so many processes.

        Raises:
            InputError: if an image can't be read.
        """
        prepare = Preparation(self.recipe)
        samples = Samples(source, evaluation_transform(self.recipe))
        for batch in loader(samples, batches_of(indices, size), workers=workers):
            yield prepare(batch.images.to(self.device))

    def restored(self, x: Tensor) -> Tensor:
        """Images in [0, 1] of what the network sees."""
        return Preparation(self.recipe).restored(x)


def open_subject(checkpoint: str | Path, *, device: str = "cpu", size: int | None = None) -> Subject:
    """Opens a training run's folder, or what :func:`zoo.pretrained.save_pretrained` wrote: its folder or a file in it.

    Images are scaled and cropped as the run does for its validation. Of pretrained weights it is the recipe that the
    model's card names; if there is none, images are scaled and cropped to the card's size, with values in [0, 1].

    Args:
        checkpoint: the folder or the file.
        device: where to.
        size: of the images, in pixels, if not the run's.

    Raises:
        InputError: if there is no such checkpoint, it can't be read, its weights are not finite, or the size does not
            fit the network.

    Example:
        >>> import tempfile, zoo
        >>> from zoo.pretrained import save_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_pretrained(zoo.create("irevnet_small", num_classes=10, blocks=(1, 1)), folder)
        ...     subject = open_subject(path, size=16)
        >>> subject.model, subject.recipe.name, subject.recipe.evaluation_size, subject.net.training
        ('irevnet_small', 'digits', 16, False)
    """
    path, place = Path(checkpoint), find_device(device)
    folder = checkpoint_folder(path)
    if is_pretrained(folder):
        net = from_pretrained(folder).to(place, torch.float32)  # as images are
        model = config_of(net).model
        recipe = _recipe_for(model, path)
    else:
        net, run = load_net(folder, place)
        model, recipe = run.recipe.model, run.recipe
    if size is not None:
        ratio = max(recipe.resize / recipe.evaluation_size, 1)
        recipe = dataclasses.replace(recipe, test_size=size, resize=round(ratio * size))
    divisor = getattr(net, "size_divisor", 1)
    if recipe.evaluation_size < 1 or recipe.evaluation_size % divisor:
        raise InputError(f"{model} needs a size that {divisor} divides, got {recipe.evaluation_size}")
    if getattr(net, "in_channels", 3) != 3 or getattr(net, "dimensions", 2) != 2:
        raise InputError(f"the network in {path} sees no images of three colours")
    broken = [name for name, t in net.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise InputError(f"the weights in {path} are not finite, {broken[0]} for one; the training has diverged")
    return Subject(net.eval().requires_grad_(False), model, recipe, path, place)


def reversible(subject: Subject) -> Reversible:
    """The network, if its features have an inverse.

    Raises:
        UnsuitedError: if they have none.

    Example:
        >>> import zoo
        >>> from zoo.recipes import RECIPES
        >>> net = zoo.create("irevnet_small", num_classes=10, blocks=(1, 1)).eval()
        >>> reversible(Subject(net, "irevnet_small", RECIPES["digits"], Path("runs/mine"), torch.device("cpu"))) is net
        True
    """
    if not isinstance(subject.net, Reversible):
        raise UnsuitedError(f"{subject.model} has no inverse; this analysis is of i-RevNets and invertible U-Nets")
    return subject.net


def checkpoint_folder(checkpoint: Path) -> Path:
    """The folder of a checkpoint, of which a file may be named.

    Raises:
        InputError: if there is no such folder or file.
    """
    folder = checkpoint.parent if checkpoint.is_file() else checkpoint
    if not folder.is_dir():
        raise InputError(f"no such checkpoint: {checkpoint}")
    return folder


def is_pretrained(folder: Path) -> bool:
    """Whether :func:`zoo.pretrained.save_pretrained` wrote it, not a training run."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and "zoo_format" in fields


def threads_for(checkpoint: Path) -> int | None:
    """CPU threads that the network's recipe asks for; ``None`` if it asks for none, or there is no such network.

    Small networks are faster on one thread than on two, by far so if another program computes, too.
    """
    try:
        folder = checkpoint_folder(checkpoint)
        if not is_pretrained(folder):
            return Run.load(folder / "config.json").recipe.threads
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
        return _recipe_for(model, checkpoint).threads
    except (ValueError, KeyError, TypeError):  # whoever opens it says what is wrong
        return None


def images_of(data: str | Path | None) -> tuple[Data, str]:
    """The data, as the trainer opens it, and its name."""
    return open_data(data), "digits" if data is None else str(data)


def spread(total: int, count: int) -> list[int]:
    """So many numbers below the total at equal distances: of sorted images they have many classes.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    return [i * total // min(count, total) for i in range(min(count, total))]


def add_beside(parser: argparse.ArgumentParser) -> None:
    """The option for other networks that an analysis compares with."""
    parser.add_argument(
        "--beside", nargs="+", type=Path, metavar="RUN", default=[], help="other networks, on the same data"
    )


def copy_without_grid(net: Reversible, dtype: torch.dtype) -> Reversible:
    """A copy that can be differentiated: in ``eval``, without grid, with plain autograd, in this dtype."""
    copied = copy.deepcopy(net).to(dtype)
    copied.grid = copied.backprop = None
    return copied.eval().requires_grad_(False)


def _recipe_for(model: str, path: Path) -> Recipe:
    known = card(model)
    if isinstance(known, FlowCard):
        raise InputError(f"{path} holds {model}, a flow; the analyses are of networks that classify images")
    if known.recipe in RECIPES:
        return RECIPES[known.recipe]
    return dataclasses.replace(RECIPES["digits"], name="", model=model, size=known.size, resize=known.size)
