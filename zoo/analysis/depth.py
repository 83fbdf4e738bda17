"""Spatially averaged features after every block of a classifier: computed in one pass, and kept in files."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from invertible import Coupling
from zoo.analysis.subject import Subject
from zoo.checkpoints import write
from zoo.data import Source
from zoo.environment import environment
from zoo.errors import InputError, UnsuitedError, reason
from zoo.evaluation import evaluating, logits_of
from zoo.irevnet import IRevNet
from zoo.network import ReversibleNetwork
from zoo.registry import config_of
from zoo.resnet import ResNet
from zoo.revnet import RevNet, Stage, Transition
from zoo.vit import RevViT

__all__ = ["DepthPass", "Features", "averages_by_depth", "blocks_of", "check_disk", "features_by_depth"]

_FORMAT = 1
"""Of the files; raised when what is in them changes, so that older ones are not taken for it."""
_SECONDS = 1.0
"""From one record of the progress to the next: bringing a hundred files to the disk for each batch would take longer
than the batch."""


def blocks_of(net: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a classifier by their names, from the image on; with two streams a block changes both.

    They are the couplings of an i-RevNet, the units of a ResNet or RevNet (of the latter a transition, or two
    couplings), and the blocks of a RevViT (two couplings: attention and MLP).

    Raises:
        InputError: if the network is no classifier that is made of blocks.

    Example:
        >>> import zoo
        >>> list(blocks_of(zoo.create("irevnet_small", blocks=(1, 2))))
        ['body.2', 'body.3', 'body.4']
    """
    names = {part: name for name, part in net.named_modules()}
    found = _blocks(net)
    if not found:
        raise UnsuitedError(f"{type(net).__name__} has no blocks that lead to a class; this analysis is of classifiers")
    return {names[block]: block for block in found}


def _blocks(net: nn.Module) -> Sequence[nn.Module]:
    if isinstance(net, IRevNet):
        return [layer for layer in net.body if isinstance(layer, Coupling)]
    if isinstance(net, ResNet):
        return list(net.units)
    if isinstance(net, RevNet):
        return [unit for stage in net.stages if isinstance(stage, Stage) for unit in _units(stage)]
    if isinstance(net, RevViT):
        return [layer for layer in net.blocks if isinstance(layer, Coupling)][1::2]
    if type(net).__module__ == "torchvision.models.resnet":  # importing it takes long
        return [block for i in range(1, 5) for block in getattr(net, f"layer{i}")]
    return []


def _units(stage: Stage) -> list[nn.Module]:
    first: list[nn.Module] = [stage.entry] if isinstance(stage.entry, Transition) else []
    return first + list(stage.body)[1::2]


