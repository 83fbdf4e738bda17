"""How long it takes to import the library and to build a network.

    python -m benchmarks.startup [--starts 31]

Each figure is CPU time on one thread, the median over fresh processes with its 95 % bootstrap interval. The import is
that of ``invertible`` after torch, from compiled bytecode, as ``pip`` installs it. "Layers alone" builds the network's
convolutions, norms and ReLUs, and nothing around them. Prints a table and writes every number to
runs/benchmarks/startup-TIME.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from rich.table import Table
from torch import nn

from benchmarks.interleaved import interval
from benchmarks.report import console_of, keep

FIGURES = {
    "import": "import invertible, after torch",
    "build": "build i-RevNet (b)",
    "build_meta": "the same on the meta device",
    "layers_meta": "its layers alone on the meta device",
}


def start() -> None:
    """Measures once, in this fresh process."""
    torch.set_num_threads(1)
    found = {"import": _seconds(lambda: __import__("invertible"))}
    import zoo

    found["build"] = _seconds(zoo.irevnet_b)
    found["build_meta"] = _seconds(zoo.irevnet_b, on_meta=True)
    parts = list(zoo.irevnet_b().modules())
    found["layers_meta"] = _seconds(lambda: [_again(part) for part in parts], on_meta=True)
    print(json.dumps(found))


def _again(part: nn.Module) -> nn.Module | None:
    """Builds one of torch's modules as it was built."""
    if isinstance(part, nn.Conv2d):
        size = part.kernel_size[0]
        return nn.Conv2d(part.in_channels, part.out_channels, size, part.stride[0], padding=size // 2, bias=False)
    if isinstance(part, nn.BatchNorm2d):
        return nn.BatchNorm2d(part.num_features)
    return nn.ReLU() if isinstance(part, nn.ReLU) else None


def _seconds(function: Callable[[], object], *, on_meta: bool = False) -> float:
    with torch.device("meta") if on_meta else nullcontext():
        before = time.process_time()
        function()
        return time.process_time() - before


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=31)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start()
        return
    compiled = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for i in range(options.starts + 1):
        answer = subprocess.run(
            [sys.executable, "-m", "benchmarks.startup", "--start"], env=compiled, check=True, stdout=subprocess.PIPE
        )
        for name, seconds in json.loads(answer.stdout).items():
            if i:  # the first start writes the bytecode
                found[name].append(seconds)
        print(f"\r  start {i} of {options.starts}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    console = console_of(80)
    table = Table("", "ms", "95 % interval")
    for name, title in FIGURES.items():
        middle, low, high = (1000 * value for value in interval(found[name]))
        table.add_row(title, f"{middle:.0f}", f"[{low:.0f}, {high:.0f}]")
    console.print(table)
    keep(console, "startup", results=found)


if __name__ == "__main__":
    main()
