"""Trains a 3-D network that does not fit into memory with stored activations, and does without.

Volumes of 48 x 48 x 48 voxels hold bright balls in noise, and bright rods that are not to be found; the network marks
the balls voxel by voxel. It is a chain of 32 reversible blocks at half resolution. The process may take 96 MiB more
than it has after start-up: with --backprop store the system refuses the memory, with reconstruct (the default)
training goes on to its end.

    python examples/volume_segmentation.py
    python examples/volume_segmentation.py --backprop store     # ends with: does not fit
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from invertible import Coupling, Inverse, Merge, PadSplit, PixelUnshuffle, Sequential
from zoo.run import BACKPROP

NO_MEMORY = ("can't allocate memory", "bad_alloc", "could not create a primitive")  # torch's, C++'s, oneDNN's words
SIZE = 48
CHANNELS = 16


def volumes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with two balls and two rods each, and where the balls are."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    images = 0.5 * torch.randn(count, 1, SIZE, SIZE, SIZE, generator=generator)
    masks = torch.zeros_like(images)
    for image, mask in zip(images, masks, strict=True):
        for is_ball in (True, True, False, False):
            centre = 8 + (SIZE - 16) * torch.rand(3, 1, 1, 1, generator=generator)
            radius = 4 + 4 * torch.rand(1, generator=generator)
            offset = grid - centre
            if not is_ball:  # a rod is a ball drawn out along one axis
                offset[int(torch.randint(3, (1,), generator=generator))] /= 4
                radius = radius / 2
            inside = offset.square().sum(0) < radius.square()
            image[0][inside] += 1
            mask[0][inside] = float(is_ball)
    return images, masks


class Segmenter(nn.Module):
    """A reversible body at half resolution, and a head that gives a logit per voxel."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.body = Sequential(
            PixelUnshuffle((2, 2, 2)),
            PadSplit(8, 2 * CHANNELS),
            *(Coupling(self._function()) for _ in range(blocks)),
            Merge(),
        )
        self.head = nn.Conv3d(2 * CHANNELS, 8, 1)
        self.up = Inverse(PixelUnshuffle((2, 2, 2)))

    def _function(self) -> nn.Module:
        conv = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        return nn.Sequential(nn.BatchNorm3d(CHANNELS), nn.SiLU(), conv)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of the input's shape."""
        return self.up(self.head(self.body(x)))


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross entropy, and one minus the Dice coefficient."""
    return binary_cross_entropy_with_logits(logits, masks) + 1 - dice(logits.sigmoid(), masks)


def dice(found: Tensor, masks: Tensor) -> Tensor:
    """The share of voxels that found and true balls have in common."""
    return 2 * (found * masks).sum() / (found.sum() + masks.sum()).clamp_min(1)


def limit_memory(mebibytes: int) -> bool:
    """Lets the process take so much more than it has now. The system refuses the rest; only Linux can."""
    status = Path("/proc/self/status")
    if not status.exists():
        return False
    import resource  # not on every system

    data = next(line for line in status.read_text().splitlines() if line.startswith("VmData:"))
    most = int(data.split()[1]) * 2**10 + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return True


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backprop", choices=list(BACKPROP), default="reconstruct", help="what is kept for the gradients")
    p.add_argument("--limit", type=int, default=96, metavar="MIB", help="memory for training (default: 96)")
    p.add_argument("--blocks", type=int, default=32, metavar="N", help="depth of the body (default: 32)")
    p.add_argument("--steps", type=int, default=20, metavar="N", help="training steps of two volumes (default: 20)")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, or 1 if the network does not fit."""
    options = parser().parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    net = Segmenter(options.blocks)
    net.body.backprop = BACKPROP[options.backprop]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    Segmenter(1)(volumes(2, generator)[0]).sum().backward()  # starts torch's threads, which take memory of their own
    limited = limit_memory(options.limit)
    print(f"{options.blocks} blocks, {options.backprop}, " + (f"{options.limit} MiB" if limited else "no limit here"))
    try:
        for step in range(options.steps):
            images, masks = volumes(2, generator)
            logits = net(images)
            loss = loss_of(logits, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            score = dice((logits > 0).float(), masks).item()
            drift = "" if net.body.drift is None else f"  drift {net.body.drift:.0e}"
            print(f"step {step + 1:3}/{options.steps}  loss {loss.item():.3f}  Dice {score:.2f}{drift}", flush=True)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        needs = f"{options.blocks} blocks with --backprop {options.backprop} need more than {options.limit} MiB"
        print(f"error: does not fit: {needs}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
