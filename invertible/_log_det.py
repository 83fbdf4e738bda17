"""The log-determinant of x + F(x) for a contraction F, with gradients that need memory for one evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ._value import graph_leaves

__all__ = ["by_jacobian", "by_series", "roulette", "truncated"]

Function = Callable[[Tensor], Tensor]


def truncated(terms: int) -> list[float]:
    """The weights of a power series that is cut off."""
    return [1.0] * terms


def roulette(terms: int, go_on: float, *, on_average: bool = False) -> list[float]:
    """The weights of a power series that ends by chance: on average all are 1.

    The first ``terms`` are there always, and each one after them with the probability ``go_on``, if the one before it
    is. Drawn from torch's generator on the CPU, one throw after another: one number of limited precision would end
    the series for certain. ``on_average`` draws nothing, and returns as many as there are on average.
    """
    if on_average:
        return truncated(terms + round(go_on / (1 - go_on)))
    weights = truncated(terms)
    probability = 1.0
    while float(torch.rand((), device="cpu", dtype=torch.float64)) < go_on:
        probability *= go_on
        weights.append(1 / probability)
    return weights


def by_jacobian(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """F(x), and log |det(I + J)| of each sample by its Jacobian."""
    size = x[:1].numel()
    values, many, tracked = _evaluated(function, x, size)
    one = torch.eye(size, dtype=x.dtype, device=x.device)
    rows = _pulled(values, many, one.repeat_interleave(len(x), 0).view_as(many), create_graph=tracked)
    jacobian = rows.reshape(size, len(x), size).transpose(0, 1)
    log_det = cast("Any", torch.linalg).slogdet(one + jacobian).logabsdet
    return _first(values, x, tracked=tracked), log_det


def by_series(function: Function, x: Tensor, weights: Sequence[float], *, probes: int | None) -> tuple[Tensor, Tensor]:
    r"""F(x), and :math:`\sum_k w_k \frac{(-1)^{k+1}}{k} \mathrm{tr} J^k` of each sample.

    The trace is the mean of :math:`v^T J^k v` over random signs v, or its sum over all unit vectors (``None``). The
    value comes from products that no graph is kept of; its derivative is that of :math:`s^T J v` with the constant
    :math:`s = \sum_k w_k (-J^T)^{k-1} v`.
    """
    count = x[:1].numel() if probes is None else probes
    values, many, tracked = _evaluated(function, x, count)
    if probes is None:
        noise = torch.eye(count, dtype=x.dtype, device=x.device).repeat_interleave(len(x), 0).view_as(many)
    else:
        noise = 2.0 * torch.randint(0, 2, many.shape, dtype=x.dtype, device=x.device) - 1
    with torch.no_grad():
        power, total = noise, torch.zeros_like(noise)
        log_det = noise.new_zeros(len(noise))
        for k, weight in enumerate(weights, 1):
            sign = 1 if k % 2 else -1
            total = total + sign * weight * power
            power = _pulled(values, many, power, retain_graph=True)
            log_det = log_det + sign * weight / k * _inner(power, noise)
    if tracked:
        slope = _inner(_pulled(values, many, total, create_graph=True), noise)
        log_det = log_det + (slope - slope.detach())
    log_det = log_det.view(count, len(x)).sum(0) / (1 if probes is None else count)
    return _first(values, x, tracked=tracked), log_det


def _evaluated(function: Function, x: Tensor, copies: int) -> tuple[Tensor, Tensor, bool]:
    """F of ``copies`` copies of a batch, these, and whether the caller differentiates; the first copy comes first.

    They are never the caller's tensor: nothing is to require gradients of it, and its hooks are not to fire.
    """
    enabled = torch.is_grad_enabled()
    many = x.repeat(copies, *[1] * (x.ndim - 1)) if copies != 1 else x.view_as(x)
    if not (enabled and many.requires_grad):
        many = many.detach().requires_grad_()
    with torch.enable_grad():  # a view: what hooks the input of F, as a profiler does, can't be asked about a leaf
        values = function(many.view_as(many))
    tracked = enabled and (x.requires_grad or any(t is not many for t in graph_leaves([values])))
    return values, many, tracked


def _pulled(values: Tensor, many: Tensor, cotangent: Tensor, **options: bool) -> Tensor:
    if not values.requires_grad:  # a constant function
        return torch.zeros_like(many)
    return torch.autograd.grad(values, many, cotangent, materialize_grads=True, **options)[0]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _first(values: Tensor, x: Tensor, *, tracked: bool) -> Tensor:
    first = values[: len(x)]
    return first if tracked else first.detach()
