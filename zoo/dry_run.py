"""What a run would be, without running it: counted on tensors without data."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from invertible.backprop import Strategy
from zoo.building import build
from zoo.irevnet import IRevNet
from zoo.run import BACKPROP, GRIDS, Run

__all__ = ["Cost", "Size", "costs", "flops_of", "size_of"]


@dataclass(frozen=True)
class Size:
    """A network and a step, in numbers."""

    parameters: int
    flops: int
    """Floating-point operations of one image's forward pass, in matrix products and convolutions; a multiplication and
    an addition are two."""
    held: int
    """Bytes of parameters, gradients, momentum and, if there is one, the average of the weights."""


@dataclass(frozen=True)
class Cost:
    """What a strategy keeps."""

    per_image: int
    """Bytes of activations for each image of a batch."""
    fixed: int
    """Bytes besides, whatever the batch."""

    def largest(self, available: int) -> int:
        """The largest batch that fits."""
        return max((available - self.fixed) // max(self.per_image, 1), 0)


def size_of(run: Run, num_classes: int) -> Size:
    """Counts the recipe's network, at the recipe's size of images."""
    size = run.recipe.size
    with torch.device("meta"):
        net = build(run.recipe, num_classes=num_classes).eval()
    parameters = sum(p.numel() for p in net.parameters())
    copies = 3 + (run.recipe.ema_decay is not None)
    return Size(parameters, flops_of(net, size), 4 * copies * parameters)


@torch.no_grad()
def flops_of(net: nn.Module, size: int) -> int:
    """Floating-point operations of the forward pass of one image, see :attr:`Size.flops`.

    Args:
        net: in ``eval`` mode, on the device ``"meta"``.
        size: of the image, in pixels.

    Example:
        >>> import zoo
        >>> with torch.device("meta"):
        ...     net = zoo.create("irevnet_small").eval()
        >>> flops_of(net, 32)
        6180864
    """
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def costs(run: Run, num_classes: int) -> Iterator[tuple[str, Cost]]:
    """What each strategy keeps, by name: the plan of :meth:`invertible.Sequential.plan` for two sizes of batch.

    Nothing for networks that are more than one chain, or none: what is outside of chains has no plan.
    """
    with torch.device("meta"):
        net = build(run.recipe, num_classes=num_classes)
    if not isinstance(net, IRevNet):
        return
    net = net.to_empty(device="cpu")  # never touched, so that it takes no memory; autocast knows no meta device
    net.grid = GRIDS[run.recipe.grid]
    strategies: dict[str, Strategy] = dict(BACKPROP)
    if run.budget is not None:
        strategies[f"budget of {run.budget / 2**30:.1f} GiB"] = run.strategy
    for name, strategy in strategies.items():
        net.backprop = strategy
        peaks = [_peak(net, run, images) for images in (2, 4)]
        per_image = (peaks[1] - peaks[0]) // 2
        yield name, Cost(per_image, peaks[0] - 2 * per_image)


def _peak(net: IRevNet, run: Run, images: int) -> int:
    size = run.recipe.size
    enabled = run.recipe.autocast == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return net.body.plan(torch.empty(images, 3, size, size, device="meta")).peak
