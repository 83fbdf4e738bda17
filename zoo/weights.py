"""Trained weights: where they are, what they are, and that they are what they should be before anything is loaded."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo._frozen import frozen
from zoo._writing import whole
from zoo.errors import WeightsError, reason

__all__ = [
    "FORMAT",
    "WEIGHTS",
    "Transforms",
    "Weights",
    "fetch",
    "load_weights",
    "save_weights",
    "weights_of",
]

FORMAT = 1
"""Of the names and shapes of the tensors that the zoo's networks have; it rises when an older file no longer fits."""

_CHUNK = 1 << 20
_PATIENCE = 30  # seconds without a byte
_FLOATING, _INTEGER = "floating-point", "integer"
_KINDS: dict[str, str] = {"BOOL": "bool", "C64": "complex64"}
_KINDS |= dict.fromkeys(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"), _FLOATING)
_KINDS |= dict.fromkeys(("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"), _INTEGER)


@dataclass(frozen=True)
class Transforms:
    """What makes of an image what the network was trained to see.

    Raises:
        ValueError: if mean and standard deviation are of different numbers of channels.

    Example:
        >>> prepare = Transforms(resize=40, crop=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> prepare(torch.full((3, 60, 80), 255, dtype=torch.uint8)).mean(dim=(1, 2))  # white becomes (1 - 0.5) / 0.5
        tensor([1., 1., 1.])
    """

    resize: int
    """What the shorter side is scaled to, in pixels."""
    crop: int
    """Height and width of the crop from the centre, in pixels."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Of each channel, subtracted from images in [0, 1]."""
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Of each channel, which the difference is divided by."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            counts = f"{len(self.mean)} and {len(self.std)}"
            raise ValueError(f"Transforms: mean and std must have one value for each channel, got {counts}.")

    def __call__(self, images: Tensor) -> Tensor:
        """Returns float32 images ``(..., channels, crop, crop)`` for uint8 ones of any size.

        Raises:
            TypeError: if they are not uint8: nobody can tell then what is white.
            ValueError: if they have another number of channels than ``mean``.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:  # pyright: ignore[reportUnnecessaryIsInstance]
            got = (
                f"dtype {images.dtype}" if isinstance(images, Tensor) else f"an object of type {type(images).__name__}"
            )  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Transforms: expected a tensor of uint8 images, from 0 to 255, got {got}.")
        channels, shape = len(self.mean), tuple(images.shape)
        if len(shape) < 3 or shape[-3] != channels:
            rule = f"expected images of shape (..., {channels}, height, width)"
            raise ValueError(f"Transforms: {rule}, got a tensor of shape {shape}.")
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
        ValueError: if the hash is not all of a SHA-256, the URL is not one of the web, or model or tag could not be in
            a file's name.

    Example:
        >>> Weights("irevnet_small", "mine", "https://example.org/w", "0f" * 32, Transforms(32, 32)).file_name
        'irevnet_small.mine-0f0f0f0f0f0f0f0f.safetensors'
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
        for part in (self.model, self.tag):
            if not re.fullmatch(r"[\w.+-]+", part):
                rule = "model and tag must be of letters, digits and . _ + -"
                raise ValueError(f"Weights: {rule}, got {part!r}.")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ValueError(f"Weights: sha256 must be 64 hexadecimal digits, got {self.sha256!r}.")
        if not self.url.startswith(("https://", "http://")):
            raise ValueError(f"Weights: url must begin with https:// or http://, got {self.url!r}.")
        object.__setattr__(self, "sha256", self.sha256.lower())
        object.__setattr__(self, "options", frozen(self.options))
        object.__setattr__(self, "metadata", frozen(self.metadata))

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

    Example:
        >>> weights_of("iunet", Weights("iunet", "mine", "https://example.org/w", "0f" * 32, Transforms(32, 32))).name
        'iunet.mine'
    """
    if isinstance(tag, Weights):
        if tag.model != model:
            raise WeightsError(f"zoo.create: expected weights of {model}, got {tag.name}.")
        return tag
    known = {each.tag: each for each in WEIGHTS.values() if each.model == model}  # whatever their keys are
    if tag not in known:
        raise WeightsError(f"zoo.create: {model} has no weights {tag!r}; it has {', '.join(known) or 'none'}.")
    return known[tag]


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

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # which has the file, an empty one
        ...     mine = Weights("iunet", "mine", "https://example.org", hashlib.sha256().hexdigest(), Transforms(32, 32))
        ...     (Path(folder) / mine.file_name).touch()
        ...     fetch(mine, folder).name
        'iunet.mine-e3b0c44298fc1c14.safetensors'
    """
    path = (Path(torch.hub.get_dir()) / "checkpoints" if folder is None else Path(folder)) / weights.file_name
    try:
        if path.exists() and _hash(path) == weights.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"zoo.fetch: cannot use {path}: {reason(error)}.") from None
    try:
        with whole(path) as partial:
            found = _download(weights, partial, progress=progress)
            if found != weights.sha256:
                raise _Failed(f"what came has another SHA-256: {found}")
    except (_Failed, OSError) as error:
        why = str(error) if isinstance(error, _Failed) else f"cannot write {path}: {reason(error)}"
        by_hand = f"Without a network, put that file at {path}; its SHA-256 is {weights.sha256}."
        raise WeightsError(f"zoo.fetch: cannot download {weights.url} for {weights.name}: {why}. {by_hand}") from None
    return path


class _Failed(Exception):  # noqa: N818
    """Something is wrong with the download, and not with the disk."""


def _download(weights: Weights, partial: Path, *, progress: bool) -> str:
    """Writes the file and returns its hash.

    Not by :func:`torch.hub.download_url_to_file`, which waits without end for a server that has fallen silent.
    """
    digest = hashlib.sha256()
    with _opened(weights.url) as response, partial.open("wb") as file:
        length = response.headers["Content-Length"] or ""
        total = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        with _bar(weights.name, total, shown=progress) as advance:
            for chunk in _chunks(response):
                file.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
        if total is not None and file.tell() < total:
            raise _Failed(f"it ended after {file.tell():,} of {total:,} bytes")
    return digest.hexdigest()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """As urllib's, which leaves the connection open where it is sent to what is no address."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opened(url: str) -> Any:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "invertible.zoo"})  # noqa: S310
        return urllib.request.build_opener(_Redirects).open(request, timeout=_PATIENCE)
    except urllib.error.HTTPError as error:
        error.close()
        raise _Failed(f"the server says {error.code} {error.reason}".splitlines()[0].rstrip(".")) from None
    except urllib.error.URLError as error:
        why = error.reason
        raise _Failed(f"no connection, {reason(why) if isinstance(why, BaseException) else why}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(f"no answer, {reason(error)}") from None
    except ValueError as error:  # this address, or one that the server has sent on to
        raise _Failed(f"no address of the web, {reason(error)}") from None


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


def save_weights(net: nn.Module, path: str | Path) -> None:
    """Writes a network's weights and statistics as safetensors, with :data:`FORMAT`: whole, or not at all.

    The same weights make the same bytes, and so the same hash.

    Args:
        net: whose ``state_dict`` is written, in its own dtypes.
        path: the file; it is replaced if it is there.

    Raises:
        WeightsError: if it can't be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(nn.Linear(2, 1), path := Path(folder) / "w.safetensors")
        ...     stored_in(path)["weight"]
        Stored(shape=(1, 2), dtype='F32')
    """
    tensors = {key: t.detach().cpu().contiguous() for key, t in net.state_dict().items()}
    try:
        with whole(Path(path)) as partial:
            save_file(tensors, partial, {"zoo_format": str(FORMAT)})  # one entry: they have no order
    except (OSError, safetensors.SafetensorError) as error:  # the latter if the disk is full
        raise WeightsError(f"zoo.save_weights: cannot write {path}: {reason(error)}.") from None


class Stored(NamedTuple):
    """What a file says of one of its tensors."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it, such as ``F32``."""


def stored_in(path: Path) -> dict[str, Stored]:
    """Returns what the tensors of a file are, without reading them.

    Raises:
        WeightsError: if it can't be read, or is of a newer format.
    """
    try:
        with path.open("rb"), safetensors.safe_open(path, "pt") as file:  # opened twice for the plainer errors
            version = (file.metadata() or {}).get("zoo_format", "0")
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: Stored(tuple(each.get_shape()), str(each.get_dtype())) for key, each in slices.items()}
    except OSError as error:
        raise WeightsError(f"zoo.load_weights: cannot read {path}: {reason(error)}.") from None
    except safetensors.SafetensorError as error:
        raise WeightsError(f"zoo.load_weights: {path} is not a whole safetensors file: {reason(error)}.") from None
    if not re.fullmatch(r"[0-9]{1,9}", version) or int(version) > FORMAT:
        newer = f"{path} has format {version!r:.40}"
        raise WeightsError(f"zoo.load_weights: {newer}, and this version reads up to {FORMAT}.")
    return found


def check_fit(net: nn.Module, found: Mapping[str, Stored], path: Path) -> None:
    """Compares names, shapes and kinds of dtypes: any floating-point one fits another, and any integer one.

    Raises:
        WeightsError: if one differs; the message names the first.
    """
    own = net.state_dict()
    misfits = {key: _misfit(own.get(key), found.get(key)) for key in {**own, **found}}
    wrong = [f"{key}: {misfit}" for key, misfit in misfits.items() if misfit]
    if wrong:
        count = f"{len(wrong)} of {len(misfits)} tensors differ"
        raise WeightsError(
            f"zoo.load_weights: {path} does not fit this {type(net).__name__}: {count}, first {wrong[0]}."
        )


def _misfit(own: Tensor | None, found: Stored | None) -> str:
    """How a tensor of a file differs from one of a network; empty if it does not."""
    if own is None or found is None or tuple(own.shape) != found.shape:
        expected = "no such tensor" if own is None else tuple(own.shape)
        return f"expected {expected}, got {'no such tensor' if found is None else found.shape}"
    kind = _FLOATING if own.is_floating_point() else _INTEGER
    if own.dtype == torch.bool or own.is_complex():
        kind = str(own.dtype).removeprefix("torch.")
    return "" if kind == _KINDS.get(found.dtype) else f"expected {kind} values, got {found.dtype}"


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Loads a safetensors file into a network: all tensors of the same names and shapes, or nothing.

    Args:
        net: its weights and statistics are replaced; dtypes and devices stay. Weights may be of another floating-point
            dtype in the file, and counts of another integer one.
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
    check_fit(net, stored_in(path), path)
    net.load_state_dict(load_file(path))
