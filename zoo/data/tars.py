"""Images inside uncompressed tar files, read in place through an index of offsets."""

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from scipy.io import loadmat
from torchvision.datasets.folder import IMG_EXTENSIONS

from zoo.data.sources import number_classes
from zoo.errors import InputError, reason

__all__ = ["TarShards", "validation_labels"]

Arrays = dict[str, "np.ndarray[Any, Any]"]


class TarShards:
    """The images in uncompressed tar files, each read by one ``pread`` where it stands: nothing is unpacked.

    The class of an image is, whichever there is first: what ``labels`` says of its name; a number in a file of the same
    name that ends in ``.cls``, as WebDataset writes it; the folder that it is in; the name of the tar inside the tar,
    as in ImageNet's own ``ILSVRC2012_img_train.tar``. Names are the same up to their last dot, or up to the first one,
    as WebDataset has it; where some images of a tar have a ``.cls`` file, all must have one.

    A tar is walked through once. What was found is kept beside it in ``NAME.tar.index.npz``, if that can be written,
    and made anew when the tar's size or time changes.

    Args:
        paths: of the tar files; images are numbered in this order.
        classes: the names of the classes; ``None`` takes those found, sorted.
        labels: the class of each image by its file's name, if the tars don't say.

    Raises:
        InputError: if a tar can't be read, is compressed, holds no images, or classes don't fit.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, tarfile.open(Path(folder) / "train.tar", "w") as tar:
        ...     for name in ("cat/0.png", "dog/0.png"):
        ...         header = tarfile.TarInfo(name)
        ...         header.size = len(name)
        ...         tar.addfile(header, io.BytesIO(name.encode()))
        ...     tar.close()
        ...     images = TarShards([Path(folder) / "train.tar"])
        ...     images.classes, images.labels, images.read(1)
        (['cat', 'dog'], array([0, 1]), b'dog/0.png')
    """

    def __init__(
        self, paths: Sequence[Path], *, classes: Sequence[str] | None = None, labels: Mapping[str, str] | None = None
    ) -> None:
        self.paths = list(paths)
        found = [_index(path) for path in self.paths]
        columns = {key: np.concatenate([each[key] for each in found]) for key in ("offset", "size", "name", "group")}
        if not len(columns["offset"]):
            raise InputError(f"no images in {_those(self.paths)}")
        self._tar = np.repeat(np.arange(len(found), dtype=np.int32), [len(each["offset"]) for each in found])
        self._offset, self._size, self._name = columns["offset"], columns["size"], columns["name"]
        groups = self._groups(columns["group"], labels)
        names = sorted(set(groups))
        if all(name.isdecimal() for name in names):
            names.sort(key=int)
        numbers = number_classes(names, classes, self.paths[0].parent)
        self.classes = list(numbers)
        self.labels = np.array([numbers[group] for group in groups], dtype=np.int64)
        self._open: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def name(self, index: int) -> str:
        return f"{self.paths[self._tar[index]]}:{os.fsdecode(bytes(self._name[index]))}"

    def read(self, index: int) -> bytes:
        number, size = int(self._tar[index]), int(self._size[index])
        key = (os.getpid(), number)  # a forked process opens the file itself
        try:
            if key not in self._open:
                self._open[key] = os.open(self.paths[number], os.O_RDONLY)
            content = os.pread(self._open[key], size, int(self._offset[index]))
        except OSError as error:
            raise InputError(f"cannot read the image {self.name(index)}: {reason(error)}") from None
        if len(content) < size:
            raise InputError(f"cannot read the image {self.name(index)}: the tar ends before it does")
        return content

    def _groups(self, found: "np.ndarray[Any, Any]", labels: Mapping[str, str] | None) -> list[str]:
        """The class of each image, as a name."""
        if labels is None:
            groups = [os.fsdecode(bytes(each)) for each in found]
            unknown = next((i for i, group in enumerate(groups) if not group), None)
            if unknown is not None:
                raise InputError(f"no class for {self.name(unknown)}: it is in no folder and has no .cls file")
            return groups
        names = [os.path.basename(os.fsdecode(bytes(each))) for each in self._name]  # noqa: PTH119 (a name in a tar)
        missing = next((i for i, name in enumerate(names) if name not in labels), None)
        if missing is not None:
            raise InputError(f"no class for {self.name(missing)} in the ground truth")
        return [labels[name] for name in names]


