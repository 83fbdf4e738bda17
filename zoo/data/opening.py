"""Finds the training and validation images in a folder, however they are stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.data.sources import ImageTree, Source
from zoo.data.tars import TarShards, validation_labels
from zoo.digits import write_digits
from zoo.errors import InputError

__all__ = ["Data", "open_data"]

DIGITS = Path("runs/data/digits")
"""Where the embedded digits are written, if a run has no data of its own."""

_TRAIN, _VAL, _DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class Data:
    """Images to train on and to validate with, of the same classes.

    Example:
        >>> from types import SimpleNamespace
        >>> images = SimpleNamespace(classes=["cat", "dog"], labels=[0, 1])
        >>> Data(training=images, validation=images).classes
        ['cat', 'dog']
    """

    training: Source
    validation: Source

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of their numbers."""
        return self.training.classes


def open_data(root: str | Path | None) -> Data:
    """Opens the images in a folder; ``None`` stands for the embedded digits, which are written to ``runs/data/digits``.

    Training and validation images are each looked for as

    1. a folder ``train/`` or ``val/`` with a folder for each class, or with tar files (:class:`TarShards`);
    2. tar files ``train*.tar`` or ``val*.tar``;
    3. ImageNet's own ``ILSVRC2012_img_train.tar`` and ``ILSVRC2012_img_val.tar``, the latter with
       ``ILSVRC2012_devkit_t12.tar.gz``, which says what its images are.

    Raises:
        InputError: if there are none, or they don't fit together.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("train/cat/0.png", "train/dog/0.png", "val/cat/1.png", "val/dog/1.png"):
        ...         (Path(folder) / name).parent.mkdir(parents=True)
        ...         (Path(folder) / name).touch()
        ...     data = open_data(folder)
        >>> data.classes, len(data.training), data.validation.labels
        (['cat', 'dog'], 2, array([0, 1]))
    """
    folder = write_digits(DIGITS) if root is None else Path(root)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    training = _open(folder, "train", _TRAIN, None)
    return Data(training, _open(folder, "val", _VAL, training.classes))


def _open(root: Path, split: str, official: str, classes: list[str] | None) -> Source:
    folder = root / split
    inside = sorted(folder.glob("*.tar"))
    if inside and any(each.is_dir() for each in folder.iterdir()):
        raise InputError(f"{folder} holds class folders and tar files ({inside[0].name}); keep one of both")
    if inside:
        return TarShards(inside, classes=classes)
    beside = sorted(root.glob(f"{split}*.tar")) if not folder.exists() else []
    if beside:
        return TarShards(beside, classes=classes)
    if not folder.exists() and (root / official).exists():
        labels: Mapping[str, str] | None = validation_labels(root / _DEVKIT) if split == "val" else None
        return TarShards([root / official], classes=classes, labels=labels)
    return ImageTree(folder, classes=classes)
