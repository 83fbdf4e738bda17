"""What is finished of a computation that takes long, in a folder, so that the same computation can go on there."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import invertible
from zoo._writing import whole
from zoo.environment import environment
from zoo.errors import InputError, reason
from zoo.registry import config_of

__all__ = ["Parts", "key_of"]

_FORMAT = 1
"""Of the files, and of the computations that write them: one that gives other bits counts it up."""


class Parts:
    """Parts of one computation: files in a folder that others may use, too.

    Each is written whole, and holds the key of its computation and a checksum. What is damaged, or of another
    computation, is never read.

    Args:
        folder: made with the first part.
        key: what tells this computation from every other, as :func:`key_of` makes it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     parts = Parts(Path(folder), key_of(image=torch.zeros(3), k=5))
        ...     parts.save("basis", {"v": torch.ones(2)}, first=2)
        ...     parts.load("basis"), Parts(Path(folder), key_of(image=torch.zeros(3), k=6)).load("basis")
        (({'v': tensor([1., 1.])}, {'first': 2}), None)
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def save(self, name: str, tensors: Mapping[str, Tensor], **plain: Any) -> None:
        """Writes a part, in place of the one of this name.

        Args:
            name: of the part.
            tensors: what it is.
            plain: numbers and the like, as JSON has them.

        Raises:
            InputError: if it can't be written; the one that was there is as it was.
        """
        stored = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        text = json.dumps(plain)
        about = {"key": self.key, "plain": text, "crc32": str(_checksum(stored, text))}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(self._path(name)) as path:
                save_file(stored, path, about)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write to {self.folder}: {reason(error)}") from None

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A part, on the CPU; ``None`` if there is none that is whole."""
        try:
            with safe_open(self._path(name), "pt") as file:
                about: dict[str, str] = file.metadata() or {}
                if about.get("key") != self.key:
                    return None
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if about["crc32"] != str(_checksum(tensors, about["plain"])):
                return None
            return tensors, json.loads(about["plain"])
        except (OSError, SafetensorError, KeyError, ValueError):  # none, or a damaged one
            return None

    def remove(self, prefix: str = "") -> None:
        """Removes the parts whose names begin so, and the folder if it is empty then."""
        with suppress(OSError):
            for path in self.folder.glob(f"{self._start}{prefix}*"):
                path.unlink(missing_ok=True)
            for path in self.folder.glob(f".{self._start}{prefix}*.partial"):  # of a process that was killed
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    @property
    def any_left(self) -> bool:
        """Whether there is one."""
        return self.folder.is_dir() and any(self.folder.glob(f"{self._start}*"))

    @property
    def _start(self) -> str:
        return f"{self.key[:16]}-"

    def _path(self, name: str) -> Path:
        return self.folder / f"{self._start}{name}.safetensors"


def key_of(*, net: nn.Module | None = None, image: Tensor | None = None, **settings: Any) -> str:
    """A key that is another one for another network, other weights, another image, setting, device or version.

    Args:
        net: built by the zoo.
        image: and where it is computed with.
        settings: whatever else decides the bits of the result.

    Example:
        >>> x = torch.zeros(3)
        >>> len(key_of(image=x, k=5)), key_of(image=x, k=5) == key_of(image=x, k=6)
        (64, False)
    """
    device = torch.device("cpu") if image is None else image.device
    machine = environment(device)
    about = {key: machine[key] for key in ("torch", "threads", "device")}
    about |= {"format": _FORMAT, "invertible": invertible.__version__, **settings}
    found = hashlib.sha256()
    if net is not None:
        config = config_of(net)
        about |= {"model": config.model, "options": str(sorted(config.options.items()))}
        for name, tensor in net.state_dict().items():
            _digest(found, name, tensor)
    if image is not None:
        _digest(found, "image", image)
    found.update(json.dumps(about, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _digest(into: Any, name: str, tensor: Tensor) -> None:
    into.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    into.update(_bytes(tensor.detach().cpu().contiguous()))


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    found = zlib.crc32(text.encode())
    for key in sorted(tensors):
        found = zlib.crc32(_bytes(tensors[key]), zlib.crc32(f"{key} {tensors[key].dtype}".encode(), found))
    return found


def _bytes(tensor: Tensor) -> Any:
    """The memory of a tensor, which is not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