@torch.no_grad()
def averages_by_depth(net: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    r"""The averages over space of :math:`\Phi_j x` for every block j, in ``eval``, and the logits.

    Streams are put together along the channels. After the last block this is what the head sees before its batch norm,
    averaged. Where a value leaves the network's grid, it computes without one.

    Source: i-RevNet, section 5.1, https://arxiv.org/abs/1802.07088

    Args:
        net: a classifier.
        x: what it sees.

    Shape:
        - x: ``(batch, channels, height, width)``
        - Output: for each block ``(batch, width)``, float32; logits ``(batch, classes)``

    Raises:
        InputError: if the network is no classifier that is made of blocks.

    Example:
        >>> import zoo
        >>> found, logits = averages_by_depth(zoo.create("resnet_small", num_classes=5), torch.zeros(2, 3, 32, 32))
        >>> len(found), found[-1].shape, logits.shape
        (15, torch.Size([2, 64]), torch.Size([2, 5]))
    """
    found: dict[str, Tensor] = {}

    def keeping(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, given: Any, value: Any) -> None:
            streams = (value,) if isinstance(value, Tensor) else value
            found[name] = torch.cat([each.flatten(2).mean(2) for each in streams], dim=1).float()

        return keep

    blocks = blocks_of(net)
    handles = [block.register_forward_hook(keeping(name)) for name, block in blocks.items()]
    try:
        with evaluating(net):
            logits = logits_of(net, x)
    finally:
        for handle in handles:
            handle.remove()
    return [found[name] for name in blocks], logits


@dataclass(frozen=True)
class Features:
    """The averaged features of some images after every block, in files.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:  # by hand; features_by_depth computes them
        ...     np.save(Path(folder) / "block_001.npy", np.ones((2, 3)))
        ...     features = Features(Path(folder), ("body.2",), (3,), np.array([0, 1]), np.array([0, 0]))
        ...     features.block(-1).mean(axis=0).tolist(), float((features.predictions == features.labels).mean())
        ([1.0, 1.0, 1.0], 0.5)
    """

    folder: Path
    names: tuple[str, ...]
    """Of the blocks, in the network."""
    widths: tuple[int, ...]
    """The number of features after each block."""
    labels: "np.ndarray[Any, Any]"
    """The class of each image."""
    predictions: "np.ndarray[Any, Any]"
    """The class that the network gives it."""

    @property
    def key(self) -> str:
        """Another one for other weights, images, sizes or transforms."""
        return self.folder.name

    def block(self, index: int) -> "np.ndarray[Any, Any]":
        """Those after a block, ``(images, width)``, float32, mapped from their file."""
        return np.load(_path(self.folder, range(len(self.names))[index]), mmap_mode="r")


class DepthPass:
    """One pass of images through a network, which keeps the averaged features after every block.

    Args:
        subject: whose network.
        source: of the images.
        indices: their numbers in it.
        folder: in which the pass makes one of its own, named by a key of weights, images, transform and size. An image
            is known by its name, its label, and the size and time of its file.
        batch: images at once.

    Raises:
        InputError: if the network has no blocks, or the images' size does not fit it.
    """

    def __init__(
        self, subject: Subject, source: Source, indices: Sequence[int], folder: Path, *, batch: int = 64
    ) -> None:
        self.subject, self.source, self.batch = subject, source, batch
        self.indices = np.asarray(indices, dtype=np.int64)
        self.names, self.widths, self.classes = _shapes(subject)
        self.folder = folder / _key(subject, source, self.indices, batch)

    @property
    def missing(self) -> int:
        """Bytes that are to be written, if the pass has not begun; then they are reserved."""
        begun = (self.folder / "progress.json").exists()
        return 0 if begun else 4 * len(self.indices) * sum(self.widths) + 16 * len(self.indices)

    def run(self, *, workers: int = 0, progress: Callable[[int, int], None] | None = None) -> Features:
        """Computes what is not yet there; after an interruption it goes on.

        Args:
            workers: processes that read images.
            progress: is told how many images are done, and of how many.

        Raises:
            InputError: if an image can't be read, features are not finite, the files can't be written, or another
                process is writing them.
        """
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            with _writing(self.folder):
                arrays, done = self._opened()
            if done < len(self.indices):
                self._compute(arrays, done, workers, progress or (lambda *_: None))
            labels, predictions = (np.array(array) for array in arrays[-2:])
        return Features(self.folder, self.names, self.widths, labels, predictions)

    def _compute(
        self, arrays: "list[np.memmap[Any, Any]]", done: int, workers: int, progress: Callable[[int, int], None]
    ) -> None:
        *blocks, _, predictions = arrays
        total, recorded = len(self.indices), time.monotonic()
        left = self.indices[done:].tolist()
        try:
            for x in self.subject.batches(self.source, left, self.batch, workers=workers):
                averages, logits = averages_by_depth(self.subject.net, x)
                part = slice(done, done + len(x))
                for name, array, values in zip(self.names, blocks, averages, strict=True):
                    if not bool(values.isfinite().all()):
                        raise InputError(f"the features of {self.subject.model} after {name} are not finite")
                    array[part] = values.cpu().numpy()
                predictions[part] = logits.argmax(dim=1).cpu().numpy()
                done += len(x)
                progress(done, total)
                if time.monotonic() - recorded > _SECONDS:
                    self._record(arrays, done)
                    recorded = time.monotonic()
        finally:
            self._record(arrays, done)

    def _record(self, arrays: "list[np.memmap[Any, Any]]", done: int) -> None:
        """Brings the values to the disk, and only then says so."""
        with _writing(self.folder):
            for array in arrays:
                array.flush()
            write(self.folder / "progress.json", json.dumps({"done": done, "of": len(self.indices)}).encode())

    def _opened(self) -> "tuple[list[np.memmap[Any, Any]], int]":
        """The files, and how many images are done; made anew where they are not whole."""
        count = range(len(self.names))
        paths = [*(_path(self.folder, i) for i in count), self.folder / "labels.npy", self.folder / "predictions.npy"]
        total = len(self.indices)
        shapes: list[tuple[int, ...]] = [*((total, width) for width in self.widths), (total,), (total,)]
        try:
            done = json.loads((self.folder / "progress.json").read_text())["done"]
            # Read-only first, for then a file that is too short is refused; otherwise it would be filled up with zeros.
            if [np.load(path, mmap_mode="r").shape for path in paths] == shapes and 0 <= done <= total:
                return [np.load(path, mmap_mode="r+") for path in paths], done
        except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError):
            pass
        (self.folder / "progress.json").unlink(missing_ok=True)
        kinds = [np.float32] * len(count) + [np.int64] * 2
        arrays = [_reserved(*each) for each in zip(paths, kinds, shapes, strict=True)]
        arrays[-2][:] = self.source.labels[self.indices]
        about = {"model": self.subject.model, "checkpoint": str(self.subject.checkpoint), "images": total}
        write(self.folder / "about.json", json.dumps({**about, "blocks": self.names, "widths": self.widths}).encode())
        self._record(arrays, 0)
        return arrays, 0


