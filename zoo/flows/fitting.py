"""Fits a flow, or anything else that has a loss, in a few lines."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from zoo.errors import DivergedError

__all__ = ["fit"]


def fit(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], *, steps: int, lr: float) -> list[float]:
    """Minimises a loss by Adam, with a rate that falls to 0 by half a cosine.

    Args:
        parameters: what is trained.
        loss: of a batch that it draws, each time another.
        steps: how many.
        lr: the first rate.

    Returns:
        The loss of each step.

    Raises:
        DivergedError: if a loss is not finite.

    Example:
        >>> x = nn.Parameter(torch.ones(()))
        >>> _ = fit([x], lambda: (x - 3).square(), steps=200, lr=0.3)
        >>> abs(x.item() - 3) < 0.01
        True
    """
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found: list[float] = []
    for step in range(steps):
        value = loss()
        found.append(value.item())
        if not value.isfinite():
            raise DivergedError(f"the loss is {found[-1]} at step {step}; try a lower learning rate")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return found
