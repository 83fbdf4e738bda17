"""The numbers of a run that may end at any time: written after each of them, and taken up again."""

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

__all__ = ["Ledger", "folder", "newest"]

RUNNING, DIED = "running", "the process ended here"


def folder() -> Path:
    """Where files go: ``$OUT`` if that is set, else ``runs/benchmarks``."""
    return Path(os.environ.get("OUT") or "runs/benchmarks")


def newest(where: Path) -> Path | None:
    """The last file of a run."""
    return max(where.glob("gpu-*.json"), default=None, key=lambda path: path.stat().st_mtime)


class Ledger:
    """What was found so far, in a file that is whole at any time.

    Args:
        path: the file.
        about: the device and versions; what is in an earlier file must be of the same.
        resume: a file of an earlier run, to go on with what is in it; it may be this one, else it is left alone.
        minutes: after so many no more is begun; ``None``: there is no end.
        clock: what tells the seconds.

    Raises:
        ValueError: if the file is of another device or version.
    """

    def __init__(
        self,
        path: Path,
        about: dict[str, Any],
        *,
        resume: Path | None = None,
        minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self._clock = path, clock
        self._end = None if minutes is None else clock() + 60 * minutes
        self.found: dict[str, Any] = {"about": about, "groups": {}}
        if resume is not None:
            self.found = json.loads(resume.read_text())
            if self.found["about"] != about:
                raise ValueError(f"{resume} is of {self.found['about']}, and this is {about}")
            for group in self.found["groups"].values():
                for case in group["cases"].values():
                    if case["status"] == RUNNING:
                        case["status"] = DIED
            for rows in self.found.get("rows", {}).values():
                if rows["status"] == RUNNING:
                    rows["found"].append(None)
        self.save()

    def save(self) -> None:
        """Writes all, in one move."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1))
        part.replace(self.path)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self._end is not None and self._clock() >= self._end

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What is there by this key, or else is made now, if there is time."""
        if key not in self.found and not self.over:
            self.found[key] = make()
            self.save()
        return self.found.get(key)

    def rows(self, key: str, make: Callable[[int], Generator[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Rows of a table, written one by one as long as there is time; without those in which a process ended.

        Args:
            key: of the table.
            make: makes the rows after so many.
        """
        table = self.found.setdefault("rows", {}).setdefault(key, {"found": [], "status": "begun"})
        if table["status"] != "done" and not self.over:
            with closing(make(len(table["found"]))) as rows:
                while table["status"] != "done" and not self.over:
                    table["status"] = RUNNING
                    self.save()
                    row = next(rows, None)
                    table["status"] = "begun" if row else "done"
                    table["found"] += [row] if row else []
            self.save()
        return [row for row in table["found"] if row is not None]

    def tries(self, name: str) -> int:
        """How often a group was begun."""
        return self.found["groups"].get(name, {}).get("tries", 0)

    def group(self, name: str) -> dict[str, Any]:
        """What was found of a group; what was timed of one that did not end is forgotten."""
        group: dict[str, Any] = self.found["groups"].setdefault(name, {"done": False, "cases": {}})
        if not group["done"]:
            group["cases"] = {k: case for k, case in group["cases"].items() if case["status"] == DIED}
        return group
