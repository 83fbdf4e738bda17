"""How well a network classifies."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.data import ImageTree, loader

__all__ = ["Evaluation", "evaluate", "image_batches"]


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent and the mean cross entropy in nats, over every image once."""

    top1: float
    top5: float
    loss: float
    images: int


def image_batches(
    data: ImageTree, *, batch_size: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every image once, in order, in [0, 1], with its label, on a device. The last batch may be smaller."""
    addresses = [(0, index) for index in range(len(data))]
    batches = [addresses[first : first + batch_size] for first in range(0, len(data), batch_size)]
    for images, labels in loader(data, batches, workers=workers, pin=device.type == "cuda"):
        yield images.to(device, non_blocking=True).float() / 255, labels.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(net: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Evaluation:
    """Classifies every image in ``eval`` mode and puts every part of the network back into the mode that it was in.

    The top-5 accuracy counts a label among the five largest logits; with fewer classes it is 100.
    """
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    count = 0
    try:
        for images, labels in batches:
            logits = net(images)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([best[:, 0].sum().double(), best.sum().double(), loss.double()]).cpu()
            count += len(labels)
    finally:
        for part, training in modes:
            part.training = training
    top1, top5, loss = (totals / count).tolist()
    return Evaluation(100 * top1, 100 * top5, loss, count)
