"""The largest that a GPU's memory holds, by strategy: batches and pixels of i-RevNets, and blocks of a stack.

    python -m benchmarks.fits [--gigabytes 80] [--only batch_b batch_a pixels_b blocks]

Nothing is run: ``measure_memory`` counts a step on the meta device, in float32, by plain SGD with momentum. What it
counts are all bytes of tensors at the worst moment: weights, their gradients and moments, statistics, the input and
what forward and backward keep and make. That is exact for tensors; what the allocator's rounding and fragments, cuDNN's
workspaces and CUDA itself take is in no count, so that on a GPU somewhat less fits. Autocast, which keeps about half of
what is inside functions, is not counted either: tensors without data know nothing of it.

Of ``budget`` it is the least plan that counts: with fewer images it keeps what the rest leaves room for.
Blocks are counted at two depths and at a third, which must be on the line through them, and the rest is that line.
Prints a table and writes every number to runs/benchmarks/fits-TIME.json.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from benchmarks.contenders import bottleneck, stack
from benchmarks.report import console_of, keep, markdown
from invertible import Recompute, Reconstruct, Store
from invertible.backprop import Strategy
from invertible.testing import measure_memory

__all__ = ["QUESTIONS", "STRATEGIES", "bytes_of_step", "largest", "line", "weights_of"]

STRATEGIES: dict[str, Strategy | None] = {
    "store": Store(),
    "recompute": Recompute(),
    "reconstruct": Reconstruct(),
    "budget": None,
}
"""By name; ``None`` is a budget of what the memory leaves."""
Made = tuple[nn.Module, Tensor]
STEP = 32
"""Pixels by which the side of an image grows, from twice as many on: one value for each channel is none to a norm."""


def network(name: str, batch: int, side: int) -> Made:
    """A model of the zoo and its images, on the meta device."""
    with torch.device("meta"):
        return zoo.create(name), torch.rand(batch, 3, side, side)


def tower(depth: int) -> Made:
    """A stack of i-RevNet's bottlenecks, 48 channels in each stream, and 64 images of 28x28 pixels."""
    with torch.device("meta"):
        return stack("store", [bottleneck(48) for _ in range(depth)]), torch.rand(64, 96, 28, 28)


QUESTIONS: dict[str, tuple[str, Callable[[int], Made], int]] = {
    "batch_b": ("i-RevNet (b), images of 224×224", lambda n: network("irevnet_b", n, 224), 1),
    "batch_a": ("i-RevNet (a), images of 224×224", lambda n: network("irevnet_a", n, 224), 1),
    "pixels_b": ("i-RevNet (b), one image, pixels per side", lambda n: network("irevnet_b", 1, STEP * (n + 1)), 2),
    "blocks": ("stack of 48 channels per stream, 64 images of 28×28, blocks", tower, 1),
}
"""What is asked, how to make a size of it, and by which power of that its bytes grow."""


def weights_of(net: nn.Module, x: Tensor) -> int:
    """Bytes that are there whatever is kept: the input, statistics, parameters, their gradients and momentum."""
    sizes = {id(t): t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers())}
    return sum(sizes.values()) + 2 * sum(sizes[id(p)] for p in net.parameters()) + x.numel() * x.element_size()


def bytes_of_step(made: Made, strategy: Strategy | None) -> int:
    """The most bytes at any time of a step; of a budget, those of the least plan there is."""
    net: Any = made[0]
    net.backprop = strategy or Reconstruct()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    used = weights_of(*made) + _peak(*made)
    if strategy is not None:
        return used
    plan = net.plan(made[1])
    return used - plan.peak + plan.least  # what the head and the loss take is no part of a plan


def _peak(net: nn.Module, x: Tensor) -> int:
    return measure_memory(lambda: net(x).square().mean().backward(), "meta")[1].peak


def largest(count: Callable[[int], int], memory: int, *, power: int = 1) -> tuple[int, int]:
    """The largest whole number whose bytes are within the memory, if they grow about as this power; and its bytes."""
    known = {n: count(n) for n in (1, 2)}
    if known[1] > memory:
        return 0, known[1]
    fits, beyond = max(n for n in known if known[n] <= memory), 2 if known[2] > memory else None
    while beyond is None or beyond > fits + 1:
        near = min((n for n in known if n > 1), key=lambda n: abs(known[n] - memory))
        slope = (known[near] - known[1]) / (near**power - 1)  # of the line from 1 to the nearest so far
        guess = max(fits + 1, math.floor(((memory - known[1]) / slope + 1) ** (1 / power)))
        if beyond is not None:
            guess = min(guess, beyond - 1)
        known[guess] = count(guess)
        if known[guess] <= memory:
            fits = guess
        else:
            beyond = guess
    return fits, known[fits]


def line(count: Callable[[int], int], memory: int, *, at: tuple[int, int, int] = (50, 100, 400)) -> tuple[int, int]:
    """The same for bytes that grow linearly, from two numbers; a third must be on the line, or the answer is none."""
    few, more, check = at
    first = count(few)
    slope = (count(more) - first) // (more - few)
    if abs(count(check) - first - slope * (check - few)) > slope:
        raise ArithmeticError(f"{check} blocks are not on the line through {few} and {more}")
    found = few + (memory - first) // slope
    return found, first + slope * (found - few)


def answer(question: str, strategy: str, memory: int) -> tuple[int, int]:
    """The largest, in the question's unit, and its bytes."""
    _, make, power = QUESTIONS[question]

    def count(n: int) -> int:
        return bytes_of_step(make(n), STRATEGIES[strategy])

    if question == "blocks":
        return line(count, memory)
    found, used = largest(count, memory, power=power)
    return (STEP * (found + 1) if question.startswith("pixels") else found), used


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=80, help="of memory, each 10^9 bytes")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), metavar="QUESTION")
    options = parser.parse_args()
    memory = round(options.gigabytes * 10**9)
    console = console_of(120)
    found: dict[str, dict[str, tuple[int, int] | None]] = {}
    for question in options.only:
        found[question] = {}
        for strategy in STRATEGIES:
            if question == "blocks" and strategy == "budget":
                found[question][strategy] = None  # whose bytes are no line
                continue
            found[question][strategy] = answer(question, strategy, memory)
            console.print(question, strategy, found[question][strategy], highlight=False)
    rows = [
        (QUESTIONS[question][0], *("" if each is None else f"{each[0]:,}" for each in answers.values()))
        for question, answers in found.items()
    ]
    console.print(markdown(("", *STRATEGIES), rows), highlight=False, soft_wrap=True)
    keep(console, "fits", found=found, memory=memory)


if __name__ == "__main__":
    main()
