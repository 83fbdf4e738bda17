"""Decodes every image once and writes down what it found."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from zoo.data.images import decode_image
from zoo.data.sources import Source
from zoo.data.workers import worker_options
from zoo.errors import InputError

__all__ = ["verify"]


class _Checked(Dataset[Any]):
    def __init__(self, source: Source, split: str) -> None:
        self.source, self.split = source, split

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.source.name(index)
        row: dict[str, Any] = {"split": self.split, "name": name}
        row["class"] = self.source.classes[int(self.source.labels[index])]
        try:
            content = self.source.read(index)
            row |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _, row["height"], row["width"] = decode_image(content, name).shape
        except InputError as error:
            row["error"] = str(error)
        return row


def verify(
    sources: dict[str, Source],
    manifest: Path,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _bad: None,
) -> tuple[int, list[str]]:
    """Decodes every image and writes a manifest: a line of JSON for each, in order, the file whole or not at all.

    A line has ``split``, ``name``, ``class``, ``bytes``, ``sha256``, ``height``, ``width`` (pixels), and ``error`` if
    the image can't be read.

    Args:
        sources: by the name of their split.
        manifest: the file.
        workers: processes that decode; 0 decodes in this one.
        progress: called after each image with how many are done and how many of them are bad.

    Returns:
        How many images there are, and an error for each bad one.

    Example:
        >>> import tempfile
        >>> from zoo.data import ImageTree
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (path := Path(folder) / "cat/0.png").parent.mkdir()
        ...     _ = path.write_bytes(b"no image")
        ...     count, errors = verify({"train": ImageTree(Path(folder))}, Path(folder) / "manifest.jsonl")
        >>> count, errors[0].partition(": ")[2]
        (1, 'not an image file')
    """
    manifest.parent.mkdir(parents=True, exist_ok=True)
    partial = manifest.with_name(manifest.name + ".tmp")
    done, errors = 0, list[str]()
    with ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for row in _rows(sources, workers):
                file.write(json.dumps(row) + "\n")
                done += 1
                if "error" in row:
                    errors.append(row["error"])
                progress(done, len(errors))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(manifest)
    return done, errors


def _rows(sources: dict[str, Source], workers: int) -> Iterator[dict[str, Any]]:
    for split, source in sources.items():
        yield from DataLoader(_Checked(source, split), batch_size=None, **worker_options(workers))
