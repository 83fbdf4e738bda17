"""What a run writes down: ``metrics.jsonl``, and TensorBoard's files if wanted."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import InputError, reason

__all__ = ["TIMING", "Board", "Journal", "rows_of"]

TIMING = ("seconds", "images_per_second", "waiting", "peak_bytes")
"""The fields of ``metrics.jsonl`` that differ between two runs with the same seed; all others are the same."""


class Journal:
    """The rows of a run, one of JSON per line, in the order of the steps.

    Args:
        path: of the file, which is added to.
        position: bytes of it that count; what an interrupted session wrote after its last checkpoint is cut off.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(path := Path(folder) / "metrics.jsonl")
        ...     journal.write({"kind": "train", "step": 50, "loss": 2.0})
        ...     position = journal.position()
        ...     journal.write({"kind": "train", "step": 51, "loss": 1.9})  # after the last checkpoint
        ...     journal.close()
        ...     Journal(path, position).close()
        ...     path.read_text().strip()
        '{"kind": "train", "step": 50, "loss": 2.0}'
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(min(position, path.stat().st_size))

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds a row."""
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()

    def position(self) -> int:
        """How many bytes there are, all of them on the disk."""
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Board:
    """Writes the numbers of rows for TensorBoard.

    Args:
        folder: for its files.
        step: the last one that counts; what an earlier session wrote after it is hidden.

    Raises:
        InputError: if TensorBoard is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     board = Board(Path(folder), step=0)
        ...     board.write({"kind": "train", "step": 1, "loss": 2.0})  # as train/loss
        ...     board.close()
        ...     [path.name.partition(".")[0] for path in Path(folder).iterdir()]
        ['events']
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("--tensorboard needs TensorBoard: pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the numbers of a row."""
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()


def rows_of(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of the run in a folder: all, or those of one kind, ``train`` or ``validation``.

    Raises:
        InputError: if there is no log, or it can't be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder) / "metrics.jsonl")
        ...     for step in (50, 100):
        ...         journal.write({"kind": "train", "step": step})
        ...     journal.close()
        ...     rows_of(Path(folder), "train")
        [{'kind': 'train', 'step': 50}, {'kind': 'train', 'step': 100}]
    """
    path = folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(row, dict) and "kind" in row for row in rows):
            raise ValueError("a line is no row of a run")
    except FileNotFoundError:
        raise InputError(f"no run in {folder}: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from None
    return [row for row in rows if kind in {None, row["kind"]}]
