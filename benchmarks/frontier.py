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

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.table import Table

from benchmarks.backprop import measure, ratio
from benchmarks.contenders import BUDGETS
from benchmarks.report import console_of, keep

OURS = ("store", "recompute", "recompute_sqrt", "reconstruct", *BUDGETS)
OTHERS = ("ckpt", "ckpt_sqrt", "memcnn", "revtorch", "revlib")
TITLES = {"stack": "16 blocks, 48 channels per stream, 28x28, batch 16", "irevnet_b": "i-RevNet (b), 128x128, batch 8"}


def rival(rows: dict[str, Any], other: str) -> str | None:
    """The fastest of ours that needs no more memory than a contender."""
    fit = [name for name in OURS if rows[name]["peak"] <= rows[other]["peak"]]
    return min(fit, key=lambda name: ratio(halves(rows, 0), name, "store")[0], default=None)


def halves(rows: dict[str, Any], which: int) -> dict[str, Any]:
    """The times in the even rounds, or in the odd ones."""
    return {name: row["times"][which::2] for name, row in rows.items()}


def table(which: str, rows: dict[str, Any]) -> Table:
    """All contenders by their memory, and who of ours is to be compared with whom."""
    result = Table("", "peak MiB", "time", "ours within these bytes", "its peak", "time / ours", title=TITLES[which])
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
    """One panel for each workload."""
    figure = Figure(figsize=(5.2 * len(results), 4.2), layout="constrained")
    for i, (which, rows) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), i + 1)
        groups = {"budgets": BUDGETS, "strategies": OURS[:4], "others": OTHERS}
        for (label, names), marker in zip(groups.items(), ("o", "D", "x"), strict=True):
            here = [rows[name] for name in names if name in rows]
            x, y = [row["peak"] / 2**20 for row in here], [row["ratio"][0] for row in here]
            low, high = ([abs(row["ratio"][k] - row["ratio"][0]) for row in here] for k in (1, 2))
            line = "-" if label == "budgets" else ""
            axes.errorbar(x, y, yerr=(low, high), fmt=marker + line, capsize=2, markersize=5, label=label)
            if label != "budgets":
                for name, left, up in zip((n for n in names if n in rows), x, y, strict=True):
                    place = (5, 4) if label == "strategies" else (5, -10)  # or they would cover each other
                    axes.annotate(name, (left, up), xytext=place, textcoords="offset points", fontsize=7)
        axes.set(title=TITLES[which], xlabel="peak, MiB", ylabel="time of a step, in ratio to Store()", xscale="log")
        axes.set_xticks([25, 50, 100, 200], ["25", "50", "100", "200"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--workloads", nargs="+", default=list(TITLES), choices=list(TITLES))
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
