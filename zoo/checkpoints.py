"""Checkpoints that survive a kill at any moment: each is a folder that is whole or not there."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.errors import InputError, reason

__all__ = ["CHECKPOINTS", "Checkpoint", "Keep", "any_left", "load", "mark_best", "name_of", "names", "save", "write"]

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints in that of a run."""

_PREFIX, _PARTIAL, _OLD, _DAMAGED = "step_", ".partial-", ".old-", "damaged-"
_WEIGHTS, _AVERAGE, _STATE, _META = "model.safetensors", "ema.safetensors", "state.pt", "meta.json"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a new one is written, besides the best.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in range(1, 6):
        ...         path = save(Path(folder), Checkpoint(step, {}, None, {}), keep=Keep(last=1, every=2))
        ...     names(Path(folder))
        ['step_000000002', 'step_000000004', 'step_000000005']
    """

    last: int = 3
    """So many of the newest, at least 1."""
    every: int | None = None
    """Those of steps that this divides."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> checkpoint = Checkpoint(100, net.state_dict(), None, {"classes": ["cat"]})
        >>> checkpoint.step, list(checkpoint.weights)
        (100, ['weight', 'bias'])
    """

    step: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    """The moving average of the weights, if there is one."""
    state: Mapping[str, Any]
    """Tensors, numbers, strings, lists and dictionaries of these."""


def names(folder: Path) -> list[str]:
    """The checkpoints in a folder, oldest first.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (1000, 200):
        ...         path = save(Path(folder), Checkpoint(step, {}, None, {}))
        ...     names(Path(folder))
        ['step_000000200', 'step_000001000']
    """
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if _NAME.fullmatch(entry.name) and entry.is_dir())


_NAME = re.compile(_PREFIX + r"\d{9}")


def any_left(folder: Path) -> bool:
    """Whether there is a checkpoint, or was one: damaged ones count, too.

    Example:
        >>> any_left(Path("nowhere"))
        False
    """
    return bool(names(folder)) or any(folder.glob(f"{_DAMAGED}*")) or any(folder.glob(f"{_OLD}*"))


def save(folder: Path, checkpoint: Checkpoint, *, best: int | None = None, keep: Keep | None = None) -> Path:
    """Writes ``folder/step_N/`` and the name of it into ``folder/latest``, and removes what is not to be kept.

    Files are written into a folder with a temporary name and brought to the disk; that folder is then renamed. So a
    process may be killed, and a machine may lose power, at any moment.

    Args:
        folder: of all checkpoints of a run; made if it is not there.
        checkpoint: what to write.
        best: the step of the best so far, this one or another: ``folder/best`` will name it.
        keep: which others stay.

    Raises:
        InputError: if it can't be written; the others are as they were.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(Path(folder), Checkpoint(100, {"w": torch.ones(1)}, None, {}), best=100)
        ...     path.name, sorted(file.name for file in path.iterdir())
        ('step_000000100', ['meta.json', 'model.safetensors', 'state.pt'])
    """
    name = name_of(checkpoint.step)
    partial, target, old = folder / (_PARTIAL + name), folder / name, folder / f"{_OLD}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        partial.mkdir()
        _write_files(partial, checkpoint)
        if target.exists():  # of the same step, before it was evaluated
            target.rename(old)
        partial.rename(target)
        _sync(folder)
        shutil.rmtree(old, ignore_errors=True)
        write(folder / "latest", name.encode())
        mark_best(folder, best)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # the last two if the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        before = [each for each in names(folder) if each != name]
        last = f"the last good one is {folder / before[-1]}" if before else "there is none before it"
        raise InputError(f"cannot write the checkpoint {target}: {reason(error)}; {last}") from None
    _prune(folder, keep or Keep(), name)
    return target


def mark_best(folder: Path, step: int | None) -> None:
    """Lets ``folder/best`` name the checkpoint of a step, if there is such a one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(Path(folder), Checkpoint(100, {}, None, {}))
        ...     mark_best(Path(folder), 100)
        ...     (Path(folder) / "best").read_text()
        'step_000000100'
    """
    if step is not None and (folder / name_of(step)).is_dir():
        write(folder / "best", name_of(step).encode())


def name_of(step: int) -> str:
    """That of the checkpoint of a step.

    Example:
        >>> name_of(100)
        'step_000000100'
    """
    return f"{_PREFIX}{step:09d}"


def load(
    folder: Path, name: str | None = None, *, owner: bool = False, say: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """Reads the newest checkpoint that is whole; every file's checksum is compared.

    Args:
        folder: of all checkpoints of a run.
        name: of one of them, to read this one or none.
        owner: whether nobody else writes to the folder. Then what a process that was killed has left is cleared away,
            and one that is damaged is put aside, as ``damaged-step_N``, so that it never counts again. Otherwise
            nothing is touched: a run that is alive may be at work there.
        say: is told of each that is damaged, and passed over.

    Raises:
        InputError: if there is none that is whole.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (100, 200):
        ...         path = save(Path(folder), Checkpoint(step, {"w": torch.ones(1)}, None, {}))
        ...     _ = (path / "model.safetensors").write_bytes(b"damaged")
        ...     load(Path(folder)).step, load(Path(folder), name_of(100)).weights
        (100, {'w': tensor([1.])})
    """
    if owner:
        _recover(folder)
    found = _candidates(folder) if name is None else [folder / name]
    for path in reversed(found):
        try:
            return _read_alive(path)
        except Exception as error:  # noqa: BLE001
            # A damaged file fails in as many ways as there are bytes; a file that is there and can't be read, or a lack
            # of memory, says nothing about it.
            unreadable = isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError)
            if name is not None or unreadable:
                raise InputError(f"cannot read {path}: {reason(error)}") from None
            say(f"{path} is damaged and passed over: {reason(error)}")
            if owner:
                _set_aside(path)
    damaged = found or any(folder.glob(f"{_DAMAGED}*"))
    raise InputError(f"no checkpoint in {folder}" + (": all are damaged" if damaged else ""))


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints, oldest first; of one that was about to be replaced, what it was."""
    found = {name: folder / name for name in names(folder)}
    for old in folder.glob(f"{_OLD}*"):
        found.setdefault(old.name.removeprefix(_OLD), old)
    return [found[name] for name in sorted(found)]


