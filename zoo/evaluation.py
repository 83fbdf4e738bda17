"""How well a network classifies."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from invertible import StreamRangeError
from zoo.distributed import World
from zoo.errors import InputError
from zoo.network import ReversibleNetwork

__all__ = ["Evaluation", "evaluate", "evaluating", "logits_of"]


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent and the mean cross entropy in nats, over every image once.

    Example:
        >>> found = Evaluation(top1=75.0, top5=100.0, loss=0.5, images=4)
        >>> found.top1, found.unread
        (75.0, 0)
    """

    top1: float
    top5: float
    loss: float
    images: int
    unread: int = 0
    """Images that were left out, because they could not be read."""


@contextmanager
def evaluating(net: nn.Module) -> Generator[None]:
    """Puts a network into ``eval`` mode, and every part of it back into the mode that it was in.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with evaluating(net):
        ...     print([part.training for part in net])
        [False, False]
        >>> [part.training for part in net]
        [True, False]
    """
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    """What a network returns; where a value leaves its grid, what it returns without one.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1, 1)).eval()
        >>> net.grid = "exact"
        >>> logits_of(net, torch.full((1, 3, 16, 16), 1e30)).shape  # net(x) would raise StreamRangeError
        torch.Size([1, 2])
    """
    try:
        return net(x)
    except StreamRangeError:
        if not isinstance(net, ReversibleNetwork):
            raise
    grid, net.grid = net.grid, None
    try:
        return net(x)
    finally:
        net.grid = grid


@torch.no_grad()
def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, world: World | None = None) -> Evaluation:
    """Classifies every image in ``eval`` mode.

    Images whose activations leave the network's grid, as they may early in training, are classified without one: for
    that, rounding is no matter. The top-5 accuracy counts a label among the five largest logits; with fewer classes it
    is 100.

    Args:
        net: returns logits.
        batches: what it sees, and the labels; of several processes, the part of each, however many images it has.
        world: these processes.

    Raises:
        InputError: if there is no image.

    Example:
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 0]))]
        >>> found = evaluate(nn.Identity(), batches)
        >>> round(found.top1, 1), found.top5, round(found.loss, 2), found.images
        (66.7, 100.0, 0.88, 3)
    """
    totals = torch.zeros(4, dtype=torch.float64)
    with evaluating(net):
        for x, labels in batches:
            logits = logits_of(net, x)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = cross_entropy(logits.float(), labels, reduction="sum")
            counts = [best[:, 0].sum().double(), best.sum().double(), loss.double()]
            totals[:3] += torch.stack(counts).cpu()
            totals[3] += len(labels)
    device = next((p.device for p in net.parameters()), totals.device)
    totals = (world or World()).summed(totals.to(device)).cpu()
    count = int(totals[3])
    if not count:
        raise InputError("there is no validation image that can be read")
    top1, top5, loss = (totals[:3] / count).tolist()
    return Evaluation(100 * top1, 100 * top5, loss, count)
