"""Real images at hand: scikit-learn's handwritten digits, as tensors and as an ImageNet-style tree of files."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["Digits", "split_digits", "write_digits"]

_EVERY = 5  # of each class, in the data's own order, every fifth digit is held out


@dataclass(frozen=True)
class Digits:
    """Handwritten digits.

    Example:
        >>> digits = Digits(torch.zeros(3, 1, 8, 8), torch.tensor([7, 1, 7]))
        >>> digits.of(7).shape
        torch.Size([2, 1, 8, 8])
    """

    images: Tensor
    """``(count, 1, 8, 8)``, whole numbers from 0 to 16 as float32: so dark is the ink."""
    labels: Tensor
    """``(count,)``, from 0 to 9."""

    def of(self, label: int) -> Tensor:
        """The images of a class."""
        return self.images[self.labels == label]


def split_digits() -> tuple[Digits, Digits]:
    """Returns 1,442 handwritten digits to learn from, and 355 that are held out: those of :func:`write_digits`.

    Example:
        >>> training, held_out = split_digits()
        >>> len(training.images), len(held_out.images)
        (1442, 355)
    """
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(classes)
    held = torch.tensor(list(_held_out(classes)))
    return Digits(images[~held], labels[~held]), Digits(images[held], labels[held])


def _held_out(labels: Iterable[int]) -> Iterable[bool]:
    """Of each label whether it is held out."""
    seen = [0] * 10
    for label in labels:
        yield seen[label] % _EVERY == _EVERY - 1
        seen[label] += 1


def write_digits(root: Path) -> Path:
    """Writes 1,797 handwritten digits as PNG files of 8 by 8 pixels: ``root/{train,val}/{0...9}/NNNN.png``.

    The split is stratified and fixed: of each class, in the order of the data set, every fifth image is held out,
    which makes 1,442 for training and 355 for validation. A tree that is complete is left as it is.

    Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), as shipped by scikit-learn.

    Args:
        root: the folder to write to; made if it is not there.

    Returns:
        ``root``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_digits(Path(folder) / "digits")
        ...     len(list(root.glob("train/*/*.png"))), len(list(root.glob("val/*/*.png")))
        (1442, 355)
    """
    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label, held) in enumerate(zip(images, labels, _held_out(labels), strict=True)):
        split = "val" if held else "train"
        path = root / split / str(label) / f"{number:04d}.png"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.round(pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8)  # the data counts 0 ... 16
        partial = path.with_suffix(f".{os.getpid()}.tmp")  # another run may be writing the same tree
        Image.fromarray(grey).save(partial, format="PNG")
        partial.replace(path)
    return root
