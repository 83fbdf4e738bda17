"""The tables of ``benchmarks.gpu``, made of what is in its file: so they can be printed of half a run, too."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.interleaved import interval
from benchmarks.report import markdown

__all__ = ["AIMS", "Aim", "aims_table", "group_table", "ratio"]

OPEN = "open"
NOT_JUDGED = "not judged"
"""Where the figures say nothing: of next to nothing."""


class Aim(NamedTuple):
    """What a case is to take at most, as a multiple of another."""

    what: str
    case: str
    to: str
    """The other case; for the slope nothing."""
    most: float


AIMS = (
    Aim("`Reconstruct` compiled / eager `Store`", "reconstruct+compiled", "store", 1.0),
    Aim("`Reconstruct` compiled / compiled `Store`", "reconstruct+compiled", "store+compiled", 1.35),
    Aim("`Reconstruct` / the floor by hand", "reconstruct", "floor", 1.05),
    Aim('grid `"exact"` / no grid', "reconstruct+exact", "reconstruct", 1.1),
    Aim('grid `"exact"` / no grid, both compiled', "reconstruct+compiled+exact", "reconstruct+compiled", 1.1),
    Aim("slope of `Reconstruct`, KiB per block", "reconstruct", "", 0.0),
    Aim("inverse / forward", "inverse", "forward", 1.05),
    Aim("inverse / forward, compiled", "inverse+compiled", "forward+compiled", 1.05),
)
"""Those of the project."""


def ratio(rows: dict[str, Any], name: str, other: str) -> tuple[float, float, float] | None:
    """Of two cases in the same round, the median and its interval; ``None`` if one was not timed."""
    pairs = list(zip(*(rows.get(each, {}).get("times", []) for each in (name, other)), strict=False))
    return interval([a / b for a, b in pairs]) if pairs else None


def _told(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def reference_of(name: str, rows: dict[str, Any]) -> str:
    """What a case is compared with: the inverse with forward in its own setting, all else with the first case."""
    if name.startswith("inverse"):
        return name.replace("inverse", "forward", 1)
    return next(iter(rows))


def group_table(name: str, group: dict[str, Any]) -> str:
    """All cases of a group."""
    rows = group["cases"]
    lines = [_line(case, rows, group.get("batch", 0)) for case in rows]
    head = (
        "", "ms", "images/s", "ratio", "to compiled Store", "peak, MiB", "KiB/block", "products", "floor", "drift",
        "first step, s", "rounds",
    )  # fmt: skip
    return markdown(head, lines, title=f"{name}: ratio to {next(iter(rows), 'nothing')}, of inverses to forward")


def _line(case: str, rows: dict[str, Any], batch: int) -> list[str]:
    """A row of a table; of what did not run, why."""
    row = rows[case]
    times: Sequence[float] = row.get("times", [])
    if not times:
        return [case, row["status"], *[""] * 10]
    time = statistics.median(times)
    compiled = ratio(rows, case, "store+compiled")

    def given(key: str, text: str, unit: float = 1) -> str:
        return "" if row.get(key) is None else text.format(row[key] / unit)

    return [
        case if row["status"] in ("timed", "prepared") else f"{case} ({row['status']})",
        f"{1000 * time:.2f}",
        f"{batch / time:.1f}",
        _told(ratio(rows, case, reference_of(case, rows))),
        _told(compiled),
        given("peak", "{:.1f}", 2**20),
        given("slope", "{:.1f}", 2**10),
        given("products", "{:.2f}", time),
        given("floor", "{:.2f}", time),
        given("drift", "{:.0e}"),
        given("first", "{:.1f}"),
        str(len(times)),
    ]


def _met(aim: Aim, groups: dict[str, Any], *, judged: bool) -> Iterator[tuple[str, str]]:
    """In which groups there is a figure for an aim, and the figure."""
    missed = ", MISSED" if judged else f", {NOT_JUDGED}"
    met = "" if judged else f", {NOT_JUDGED}"
    for name, group in groups.items():
        rows = group["cases"]
        if aim.to:
            found = ratio(rows, aim.case, aim.to)
            if found is not None:
                yield name, f"{_told(found)}{met if found[0] <= aim.most else missed}"
        elif rows.get(aim.case, {}).get("slope") is not None:
            slope = round(rows[aim.case]["slope"] / 2**10, 1)
            yield name, f"{slope:.1f}{met if slope <= aim.most else missed}"


def aims_table(groups: dict[str, Any], *, judged: bool = True) -> str:
    """The aims, and what was measured of each in every group that has it; else "open".

    Unless it is ``judged``, no aim is met or missed.
    """
    lines: list[tuple[str, str, str, str]] = []
    for aim in AIMS:
        found = list(_met(aim, groups, judged=judged)) or [("", OPEN)]
        lines += [(aim.what, f"{aim.most:g}", name, figure) for name, figure in found]
    return markdown(("aim", "at most", "measured in", "measured"), lines)