def validation_labels(devkit: Path) -> dict[str, str]:
    """The WordNet ID of each image of ImageNet's validation set, by its file's name, from the development kit.

    Args:
        devkit: ``ILSVRC2012_devkit_t12.tar.gz``, of which ``data/meta.mat`` maps the numbers in
            ``data/ILSVRC2012_validation_ground_truth.txt`` to WordNet IDs.

    Raises:
        InputError: if it can't be read.

    Example:
        >>> validation_labels(Path("nowhere.tar.gz"))
        Traceback (most recent call last):
            ...
        zoo.errors.InputError: no such file: nowhere.tar.gz; it says which class the validation images have
    """
    try:
        with tarfile.open(devkit) as tar:
            members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            meta, truth = (_content(tar, members[name]) for name in ("meta.mat", _TRUTH))
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        identifiers = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        numbers = [int(line) for line in truth.split()]
        return {f"ILSVRC2012_val_{i:08d}.JPEG": identifiers[number] for i, number in enumerate(numbers, 1)}
    except FileNotFoundError:
        raise InputError(f"no such file: {devkit}; it says which class the validation images have") from None
    except (OSError, tarfile.TarError, KeyError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {devkit}: {reason(error)}") from None


_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _those(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _index(path: Path) -> Arrays:
    """Offsets, sizes, names and classes of the images in a tar, from the index beside it if that is of this tar."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from None
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns])
    kept = path.with_name(path.name + ".index.npz")
    try:
        with kept.open("rb") as content, np.load(content) as file:
            if np.array_equal(file["stamp"], stamp):
                return {key: file[key] for key in file.files}
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile):  # none, or a damaged one
        pass
    try:
        with path.open("rb") as file:
            rows = list(_walk(file, path))
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}; it must be a whole, uncompressed tar file") from None
    arrays: Arrays = {
        "stamp": stamp,
        "offset": np.array([row[0] for row in rows], dtype=np.int64),
        "size": np.array([row[1] for row in rows], dtype=np.int64),
        "name": np.array([os.fsencode(row[2]) for row in rows], dtype=np.bytes_),
        "group": np.array([os.fsencode(row[3]) for row in rows], dtype=np.bytes_),
    }
    partial = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(kept)
    except OSError:  # a folder that only others may write to: the next run walks through it again
        partial.unlink(missing_ok=True)
    return arrays


_VERSION = 3


def _walk(file: Any, path: Path) -> Iterator[tuple[int, int, str, str]]:
    """Offset, size, name and class of each image in a tar, and in the tars inside."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        numbers: dict[str, str] = {}
        images: list[tuple[int, int, str, str]] = []
        inner: dict[int, str] = {}  # which of these are in tars inside, and have their classes
        begins: dict[str, int] = {}  # at which of these the last tar of each name begins
        for member in tar:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
            if member.islnk() or member.issym() or member.issparse():
                kind = "sparse" if member.issparse() else "a link"
                raise tarfile.ReadError(f"{member.name} is {kind}, and has no bytes of its own to be read in place")
            if not member.isfile():
                continue
            stem, extension = os.path.splitext(member.name)  # noqa: PTH122 (a name in a tar)
            if extension.lower() == ".tar":
                begins[member.name] = len(images)
                for offset, size, name, group in _walk(_Window(file, member.offset_data, member.size), path):
                    inside = group or os.path.basename(stem)  # noqa: PTH119
                    inner[len(images)] = member.name
                    images.append((member.offset_data + offset, size, f"{member.name}:{name}", inside))
            elif extension.lower() == ".cls":
                numbers[stem] = _content(tar, member).decode(errors="replace").strip()
            elif extension.lower() in IMG_EXTENSIONS:
                folder = os.path.basename(os.path.dirname(member.name))  # noqa: PTH119, PTH120
                images.append((member.offset_data, member.size, member.name, folder.strip(".")))
        _check_end(file, tar.offset)
    # Of two of one name, as "tar -r" leaves them, which may have been given "./cat" the second time.
    last = {os.path.normpath(name): i for i, (_, _, name, _) in enumerate(images)}
    for i, (offset, size, name, group) in enumerate(images):
        if last[os.path.normpath(name)] != i or (i in inner and i < begins[inner[i]]):
            continue
        found = None if i in inner else _number(numbers, name)
        if numbers and found is None and i not in inner:  # WebDataset's folders are no classes
            raise InputError(f"no class for {path}:{name}: it has no .cls file, and there are some in this tar")
        yield offset, size, name, group if found is None else found


def _number(numbers: Mapping[str, str], name: str) -> str | None:
    """What the ``.cls`` file of an image says, if there is one."""
    folder, file = os.path.split(name)
    key = os.path.join(folder, file.partition(".")[0])  # noqa: PTH118
    return numbers.get(os.path.splitext(name)[0], numbers.get(key))  # noqa: PTH122


def _check_end(file: Any, offset: int) -> None:
    """Raises unless a tar ends in zeros where the walk has ended: tarfile says nothing of a damaged header."""
    file.seek(offset)
    block = file.read(1 << 20)
    if not block:
        raise tarfile.ReadError("it is cut off")
    while block:
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"a header is damaged, or another tar follows, after {offset} bytes")
        block = file.read(1 << 20)


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        content = self._file.read(max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
