"""What a run would be, without running it: counted on tensors without data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from invertible import Flow
from invertible.backprop import Strategy
from invertible.testing import measure_memory
from zoo.building import build
from zoo.irevnet import IRevNet
from zoo.network import ReversibleNetwork
from zoo.run import BACKPROP, GRIDS, Run

__all__ = ["Cost", "Size", "cost_of", "costs", "flops_of", "size_of"]


@dataclass(frozen=True)
class Size:
    """A network and a step, in numbers.

    Example:
        >>> Size(parameters=1000, flops=50_000, held=12_000).held
        12000
    """

    parameters: int
    flops: int
    """Floating-point operations of one image's forward pass, in matrix products and convolutions; a multiplication and
    an addition are two."""
    held: int
    """Bytes of parameters, gradients, momentum and, if there is one, the average of the weights."""


@dataclass(frozen=True)
class Cost:
    """What a strategy keeps.

    Example:
        >>> Cost(per_image=1000, fixed=5000).largest(2**20)
        1043
    """

    per_image: int
    """Bytes of activations for each image of a batch."""
    fixed: int
    """Bytes besides, whatever the batch."""

    def largest(self, available: int) -> int:
        """The largest batch that fits."""
        return max((available - self.fixed) // max(self.per_image, 1), 0)


def size_of(run: Run, num_classes: int) -> Size:
    """Counts the recipe's network, at the recipe's size of images.

    Raises:
        InputError: if there is no such network, or the size does not fit it.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> size_of(Run(RECIPES["digits"]), num_classes=10)
        Size(parameters=484738, flops=4660224, held=5816856)
    """
    size = run.recipe.size
    with torch.device("meta"):
        net = build(run.recipe, num_classes=num_classes).eval()
    parameters = sum(p.numel() for p in net.parameters())
    copies = 3 + (run.recipe.ema_decay is not None)
    return Size(parameters, flops_of(net, size), 4 * copies * parameters)


@torch.no_grad()
def flops_of(net: nn.Module, size: int | tuple[int, ...]) -> int:
    """Floating-point operations of the forward pass of one image, see :attr:`Size.flops`; of a flow, of a log-density.

    Args:
        net: in ``eval`` mode, on the device ``"meta"``.
        size: of the image, in pixels, in each dimension; of a flow the shape of a datum.

    Example:
        >>> import zoo
        >>> with torch.device("meta"):
        ...     net = zoo.create("irevnet_small").eval()
        >>> flops_of(net, 32)
        6180864
    """
    with FlopCounterMode(display=False) as counter:
        _output(net, _images(net, 1, size))
    return counter.get_total_flops()


def costs(run: Run, num_classes: int) -> Iterator[tuple[str, Cost]]:
    """What each strategy keeps, by name: counted for two sizes of batch.

    Of i-RevNets it is the plan of their body, see :meth:`invertible.Sequential.plan`, and of all others
    :func:`cost_of`: nothing under autocast, which tensors without data know nothing of. A network without chains of
    invertible layers stores everything.

    Example:
        >>> import dataclasses
        >>> from zoo.recipes import RECIPES
        >>> run = Run(dataclasses.replace(RECIPES["digits"], model="resnet_small", size=16))
        >>> [(name, cost.per_image > 100_000) for name, cost in costs(run, num_classes=10)]
        [('store', True)]
    """
    with torch.device("meta"):
        net = build(run.recipe, num_classes=num_classes)
    planned = isinstance(net, IRevNet)
    if planned:
        net = net.to_empty(device="cpu")  # never touched, so that it takes no memory; autocast knows no meta device
    elif run.recipe.autocast != "none":
        return
    for name, strategy in _strategies(run, net).items():
        if isinstance(net, ReversibleNetwork):
            net.backprop, net.grid = strategy, GRIDS[run.recipe.grid]
        yield name, _planned(net, run) if isinstance(net, IRevNet) else cost_of(net, run.recipe.size)


def _strategies(run: Run, net: nn.Module) -> dict[str, Strategy]:
    if not isinstance(net, ReversibleNetwork):
        return {"store": BACKPROP["store"]}
    own = {} if run.budget is None else {f"budget of {run.budget / 2**30:.1f} GiB": run.strategy}
    return {**BACKPROP, **own}


def _planned(net: IRevNet, run: Run) -> Cost:
    def peak(images: int) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=run.recipe.autocast == "bf16"):
            return net.plan(_images(net, images, run.recipe.size)).peak

    return _cost(peak)


def cost_of(net: nn.Module, size: int | tuple[int, ...]) -> Cost:
    """What a training step of a whole network keeps, beside its parameters and their gradients, which stay.

    That of a flow is a step by likelihood, for each datum.

    The most that is there at any time in forward and backward, counted by
    :func:`invertible.testing.measure_memory` without data, for batches of 8 and of 64.

    Args:
        net: in ``train`` mode, on the device ``"meta"``. It is left without gradients.
        size: of the images, in pixels, in each dimension; of a flow the shape of a datum.

    Example:
        >>> import zoo
        >>> from invertible import Reconstruct
        >>> with torch.device("meta"):
        ...     net = zoo.create("revnet38")
        >>> stored = cost_of(net, 32)
        >>> net.backprop = Reconstruct()
        >>> cost_of(net, 32).per_image < 0.6 * stored.per_image
        True
    """

    def peak(images: int) -> int:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        x = _images(net, images, size)
        _, memory = measure_memory(lambda: _output(net, x).sum().backward(), "meta")
        net.zero_grad()
        return memory.peak

    return _cost(peak)


def _output(net: nn.Module, x: Tensor) -> Tensor:
    return net(value=x) if isinstance(net, Flow) else net(x)


def _images(net: nn.Module, count: int, size: int | tuple[int, ...]) -> Tensor:
    """Of as many channels and dimensions as the network has, 3 and 2 if it does not say."""
    if isinstance(size, tuple):
        return torch.empty(count, *size, device="meta")
    sizes = [size] * getattr(net, "dimensions", 2)
    return torch.empty(count, getattr(net, "in_channels", 3), *sizes, device="meta")


def _cost(peak: Callable[[int], int]) -> Cost:
    few, many = 8, 64  # between them it is at most this: a peak is the largest of several, each linear in the batch
    per_image = (peak(many) - (least := peak(few))) // (many - few)
    return Cost(per_image, least - few * per_image)
