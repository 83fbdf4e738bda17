"""How far a training step is from what the machine can do: a roofline for every layer, and for every strategy.

    python -m benchmarks.limit [--rounds 31] [--workloads stack large irevnet_b]

An operation takes at least its floating-point operations over the machine's peak rate, or the bytes of its arguments
and results over the machine's bandwidth, whichever is longer; the sum over all operations that torch runs is the
roofline. Rate and bandwidth are the best of all rounds, of a matrix product, and of sums of two vectors as large as
the operation's tensors are together or larger: caches make short ones faster. They and all contenders are measured in
turn, each in a process of its own on one thread. "Share" is the roofline over the median CPU time; its 95 % interval
is that of the time, by bootstrap. "Floor" and "hand" of ``benchmarks.contenders`` are written by hand for the stacks.
"Tiny images" is the CPU time of the same stack where there is next to nothing to compute. Prints tables and writes
every number to runs/benchmarks/limit-TIME.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.contenders import STACKS, workload
from benchmarks.floors import Machine, Operation, counted, floor
from benchmarks.interleaved import Contender, interval, rounds, serve
from benchmarks.report import console_of, keep
from invertible import Coupling, InvertibleModule, Sequential

STRATEGIES = ("store", "recompute", "reconstruct")
BY_HAND = ("hand", "floor")
VECTORS = tuple(2**power for power in range(12, 25, 2))
"""Numbers of elements."""
DEPTH = 16
WORKLOADS = (*STACKS, "irevnet_b")
TINY = 2
"""Images, and pixels per side, that are next to nothing for a stack; in i-RevNet (b) the weights alone are work."""


def trained(layer: Callable[[Any], Any], value: Any) -> None:
    """A layer's forward and backward pass."""
    tensors = [t for t in tree_leaves(layer(value)) if t.requires_grad]
    torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])


def kinds(net: nn.Module, x: Tensor) -> Iterator[tuple[str, int, InvertibleModule[Any, Any], Any]]:
    """Layers that do not look like the one before: a name, how many alike follow, the layer, and its input."""
    body: Sequential = cast("Any", net).body if hasattr(net, "body") else cast("Sequential", net)
    with torch.no_grad():
        values = [x.detach(), *(value for _, value in body.trace(x.detach()))]
    groups: list[list[Any]] = []
    for layer, value in zip(body, values, strict=False):
        look = (repr(layer), [t.shape for t in tree_leaves(value)])
        if groups and groups[-1][0] == look:
            groups[-1][1] += 1
        else:
            groups.append([look, 1, layer, value])
    for _, count, layer, value in groups:
        if isinstance(layer, Coupling):
            stream: Tensor = value[1]
            shape = "x".join(map(str, stream.shape[1:]))
            yield f"{shape}{'' if layer.downsample is None else ', down'}", count, layer, value


def serve_layers(which: str) -> None:
    """Trains layers one by one when asked."""
    torch.set_num_threads(1)
    net, x = workload(which, "store", DEPTH)
    found: list[tuple[str, int, Any, Any]] = []
    for name, count, layer, value in kinds(net, x):
        found.append((name, count, layer, tuple(t.detach().clone().requires_grad_() for t in value)))

    def step() -> list[float]:
        times: list[float] = []
        for _, _, layer, value in found:
            layer.zero_grad()
            start = time.process_time()
            trained(layer, value)
            times.append(time.process_time() - start)
        return times

    def about() -> list[Any]:
        return [(name, count, counted(lambda: trained(layer, value))) for name, count, layer, value in found]  # noqa: B023

    serve({"step": step, "about": about})


def serve_strategy(which: str, name: str) -> None:
    """Runs steps by one strategy when asked."""
    torch.set_num_threads(1)
    net, x = workload(which, name, DEPTH)
    x.requires_grad_()
    inputs = {"step": x}
    if which in STACKS:
        inputs["tiny"] = torch.rand(TINY, x.shape[1], TINY, TINY, requires_grad=True)

    def run(x: Tensor) -> None:
        net(x).square().mean().backward()

    def step() -> dict[str, float]:
        found: dict[str, float] = {}
        for key, given in inputs.items():
            net.zero_grad()
            start = time.process_time()
            run(given)
            found[key] = time.process_time() - start
        return found

    serve({"step": step, "about": lambda: counted(lambda: run(x))})


