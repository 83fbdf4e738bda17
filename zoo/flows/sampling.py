"""What flows are used for: samples at a temperature, and bits for each dimension."""

import math
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from invertible import Flow, Value
from zoo._options import check_number

__all__ = ["bits_per_dimension", "samples"]


def bits_per_dimension(log_prob: Tensor, shape: tuple[int, ...]) -> Tensor:
    r"""Returns how many bits an element of a datum takes, :math:`-\log_2 p(x) / d` for d elements.

    Of whole numbers it is what an ideal code that knows the flow needs for each of them: independent numbers among 256,
    all as likely, take 8. A flow of whole numbers gives a bound of their probability, so that these bits are at least
    as many as they could be, and random in the last digits. Of real numbers it depends on their unit, and may be
    negative.

    Source: Theis et al., 2016, section 3.1, https://arxiv.org/abs/1511.01844

    Args:
        log_prob: in nats, of any shape, as ``flow(value=x)`` returns it.
        shape: of a datum, without the batch.

    Example:
        >>> bits_per_dimension(torch.tensor([-64 * math.log(256)]), (1, 8, 8))
        tensor([8.])
    """
    return -log_prob / (math.log(2) * math.prod(shape))


@torch.no_grad()
def samples(flow: Flow, count: int, *, temperature: float = 1.0, condition: Value | None = None) -> Tensor:
    r"""Draws from a flow whose latent values are multiplied by a temperature.

    Below 1 the latent values are nearer to the mode of the base, and samples more alike and more likely; at 1 they are
    those of the density. At 0 there is one sample. No buffer of the flow moves.

    Source: Glow (Kingma and Dhariwal, 2018), section 6, https://arxiv.org/abs/1807.03039, whose reduced temperature
    multiplies the deviation of all its priors by T, as this does.

    Args:
        flow: whose base is symmetric about 0 and needs no condition, as of :meth:`invertible.Flow.standard_normal`.
        count: how many.
        temperature: what latent values are multiplied by, from 0 on.
        condition: one for each sample, where the flow needs one.

    Raises:
        TypeError: if the count is no integer, or the temperature no number.
        ValueError: if the count is negative, the temperature negative or not finite, or there are not as many
            conditions as samples.

    Example:
        >>> import zoo
        >>> flow = zoo.create("glow", shape=(1, 8, 8), levels=2, steps=1, width=4, values=17)
        >>> samples(flow, 3, temperature=0.7).shape
        torch.Size([3, 1, 8, 8])
    """
    check_number("samples", "count", count, least=0)
    if not isinstance(cast("object", temperature), Real):
        raise TypeError(f"samples: temperature must be a number, got {temperature!r}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"samples: temperature must be 0 or a positive number, got {temperature}.")
    first = condition
    while isinstance(first, tuple):
        first = first[0]
    if first is not None and len(first) != count:
        raise ValueError(f"samples: expected a condition for each of {count} samples, got {len(first)}.")
    return flow.transform.inverse(_drawn(flow.base, count, temperature), condition=condition)


def _drawn(base: nn.Module, count: int, temperature: float) -> Any:
    """Latent values, nested as their bases are."""
    if isinstance(base, nn.ModuleList):
        return tuple(_drawn(part, count, temperature) for part in base)
    drawn = cast("Tensor", base(None).sample((count,)))
    return temperature * drawn
