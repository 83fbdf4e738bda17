"""``python -m zoo.data verify DIR`` decodes every image of a data set once and writes a manifest."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zoo.data.opening import open_data
from zoo.data.verify import verify
from zoo.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 if images are bad, 2 for wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m zoo.data", description="Work on data sets.")
    command = parser.add_subparsers(required=True).add_parser(
        "verify", help="decode every image once", description="Decodes every image once and writes a manifest."
    )
    command.add_argument("data", type=Path, metavar="DIR", help="folder with training and validation images")
    command.add_argument(
        "--manifest", type=Path, metavar="FILE", help="a line of JSON per image (default: DIR/manifest.jsonl)"
    )
    command.add_argument(
        "--workers", type=_count, metavar="N", default=max((os.cpu_count() or 1) - 1, 0), help="processes that decode"
    )
    given = parser.parse_args(arguments)
    manifest = given.manifest or given.data / "manifest.jsonl"
    console = Console(stderr=True)
    try:
        data = open_data(given.data)
        sources = {"train": data.training, "val": data.validation}
        total = sum(len(source) for source in sources.values())
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[bad]} bad"))
        with Progress(*columns, TimeRemainingColumn(compact=True), console=console, transient=True) as bar:
            task = bar.add_task("", total=total, bad=0)
            done, errors = verify(
                sources,
                manifest,
                workers=given.workers,
                progress=lambda done, bad: bar.update(task, completed=done, bad=bad),
            )
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no manifest written", file=sys.stderr)
        return 130
    for error in errors:
        print(error)
    print(f"{done} images in {len(data.classes)} classes, {len(errors)} of them bad; {manifest}")
    return 1 if errors else 0


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
