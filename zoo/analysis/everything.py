"""All analyses of a network, one after another."""

import argparse
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

from zoo.analysis.subject import images_of, open_subject
from zoo.errors import InputError, UnsuitedError, in_memory, reason
from zoo.progress import say

__all__ = ["run"]

_PASSED_ON = ("data", "size", "device", "seed", "output", "beside")
"""To each analysis that has such an argument."""


def run(
    given: argparse.Namespace,
    console: Console,
    analyses: Mapping[str, tuple[ModuleType, str]],
    parser: argparse.ArgumentParser,
) -> int:
    """Runs each analysis with its defaults, and returns the exit code: 0, or 2 if one has failed.

    One that can't be made of the network is skipped; one that fails does not keep the others from being made.

    Args:
        given: what was asked for.
        console: where to.
        analyses: by name the module and what it is about.
        parser: of the command line, which has the defaults.

    Raises:
        InputError: if a checkpoint or the data can't be opened at all.
    """
    for checkpoint in (given.checkpoint, *given.beside):
        open_subject(checkpoint, device=given.device, size=given.size)
    images_of(given.data)
    made: dict[str, list[str]] = {}
    skipped: list[str] = []
    failed: list[str] = []
    for name, (module, _) in analyses.items():
        before = _stamps(given.output)
        try:
            say(console, f"{name} ...")
            with in_memory():
                module.run(_namespace(name, given, parser), console)
            made[name] = sorted(path.name for path, stamp in _stamps(given.output).items() if before.get(path) != stamp)
        except UnsuitedError as error:
            skipped.append(f"{name} is skipped: {error}")
            say(console, skipped[-1])
        except InputError as error:
            failed.append(name)
            print(f"error: {name}: {error}", file=sys.stderr)  # noqa: T201 (as the commands do)
        except KeyboardInterrupt as stop:
            kept = [f"{', '.join(made)} written to {given.output}"] if made else []
            raise KeyboardInterrupt("; ".join([*kept, *stop.args]) or "no figure was written") from None
        except Exception as error:  # noqa: BLE001
            failed.append(name)
            traceback.print_exc()
            print(f"error: {name}: {reason(error)}", file=sys.stderr)  # noqa: T201
    _show(console, given.output, made, {name: about for name, (_, about) in analyses.items()}, skipped)
    if failed:
        print(f"error: {', '.join(failed)} failed; see above", file=sys.stderr)  # noqa: T201
    return 2 if failed else 0


def _namespace(name: str, given: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the analysis' own command would be given."""
    own = parser.parse_args([name, f"--checkpoint={given.checkpoint}"])
    for key in _PASSED_ON:
        if hasattr(own, key):
            setattr(own, key, getattr(given, key))
    return own


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """The files in a folder, with what changes when one is written."""
    if not folder.is_dir():
        return {}
    files = [(path, path.stat()) for path in folder.iterdir() if path.is_file()]
    return {path: (status.st_mtime_ns, status.st_ino) for path, status in files}


def _show(
    console: Console, folder: Path, made: Mapping[str, list[str]], about: Mapping[str, str], skipped: list[str]
) -> None:
    table = Table(title=f"in {folder}", title_justify="left")
    for column in ("analysis", "what it is", "files"):
        table.add_column(column)
    for name, files in made.items():
        table.add_row(name, about[name], " ".join(files))
    console.print(table)
    for line in skipped:
        say(console, line)
