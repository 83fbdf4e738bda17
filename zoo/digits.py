"""Real images at hand: scikit-learn's handwritten digits, written as an ImageNet-style tree of files."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

__all__ = ["write_digits"]

_EVERY = 5  # of each class, in the data's own order, every fifth digit is held out


def write_digits(root: Path) -> Path:
    """Writes 1,797 handwritten digits as PNG files of 8 by 8 pixels: ``root/{train,val}/{0...9}/NNNN.png``.

    The split is stratified and fixed: of each class, in the order of the data set, every fifth image is held out,
    which makes 1,442 for training and 355 for validation. A tree that is complete is left as it is.

    Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), as shipped by scikit-learn.

    Args:
        root: the folder to write to; made if it is not there.

    Returns:
        ``root``.
    """
    images, labels = load_digits(return_X_y=True)
    seen = [0] * 10
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        split = "val" if seen[label] % _EVERY == _EVERY - 1 else "train"
        seen[label] += 1
        path = root / split / str(label) / f"{number:04d}.png"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.round(pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8)  # the data counts 0 ... 16
        partial = path.with_suffix(f".{os.getpid()}.tmp")  # another run may be writing the same tree
        Image.fromarray(grey).save(partial, format="PNG")
        partial.replace(path)
    return root