def _read_alive(path: Path) -> Checkpoint:
    """Reads a checkpoint; once more, if a run has replaced it meanwhile."""
    try:
        return _read(path)
    except Exception:  # noqa: BLE001 (it fails again if it is damaged)
        return _read(path)


def write(path: Path, content: bytes) -> None:
    """Writes a small file whole or not at all, and brings it to the disk.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(path := Path(folder) / "latest", b"step_000000100")
        ...     path.read_bytes()
        b'step_000000100'
    """
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(_plain(checkpoint.weights), folder / _WEIGHTS)
    if checkpoint.average is not None:
        save_file(_plain(checkpoint.average), folder / _AVERAGE)
    torch.save(dict(checkpoint.state), folder / _STATE)
    files = {path.name: _sums(path) for path in sorted(folder.iterdir())}
    meta = {"step": checkpoint.step, "files": files}
    write(folder / _META, (json.dumps({**meta, "crc32": _crc(meta)}, indent=2) + "\n").encode())
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.detach().cpu().contiguous() for key, t in tensors.items()}


def _read(folder: Path) -> Checkpoint:
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    if meta.pop("crc32") != _crc(meta):
        raise ValueError(f"{_META} is not what was written")
    for name, expected in meta["files"].items():
        if _sums(folder / name) != expected:
            raise ValueError(f"{name} is not what was written")
    if {_WEIGHTS, _STATE} - meta["files"].keys():
        raise ValueError("files are missing")
    average = load_file(folder / _AVERAGE) if _AVERAGE in meta["files"] else None
    state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    return Checkpoint(meta["step"], load_file(folder / _WEIGHTS), average, state)


def _crc(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _sums(path: Path) -> dict[str, int]:
    """Length and checksum of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": checksum}


def _sync(path: Path) -> None:
    """Brings a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _recover(folder: Path) -> None:
    """Removes what a process that was killed has left, and takes back what it was about to replace."""
    for old in folder.glob(f"{_OLD}*"):
        target = folder / old.name.removeprefix(_OLD)
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{_DAMAGED}{path.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    except OSError:  # a folder that is not ours: it is passed over the next time, too
        return


def _prune(folder: Path, keep: Keep, newest: str) -> None:
    found = names(folder)
    kept = {newest, *found[-keep.last :]}
    best = folder / "best"
    if best.exists():
        kept.add(best.read_text().strip())
    if keep.every is not None:
        kept |= {name for name in found if int(name.removeprefix(_PREFIX)) % keep.every == 0}
    for name in found:
        if name not in kept:
            gone = folder / (_PARTIAL + name)  # or a kill would leave half of it
            (folder / name).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
