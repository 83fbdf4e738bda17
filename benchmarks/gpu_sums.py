"""Sums on a grid by themselves: eager, compiled, and by a kernel of our own, at the sizes of an i-RevNet's streams."""

from collections.abc import Callable, Generator, Sequence
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from benchmarks import triton_grid
from benchmarks.devices import clear, fault, seconds
from benchmarks.floors import Machine
from benchmarks.interleaved import interval
from benchmarks.report import markdown
from invertible._fused import FusedSum
from invertible._range import taken_down
from invertible._value import laid_out
from invertible.grid import PRESETS

__all__ = ["RULE", "sums_table", "time_sums", "verdict"]

RULE = 1.1
"""The kernel is adopted if what the compiler makes takes longer than this many times as long."""
SIZES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**26)
"""Elements. A stream of an i-RevNet (b) at 224 pixels has 75,264 for each image, so that 64 images have 2^22.2."""
DIRECTIONS = ("forward", "backward")
WAYS = ("eager", "compiled", "triton")
CHANNELS = 64
NEEDS = "Triton needs a GPU"


def time_sums(
    device: torch.device, machine: Machine, *, rounds: int, tiny: bool = False, skip: int = 0
) -> Generator[dict[str, Any]]:
    """Times forward sums with their range, and the gradient of what is added, by all who can; they take turns.

    Args:
        device: to run on.
        machine: its bandwidth.
        rounds: how often each has its turn.
        tiny: small tensors, and nothing compiled in earnest.
        skip: so many rows, which are known.

    Yields:
        For each grid, dtype of the addend, size and direction a row: ``times`` of each way or what was raised, and
        ``floor``, the time of a copy of as many bytes as must be read and written.
    """
    kernels = {"compiled": FusedSum({"backend": "eager"} if tiny else {}), "triton": triton_grid.TritonSum()}
    settings = product(PRESETS, (torch.float32, torch.bfloat16), (2**13,) if tiny else SIZES, DIRECTIONS)
    for name, dtype, size, direction in islice(settings, skip, None):
        yield _timed(name, dtype, size, direction, kernels, machine, device, rounds)
        clear(device)


def _timed(
    name: str,
    dtype: torch.dtype,
    size: int,
    direction: str,
    kernels: dict[str, FusedSum],
    machine: Machine,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """One direction of one setting."""
    grid, shape = PRESETS[name], (size // (64 * CHANNELS), CHANNELS, 8, 8)
    x = grid.round(torch.randn(shape, device=device))
    shift, grad = torch.randn(shape, device=device).to(dtype), torch.randn_like(x)

    def forward(way: str) -> Tensor:
        if way == "eager":
            return grid.add(x, shift)
        if not kernels[way].serves(x, shift):
            raise NotImplementedError(NEEDS)
        return kernels[way](grid, x, shift, 1)

    def backward(way: str) -> Tensor:
        if way == "eager":
            return laid_out(-grad, dtype=dtype, channels_last=False)
        if not triton_grid.ready_for(grad):
            raise NotImplementedError(NEEDS)
        return triton_grid.gradient(grad, shift, -1)

    own, added = x.element_size(), shift.element_size()
    run, ways, width = {
        "forward": (forward, WAYS, 2 * own + added),
        "backward": (backward, ("eager", "triton"), own + added),
    }[direction]
    return {
        "grid": name,
        "dtype": str(dtype).removeprefix("torch."),
        "size": size,
        "direction": direction,
        "floor": size * width / machine.bandwidth_of(size * width),
        "times": _turns(ways, run, device, rounds),
    }


def _turns(
    ways: Sequence[str], run: Callable[[str], Tensor], device: torch.device, rounds: int
) -> dict[str, list[float] | str]:
    """Each once per round, after a first call that may compile; what is raised is the answer."""
    times: dict[str, list[float]] = {}
    faults: dict[str, str] = {}
    with torch.no_grad(), taken_down():  # as in a run whose range is checked
        for way in ways:
            try:
                run(way)
                times[way] = []
            except Exception as error:  # noqa: BLE001
                faults[way] = fault(error)
    able = list(times)
    for i in range(rounds):
        for way in able[i % len(able) :] + able[: i % len(able)]:
            with torch.no_grad(), taken_down():
                times[way].append(seconds(lambda way=way: run(way), device))
    return {**times, **faults}


def ratio(row: dict[str, Any], way: str, other: str) -> tuple[float, float, float] | None:
    """Of two in the same round, the median and its interval."""
    pair = [row["times"].get(each) for each in (way, other)]
    if not all(isinstance(each, list) and each for each in pair):
        return None
    return interval([a / b for a, b in zip(*pair, strict=True)])


def verdict(rows: list[dict[str, Any]], *, judged: bool = True) -> str:
    """Whether the kernel is to be adopted, by the rule."""
    rule = f"rule: adopt the kernel if compile is more than {100 * (RULE - 1):.0f} % slower"
    found = [ratio(row, "compiled", "triton") for row in rows if row["direction"] == "forward"]
    known = [each for each in found if each is not None]
    if not known or not judged:
        return f"{rule}: not judged"
    slower = sum(low > RULE for _, low, _ in known)
    return f"{rule}: it is in {slower} of {len(known)} settings, " + ("so adopt it there" if slower else "so don't")


def sums_table(rows: list[dict[str, Any]], *, judged: bool = True) -> str:
    """Times, shares of the floor and the rule."""
    lines = [_line(row) for row in rows]
    head = ("sum", "addend", "elements", "", *(f"{way}, µs" for way in WAYS), "compiled / Triton", "floor", "best")
    title = "sums on a grid; floor: a copy of as many bytes, best: its share of the fastest's time"
    return f"{markdown(head, lines, title=title)}\n\n{verdict(rows, judged=judged)}"


def _line(row: dict[str, Any]) -> list[str]:
    medians = {way: _median(row, way) for way in WAYS}
    known = [m for m in medians.values() if m is not None]
    compared = ratio(row, "compiled", "triton")
    return [
        row["grid"],
        row["dtype"],
        str(row["size"]),
        row["direction"],
        *(_told(row, way, m) for way, m in medians.items()),
        "" if compared is None else "{:.2f} [{:.2f}, {:.2f}]".format(*compared),
        f"{1e6 * row['floor']:.1f}",
        f"{row['floor'] / min(known):.2f}" if known else "",
    ]


def _median(row: dict[str, Any], way: str) -> float | None:
    times = row["times"].get(way)
    return interval(times)[0] if isinstance(times, list) and times else None


def _told(row: dict[str, Any], way: str, median: float | None) -> str:
    return row["times"].get(way, "").rpartition(": ")[2] if median is None else f"{1e6 * median:.1f}"
