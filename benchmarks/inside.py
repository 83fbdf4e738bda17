"""What an optimiser inside the backward pass saves: bytes of a step, with its steps after the backward pass and in it.

    python -m benchmarks.inside [--batches 8 64]

An i-RevNet (a), images of 224 pixels, SGD with momentum, in float32. Nothing is run: ``measure_memory`` counts the
tensors of a step on the meta device, above weights, momentum and the input. Prints a table, in MiB.
"""

import argparse

import torch

import zoo
from benchmarks.report import markdown
from invertible import Reconstruct, Store
from invertible.backprop import StepInBackward, Strategy
from invertible.testing import measure_memory

__all__ = ["bytes_of_step"]


def bytes_of_step(model: str, batch: int, side: int, strategy: Strategy, *, inside: bool) -> int:
    """The most bytes at any time of a step, the second one."""
    with torch.device("meta"):
        net, x = zoo.create(model), torch.rand(batch, 3, side, side)
    net.backprop = strategy  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    if inside:
        StepInBackward(optimizer)

    def step() -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return measure_memory(step, "meta")[1].peak


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    options = parser.parse_args()
    ways = [(batch, inside) for batch in options.batches for inside in (False, True)]
    head = ("", *(f"batch {batch}: {'inside' if inside else 'usual'}" for batch, inside in ways))
    rows = [
        (
            f"`{type(strategy).__name__}()`",
            *(
                f"{bytes_of_step('irevnet_a', batch, 224, strategy, inside=inside) / 2**20:.0f}"
                for batch, inside in ways
            ),
        )
        for strategy in (Store(), Reconstruct())
    ]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