def serve_machine() -> None:
    """Finds what one thread can do, when asked."""
    torch.set_num_threads(1)
    a, b, c = (torch.rand(1024, 1024) for _ in range(3))
    vectors = [(torch.rand(count), torch.rand(count), torch.empty(count)) for count in VECTORS]

    def step() -> dict[str, Any]:
        start = time.perf_counter()  # the clock of CPU time is too coarse for these
        torch.mm(a, b, out=c)
        rate = 2 * 1024**3 / (time.perf_counter() - start)
        bandwidth: list[float] = []
        for one, other, result in vectors:
            repeats = max(1, 2**18 // len(one))
            torch.add(one, other, out=result)
            start = time.perf_counter()
            for _ in range(repeats):
                torch.add(one, other, out=result)
            bandwidth.append(3 * 4 * len(one) * repeats / (time.perf_counter() - start))
        return {"rate": rate, "bandwidth": bandwidth}

    serve({"step": step})


def measure(which: str, count: int) -> dict[str, Any]:
    """All numbers of one workload."""
    names = (*STRATEGIES, *(BY_HAND if which in STACKS else ()), "layers", "machine")
    contenders = {name: Contender("benchmarks.limit", "--serve", which, name) for name in names}
    try:
        about = {name: each.ask("about") for name, each in contenders.items() if name != "machine"}
        times = rounds(contenders, "step", count)
    finally:
        for each in contenders.values():
            each.close()
    machine = times.pop("machine")
    rate = max(t["rate"] for t in machine)
    bandwidth = [max(t["bandwidth"][i] for t in machine) for i in range(len(VECTORS))]
    limits = Machine({"float32": rate}, [(12 * n, each) for n, each in zip(VECTORS, bandwidth, strict=True)])
    layers = times.pop("layers")
    found: dict[str, Any] = {"rate": rate, "bandwidth": bandwidth, "layers": [], "strategies": {}}
    for i, (name, number, operations) in enumerate(about.pop("layers")):
        row = roofline(operations, limits, [t[i] for t in layers])
        found["layers"].append({"name": name, "number": number, **row})
    for name, operations in about.items():
        row = roofline(operations, limits, [t["step"] for t in times[name]])
        tiny = [t["tiny"] for t in times[name] if "tiny" in t]
        others = times["floor" if "floor" in times else "store"]
        versus = interval([t["step"] / other["step"] for t, other in zip(times[name], others, strict=True)])
        found["strategies"][name] = {**row, "tiny": tiny, "versus": versus}
    return found


def roofline(found: list[list[Any]], machine: Machine, times: list[float]) -> dict[str, Any]:
    """What a row of a table says."""
    operations = [Operation(*each) for each in found]
    least = floor(operations, machine)
    middle, low, high = interval(times)
    return {
        "flops": sum(op.flops for op in operations),
        "bytes": sum(op.bytes for op in operations),
        "floor": least,
        "time": middle,
        "share": (least / middle, least / high, least / low),
        "times": times,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """What both tables have."""
    share = "{:.2f} [{:.2f}, {:.2f}]".format(*row["share"])
    sizes = (row["flops"] / 1e9, row["bytes"] / 2**20, 1000 * row["floor"], 1000 * row["time"])
    return [*(f"{size:.{1 if size < 100 else 0}f}" for size in sizes), share]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        which, name = options.serve
        if name == "machine":
            serve_machine()
        elif name == "layers":
            serve_layers(which)
        else:
            serve_strategy(which, name)
        return
    console = console_of(130)
    results: dict[str, Any] = {}
    for which in options.workloads:
        print(which, file=sys.stderr)
        found = results[which] = measure(which, options.rounds)
        head = ("GFLOP", "MiB", "roofline, ms", "time, ms", "share")
        fast, slow = max(found["bandwidth"]) / 1e9, found["bandwidth"][-1] / 1e9
        machine = f"{found['rate'] / 1e9:.0f} GFLOP/s, {fast:.0f} GB/s in caches, {slow:.0f} GB/s in memory"
        table = Table("stream of a coupling", "layers", *head, title=f"{which}, each layer alone, Store(): {machine}")
        for row in found["layers"]:
            table.add_row(row["name"], str(row["number"]), *cells(row))
        console.print(table)
        other = "floor" if "floor" in found["strategies"] else "store"
        table = Table("", *head, f"time / {other}", "tiny images, ms", title=f"{which}, a whole step")
        for name, row in found["strategies"].items():
            versus = "{:.2f} [{:.2f}, {:.2f}]".format(*row["versus"])
            tiny = f"{1000 * statistics.median(row['tiny']):.0f}" if row["tiny"] else ""
            table.add_row(name, *cells(row), versus, tiny)
        console.print(table)
    keep(console, "limit", results=results)


if __name__ == "__main__":
    main()
