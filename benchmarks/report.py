"""How every benchmark prints its tables and keeps its numbers."""

import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console_of", "keep", "markdown"]


def console_of(width: int) -> "Console":
    """A console as wide as the terminal; where there is none, as the table needs."""
    from rich.console import Console  # what prints by markdown alone runs where there is no rich

    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def keep(console: "Console", name: str, **found: Any) -> None:
    """Writes all numbers of a run, with what it ran on, to runs/benchmarks/NAME-TIME.json and says so."""
    path = Path("runs/benchmarks") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "argv": sys.argv[1:]}
    path.write_text(json.dumps({**about, "date": time.strftime("%Y-%m-%d"), **found}))
    console.print(f"every number is in {path}", highlight=False)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> str:
    """A table as the documentation writes it, with its columns aligned."""
    lines = [list(head), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([*([title, ""] if title else []), *table])