def features_by_depth(
    subject: Subject,
    source: Source,
    indices: Sequence[int],
    folder: Path,
    *,
    workers: int = 0,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Computes the averaged features of images after every block, or takes them from where they were kept.

    They are those of :func:`averages_by_depth`. A pass that was killed goes on with the batch at which it stopped.
    Other weights, images, transforms or sizes have a folder of their own; an image is known by its name, its label, and
    the size and time of its file.

    Args:
        subject: whose network: see :func:`zoo.analysis.open_subject`.
        source: of the images, such as ``data.validation``.
        indices: their numbers in it.
        folder: under which they are kept, each pass in a folder of its own.
        workers: processes that read images.
        batch: images at once.
        progress: is told how many images are done, and of how many.

    Raises:
        InputError: if the network has no blocks or the images' size does not fit it, an image can't be read, features
            are not finite, or the disk has no room for them.

    Example:
        >>> import tempfile, zoo.analysis, zoo.data, zoo.pretrained
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (path := Path(folder) / "images/cat/0.png").parent.mkdir(parents=True)
        ...     Image.new("RGB", (40, 30)).save(path)
        ...     net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1))
        ...     subject = zoo.analysis.open_subject(zoo.pretrained.save_pretrained(net, Path(folder) / "net"))
        ...     images = zoo.data.ImageTree(Path(folder) / "images")
        ...     found = features_by_depth(subject, images, [0], Path(folder) / "kept")
        >>> found.names, found.widths, found.labels
        (('body.2', 'body.3'), (48, 192), array([0]))
    """
    found = DepthPass(subject, source, indices, folder, batch=batch)
    check_disk(folder, [found])
    return found.run(workers=workers, progress=progress)


def check_disk(folder: Path, passes: Sequence[DepthPass]) -> None:
    """Refuses passes whose files do not fit on the disk.

    Raises:
        InputError: if they don't.
    """
    needed = sum({each.folder: each.missing for each in passes}.values())
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"the features take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free in {there}; "
            "take fewer --images or --classes"
        )


def _shapes(subject: Subject) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """Names and widths of the blocks, and the number of logits: of an image that is all zeros."""
    names, size = tuple(blocks_of(subject.net)), subject.recipe.evaluation_size
    x = torch.zeros(1, 3, size, size, device=subject.device)
    try:
        averages, logits = averages_by_depth(subject.net, x)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{subject.model} does not take images of {size} pixels: {reason(error)}") from None
    return names, tuple(each.shape[1] for each in averages), logits.shape[1]


def _key(subject: Subject, source: Source, indices: "np.ndarray[Any, Any]", batch: int) -> str:
    """A digest of all that the values depend on."""
    digest, config, recipe = hashlib.sha256(), config_of(subject.net), subject.recipe
    grid = subject.net.grid if isinstance(subject.net, ReversibleNetwork) else None
    transform = (recipe.resize, recipe.evaluation_size, recipe.mean, recipe.std)
    machine = environment(subject.device)
    place = machine["torch"], machine["device"]
    about = (_FORMAT, place, config.model, sorted(config.options.items()), str(grid), transform, batch, len(indices))
    digest.update(repr(about).encode())
    for name, t in subject.net.state_dict().items():
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    states: dict[str, str] = {}
    for i, label in zip(indices.tolist(), source.labels[indices].tolist(), strict=True):
        name = source.name(i)
        digest.update(os.fsencode(f"{name}\0{label}\0{_state(name, states)}\n"))
    return digest.hexdigest()[:20]


def _state(name: str, known: dict[str, str]) -> str:
    """Size and time of an image's file, or of the tar before the colon in its name; empty if it has none."""
    path = name if Path(name).exists() else name.rpartition(":")[0]
    if path not in known:
        try:
            found = Path(path).stat()
            known[path] = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:
            known[path] = ""
    return known[path]


def _path(folder: Path, block: int) -> Path:
    return folder / f"block_{block + 1:03d}.npy"


def _reserved(path: Path, kind: Any, shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
    """A file of zeros whose room on the disk is taken: one that is full later would end the process by a signal."""
    array = open_memmap(path, mode="w+", dtype=kind, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {reason(error)}") from None


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    with _writing(folder):
        file = (folder / "lock").open("wb")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing to {folder} now; wait, or take another --output") from None
        yield
