"""Trained weights: where they are, what they are, and that they are what they should be before anything is loaded."""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.errors import WeightsError, reason

__all__ = ["FORMAT", "WEIGHTS", "Transforms", "Weights", "fetch", "load_weights", "save_weights", "weights_of"]

FORMAT = 1
"""Of the names and shapes of the tensors that the zoo's networks have; it rises when an older file no longer fits."""

_CHUNK = 1 << 20
_PATIENCE = 30  # seconds without a byte


@dataclass(frozen=True)
class Transforms:
    """What makes of an image what the network was trained to see."""

    resize: int
    """What the shorter side is scaled to, in pixels."""
    crop: int
    """Height and width of the crop from the centre, in pixels."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Of each channel, subtracted from images in [0, 1]."""
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Of each channel, which the difference is divided by."""

    def __call__(self, images: Tensor) -> Tensor:
        """Returns float32 images ``(..., channels, crop, crop)`` for uint8 ones of any size."""
        from torchvision.transforms import v2  # takes a second, and few need it

        steps = [
            v2.Resize(self.resize, antialias=True),
            v2.CenterCrop(self.crop),
            v2.ToDtype(torch.float32, scale=True),
        ]
        return v2.Compose([*steps, v2.Normalize(list(self.mean), list(self.std))])(images)


@dataclass(frozen=True)
class Weights:
    """Weights of a model: a safetensors file in the network, with its hash.

    Raises:
        ValueError: if the hash is not all of a SHA-256, or the URL is not one of the web.
    """

    model: str
    """A name of :func:`zoo.names`."""
    tag: str
    """Which of the model's weights these are."""
    url: str
    sha256: str
    """Of the file, as 64 hexadecimal digits, computed by whoever wrote the entry."""
    transforms: Transforms
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the model's builder, such as ``num_classes``."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else is known: data, recipe, accuracy with its source, licence, names of the classes."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"Weights: sha256 must be 64 hexadecimal digits, got {self.sha256!r}.")
        if not self.url.startswith(("https://", "http://")):
            raise ValueError(f"Weights: url must begin with https:// or http://, got {self.url!r}.")

    @property
    def name(self) -> str:
        """Model and tag."""
        return f"{self.model}.{self.tag}"

    @property
    def file_name(self) -> str:
        """What the file is called here; other content has another name."""
        return f"{self.name}-{self.sha256[:16]}.safetensors"


WEIGHTS: dict[str, Weights] = {}
"""All weights, by :attr:`Weights.name`. None are published yet; entries of your own may be added."""


def weights_of(model: str, tag: str | Weights) -> Weights:
    """Returns an entry for a model.

    Raises:
        WeightsError: if there is none, or it is another model's.
    """
    if isinstance(tag, Weights):
        if tag.model != model:
            raise WeightsError(f"zoo.create: expected weights of {model}, got {tag.name}.")
        return tag
    if f"{model}.{tag}" not in WEIGHTS:
        known = [each.tag for each in WEIGHTS.values() if each.model == model]
        raise WeightsError(f"zoo.create: {model} has no weights {tag!r}; it has {', '.join(known) or 'none'}.")
    return WEIGHTS[f"{model}.{tag}"]


