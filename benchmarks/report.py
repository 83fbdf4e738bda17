"""How every benchmark prints its tables and keeps its numbers."""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

__all__ = ["console_of", "keep"]


def console_of(width: int) -> Console:
    """A console as wide as the terminal; where there is none, as the table needs."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def keep(console: Console, name: str, **found: Any) -> None:
    """Writes all numbers of a run, with what it ran on, to runs/benchmarks/NAME-TIME.json and says so."""
    path = Path("runs/benchmarks") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "argv": sys.argv[1:]}
    path.write_text(json.dumps({**about, "date": time.strftime("%Y-%m-%d"), **found}))
    console.print(f"every number is in {path}", highlight=False)
