"""Where images are: their bytes, names and classes, one by one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from zoo.errors import InputError, reason

__all__ = ["ImageTree", "Source", "number_classes"]


class Source(Protocol):
    """Image files with classes, addressed by number.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> class Greys:  # images that are made, not read
        ...     classes, labels = ["dark", "light"], np.array([0, 1])
        ...     def __len__(self):
        ...         return len(self.labels)
        ...     def name(self, index):
        ...         return f"grey {index}"
        ...     def read(self, index):
        ...         Image.new("L", (4, 2), 255 * index).save(file := io.BytesIO(), "png")
        ...         return file.getvalue()
        >>> from zoo.data import decode_image
        >>> decode_image(Greys().read(1), Greys().name(1))[0, 0]
        tensor([255, 255, 255, 255], dtype=torch.uint8)
    """

    classes: list[str]
    """The names of the classes, in the order of their numbers."""
    labels: np.ndarray
    """The class of each image."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where an image is, for messages."""
        ...

    def read(self, index: int) -> bytes:
        """The content of its file.

        Raises:
            InputError: if it can't be read.
        """
        ...


def number_classes(found: Sequence[str], classes: Sequence[str] | None, root: Path) -> dict[str, int]:
    """Numbers the classes that were found: in their own order, or in the one of ``classes``.

    Raises:
        InputError: if one is not among ``classes``, or one of these is missing.
    """
    if classes is None:
        return {name: number for number, name in enumerate(found)}
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise InputError(f"unknown class folder {root / unknown[0]}: the training data has no class of this name")
    missing = [name for name in classes if name not in found]
    if missing:
        raise InputError(f"no folder for class {missing[0]!r} in {root}")
    return {name: number for number, name in enumerate(classes)}


class ImageTree:
    """The images of ``root/CLASS/...``, in the manner of ImageNet. Files are known by their extension.

    Args:
        root: a folder with one folder per class.
        classes: the names of the classes; ``None`` takes the folders' own, sorted.

    Raises:
        InputError: if there is no such folder, no image in it, a class without images, or a folder that is not one of
            ``classes``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat/0.png", "dog/0.png"):
        ...         (Path(folder) / name).parent.mkdir()
        ...         _ = (Path(folder) / name).write_bytes(name.encode())
        ...     images = ImageTree(Path(folder))
        ...     images.classes, images.labels, images.read(1)
        (['cat', 'dog'], array([0, 1]), b'dog/0.png')
    """

    def __init__(self, root: Path, *, classes: Sequence[str] | None = None) -> None:
        if not root.is_dir():
            raise InputError(f"no such folder: {root}")
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not folders:
            raise InputError(f"no class folders in {root}")
        numbers = number_classes(folders, classes, root)
        self.root = root
        self.classes = list(numbers)
        paths: list[bytes] = []
        labels: list[int] = []
        for name, number in numbers.items():
            found = _images(root / name)
            if not found:
                raise InputError(f"no images in {root} for the class {name}")
            paths += [os.fsencode(Path(name, path)) for path in found]
            labels += [number] * len(found)
        # As arrays, for workers would copy lists of objects to count references to them.
        self._paths = np.array(paths)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(bytes(self._paths[index])))

    def read(self, index: int) -> bytes:
        name = self.name(index)
        try:
            return Path(name).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the image {name}: {reason(error)}") from None


def _images(folder: Path) -> list[str]:
    """Paths of the image files below, sorted, relative to the folder."""
    found: list[str] = []
    passed: dict[str, tuple[Path, ...]] = {}  # where the links that have led to a folder were
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        before = (*passed.pop(parent, ()), real)
        links = {each for each in folders if Path(parent, each).is_symlink()}
        folders[:] = [each for each in folders if each not in links or not _leads_back(real / each, before)]
        passed |= {os.path.join(parent, each): before if each in links else before[:-1] for each in folders}  # noqa: PTH118
        inside = os.path.relpath(parent, folder)
        found += [os.path.normpath(Path(inside, each)) for each in files if each.lower().endswith(IMG_EXTENSIONS)]
    return sorted(found)


def _leads_back(link: Path, before: tuple[Path, ...]) -> bool:
    """Whether it leads to a folder that one of these is in: all images would be there again, and again in that."""
    target = link.resolve()
    return any(each.is_relative_to(target) for each in before)