def fetch(weights: Weights, folder: str | Path | None = None, *, progress: bool = True) -> Path:
    """Returns the file of weights, which it downloads unless it is there already.

    Whatever the file's name says, it is hashed each time; one that is damaged is downloaded again. A download is
    written under another name, and renamed when all of it has the hash: if anything goes wrong, nothing is left.

    Args:
        weights: which.
        folder: where to; by default ``checkpoints`` in :func:`torch.hub.get_dir`, where ``TORCH_HOME`` has a say.
        progress: whether to show a bar, on a terminal.

    Raises:
        WeightsError: if they can't be downloaded, have another hash, or can't be written. The message says what to
            download to where, for a machine without a network.
    """
    path = (Path(torch.hub.get_dir()) / "checkpoints" if folder is None else Path(folder)) / weights.file_name
    try:
        if path.exists() and _hash(path) == weights.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"zoo.fetch: cannot use {path}: {reason(error)}.") from None
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # another process may do the same
    try:
        found = _download(weights, partial, progress=progress)
        if found != weights.sha256:
            raise _Failed(f"what came has another SHA-256: {found}")
        partial.replace(path)
    except (_Failed, OSError) as error:
        why = str(error) if isinstance(error, _Failed) else f"cannot write {partial}: {reason(error)}"
        by_hand = f"Without a network, put that file at {path}; its SHA-256 is {weights.sha256}."
        raise WeightsError(f"zoo.fetch: cannot download {weights.url} for {weights.name}: {why}. {by_hand}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


class _Failed(Exception):  # noqa: N818
    """Something is wrong with the download, and not with the disk."""


def _download(weights: Weights, partial: Path, *, progress: bool) -> str:
    """Writes the file and returns its hash.

    Not by :func:`torch.hub.download_url_to_file`, which waits without end for a server that has fallen silent.
    """
    digest = hashlib.sha256()
    with _opened(weights.url) as response, partial.open("wb") as file:
        length = response.headers["Content-Length"]
        total = int(length) if length and length.isdigit() else None
        with _bar(weights.name, total, shown=progress) as advance:
            for chunk in _chunks(response):
                file.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
        if total is not None and file.tell() < total:
            raise _Failed(f"it ended after {file.tell():,} of {total:,} bytes")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _opened(url: str) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "invertible.zoo"})  # noqa: S310
    try:
        return urllib.request.urlopen(request, timeout=_PATIENCE)  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
        raise _Failed(f"the server says {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        why = error.reason
        raise _Failed(f"no connection, {reason(why) if isinstance(why, BaseException) else why}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(f"no answer, {reason(error)}") from None


def _chunks(response: IO[bytes]) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"the connection broke, {reason(error)}") from None
        if not chunk:
            return
        yield chunk


@contextmanager
def _bar(name: str, total: int | None, *, shown: bool) -> Generator[Callable[[int], None]]:
    """Shows how far a download is, on a terminal; yields what is told of each part."""
    from rich.console import Console  # most downloads were made before
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_weights(net: nn.Module, path: Path) -> None:
    """Writes a network's weights and statistics as safetensors, with :data:`FORMAT`: whole, or not at all.

    The same weights make the same bytes, and so the same hash.

    Args:
        net: whose ``state_dict`` is written, in its own dtypes.
        path: the file; it is replaced if it is there.

    Raises:
        WeightsError: if it can't be written.
    """
    tensors = {key: t.detach().cpu().contiguous() for key, t in net.state_dict().items()}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        save_file(tensors, partial, {"zoo_format": str(FORMAT)})  # one entry: they have no order
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:  # the latter if the disk is full
        raise WeightsError(f"zoo.save_weights: cannot write {path}: {reason(error)}.") from None
    finally:
        partial.unlink(missing_ok=True)


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Loads a safetensors file into a network: all tensors of the same names and shapes, or nothing.

    Args:
        net: its weights and statistics are replaced; dtypes and devices stay.
        path: the file; one of a training run, or one from elsewhere with the same tensors, will do.

    Raises:
        WeightsError: if the file can't be read, is of a newer format, or the first of its tensors that do not fit is
            so and so; nothing was loaded then.

    Example:
        >>> import zoo
        >>> load_weights(zoo.create("irevnet_small"), "nowhere.safetensors")
        Traceback (most recent call last):
            ...
        zoo.errors.WeightsError: zoo.load_weights: cannot read nowhere.safetensors: No such file or directory.
    """
    path = Path(path)
    try:
        with path.open("rb"), safetensors.safe_open(path, "pt") as file:  # opened twice for the plainer errors
            version = (file.metadata() or {}).get("zoo_format", "0")
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"zoo.load_weights: cannot read {path}: {reason(error)}.") from None
    except safetensors.SafetensorError as error:
        raise WeightsError(f"zoo.load_weights: {path} is not a whole safetensors file: {reason(error)}.") from None
    if not version.isdigit() or int(version) > FORMAT:
        raise WeightsError(f"zoo.load_weights: {path} has format {version}, and this version reads up to {FORMAT}.")
    own = {key: tuple(t.shape) for key, t in net.state_dict().items()}
    wrong = [key for key in {**own, **shapes} if own.get(key) != shapes.get(key)]
    if wrong:
        expected, got = (each.get(wrong[0], "no such tensor") for each in (own, shapes))
        count = f"{len(wrong)} of {len(own.keys() | shapes.keys())} tensors differ"
        raise WeightsError(
            f"zoo.load_weights: {path} does not fit this {type(net).__name__}: {count}, "
            f"first {wrong[0]}: expected {expected}, got {got}."
        )
    net.load_state_dict(load_file(path))
