"""How every analysis keeps what it found: numbers, and a picture as pixels and as curves."""

import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from zoo._writing import whole
from zoo.analysis.subject import Subject
from zoo.environment import environment
from zoo.errors import InputError, reason

__all__ = ["check_output", "keep", "picture", "progress_bar", "show"]


def keep(
    folder: Path,
    name: str,
    figure: Figure,
    numbers: Mapping[str, Any],
    *,
    subject: Subject | None = None,
    data: str | None = None,
    seed: int | None = None,
) -> list[Path]:
    """Writes ``NAME.json``, ``NAME.png`` and ``NAME.svg``, each whole or not at all, and returns their paths.

    Beside the numbers stands what made them: date and command; of a network that was run model, checkpoint, data, seed,
    versions and device, too. A number that is not finite is ``null``, for JSON has none.

    Raises:
        InputError: if they can't be written.
    """
    about: dict[str, Any] = {"analysis": name}
    if subject is not None:
        about |= {
            "model": subject.model,
            "checkpoint": str(subject.checkpoint),
            "data": data,
            "image_size": subject.recipe.evaluation_size,
            "seed": seed,
            **environment(subject.device),
        }
    about |= {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv[1:])}
    contents = {"json": (json.dumps(_finite({**about, **numbers}), indent=1) + "\n").encode()}
    with mpl.rc_context({"svg.hashsalt": "zoo"}):  # the same bytes for the same numbers
        kinds: dict[str, dict[str, Any]] = {"png": {"dpi": 110}, "svg": {"metadata": {"Date": None}}}
        for ending, options in kinds.items():
            drawn = io.BytesIO()
            figure.savefig(drawn, format=ending, **options)
            contents[ending] = drawn.getvalue()
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, content in contents.items():
            paths.append(folder / f"{name}.{ending}")
            with whole(paths[-1]) as partial:
                partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {reason(error)}") from None
    return paths


def _finite(value: Any) -> Any:
    """The same, with ``None`` for numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(folder: Path) -> None:
    """Sees whether files can be written to a folder, which need not be there: before what is to be written takes long.

    Raises:
        InputError: if they can't.
    """
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        with tempfile.TemporaryFile(dir=there):  # it removes itself
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {reason(error)}") from None


def picture(image: Tensor) -> "np.ndarray":
    """An image ``(3, height, width)`` in [0, 1] as 8-bit pixels ``(height, width, 3)``; what is beyond is clipped."""
    inside = image.detach().cpu().double().nan_to_num().clamp(0, 1)
    return (255 * inside).round().to(torch.uint8).permute(1, 2, 0).numpy()


def show(console: Console, title: str, header: list[str], rows: list[list[str]], paths: list[Path]) -> None:
    """Prints a table, and where everything was written."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(" ".join(map(str, paths)), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(what: str) -> Generator[Callable[[int, int], None]]:
    """A bar on the error stream, if that is a terminal; it yields what is told how much is done, and of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
