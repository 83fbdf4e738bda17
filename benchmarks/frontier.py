"""Time against memory: every strategy, six budgets, torch's checkpoint and the peers, in one picture.

    python -m benchmarks.frontier [--rounds 31] [--workloads stack irevnet_b]

Times and bytes are those of ``benchmarks.backprop``. For each contender that is not ours the table names the fastest
of ours that needs no more memory, chosen by one half of the rounds, and the ratio of their times in the other half:
above 1, ours is faster. Writes the
picture to runs/benchmarks/frontier.svg and every number to runs/benchmarks/frontier-TIME.json.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.table import Table

from benchmarks.backprop import measure, ratio
from benchmarks.contenders import BUDGETS, TITLES
from benchmarks.report import console_of, keep

OURS = ("store", "recompute", "recompute_sqrt", "reconstruct", *BUDGETS)
OTHERS = ("ckpt", "ckpt_sqrt", "memcnn", "revtorch", "revlib")
WORKLOADS = {
    "stack": "16 blocks, 48 channels per stream, 28×28, batch 16",
    "irevnet_b": "i-RevNet (b), 128×128, batch 8",
}


def rival(rows: dict[str, Any], other: str) -> str | None:
    """The fastest of ours that needs no more memory than a contender."""
    fit = [name for name in OURS if rows[name]["peak"] <= rows[other]["peak"]]
    return min(fit, key=lambda name: ratio(halves(rows, 0), name, "store")[0], default=None)


def halves(rows: dict[str, Any], which: int) -> dict[str, Any]:
    """The times in the even rounds, or in the odd ones."""
    return {name: row["times"][which::2] for name, row in rows.items()}


def table(which: str, rows: dict[str, Any]) -> Table:
    """All contenders by their memory, and who of ours is to be compared with whom."""
    result = Table("", "peak MiB", "time", "ours within these bytes", "its peak", "time / ours", title=WORKLOADS[which])
    for name in sorted(rows, key=lambda name: rows[name]["peak"]):
        row = rows[name]
        cells = [name, f"{row['peak'] / 2**20:.1f}", "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"])]
        best = rival(rows, name) if name in OTHERS else None
        if best is not None:
            versus = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(halves(rows, 1), name, best))
            cells += [best, f"{rows[best]['peak'] / 2**20:.1f}", versus]
        elif name in OTHERS:
            cells.append("none")
        result.add_row(*cells)
    return result


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel for each workload, one legend below them."""
    figure = Figure(figsize=(5.2 * len(results), 5.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (which, rows) in zip(panels, results.items(), strict=True):
        _plot(axes, [rows[name] for name in BUDGETS], "o-", "C0", "Budget, from the least possible on")
        for i, name in enumerate((*OURS[:4], *OTHERS)):
            _plot(axes, [rows[name]], "D" if name in OURS else "X", f"C{i + 1}", TITLES[name])
        axes.set(title=WORKLOADS[which], xlabel="peak, MiB", ylabel="time of a step, in ratio to Store()", xscale="log")
        axes.set_xticks([25, 50, 100, 200], ["25", "50", "100", "200"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, facecolor="white")


def _plot(axes: Axes, rows: list[dict[str, Any]], form: str, colour: str, label: str) -> None:
    """Points of time against memory, with the intervals of the times."""
    x, y = [row["peak"] / 2**20 for row in rows], [row["ratio"][0] for row in rows]
    errors = [[abs(row["ratio"][k] - row["ratio"][0]) for row in rows] for k in (1, 2)]
    axes.errorbar(x, y, yerr=errors, fmt=form, color=colour, capsize=2, markersize=6, linewidth=1, label=label)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    options = parser.parse_args()
    console = console_of(120)
    results: dict[str, Any] = {}
    for which in options.workloads:
        print(which, file=sys.stderr)
        results[which] = measure(which, [*OURS, *OTHERS], options.rounds, slope=False)
        console.print(table(which, results[which]))
        share = statistics.median(t["forward"] / t["step"] for t in results[which]["store"]["times"])
        console.print(f"the forward pass is {share:.2f} of a step of Store()", highlight=False)
    path = Path("runs/benchmarks/frontier.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(results, path)
    console.print(f"the picture is {path}", highlight=False)
    keep(console, "frontier", results=results)


if __name__ == "__main__":
    main()
