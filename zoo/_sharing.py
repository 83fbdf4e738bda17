"""How the chains of one network share a budget of bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from invertible import Budget, Sequential, Store
from invertible.backprop import Plan, plans

_STEPS = 16
"""Into so many parts what there is above the least is divided; a power of two."""


_PLENTY = 2**62
"""Bytes that nothing needs."""


@dataclass(frozen=True)
class Shares:
    """What each chain gets, and the plans that this gives."""

    budgets: tuple[int, ...]
    plans: tuple[Plan, ...]
    peak: int
    """Of all chains together, in bytes."""
    least: int = 0
    """The smallest budget that can be divided."""
    most: int = 0
    """The peak if everything is stored."""


def peak_of(chains: Sequence[Sequential], inputs: Sequence[Any], plans: Sequence[Plan]) -> int:
    """The most bytes at any time of chains that run one after another, and in the other order in backward.

    While one is at work, those before it hold what they keep and their outputs; those after it hold nothing yet, or
    nothing any more.
    """
    return max(_before(chains[:i], inputs, plans) + plan.peak for i, plan in enumerate(plans))


def _before(chains: Sequence[Sequential], inputs: Sequence[Any], plans: Sequence[Plan]) -> int:
    """What chains hold while a later one is at work. An output is as large as the input, on a grid in its dtype."""
    held = 0
    for chain, x, plan in zip(chains, inputs, plans, strict=False):
        sizes = [t.numel() * (chain.grid.dtype if chain.grid else t.dtype).itemsize for t in _tensors(x)]
        held += plan.kept + sum(sizes)
    return held


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    else:
        for part in x:
            yield from _tensors(part)


def share(who: str, chains: Sequence[Sequential], inputs: Sequence[Any], budget: Budget) -> Shares:
    """Divides a budget: each chain gets the least that it needs, and of what it could use above that the same part.

    The last one gets all that is left, for what it keeps is in nobody's way.

    Args:
        who: the network's name, for the message.
        chains: in the order of computation, each with an output as large as its input.
        inputs: of the chains, of which only shapes, strides and dtypes count.
        budget: of all of them.

    Raises:
        ValueError: if even the least is more.
    """
    counted = [plans(chain, x, budget) for chain, x in zip(chains, inputs, strict=True)]
    stored = [plan(Store()) for plan in counted]

    def of(*budgets: int) -> Shares:
        found = [plan(replace(budget, bytes=each)) for plan, each in zip(counted, budgets, strict=True)]
        return Shares(budgets, tuple(found), peak_of(chains, inputs, found))

    def at(step: int) -> Shares:
        return of(*(max(each.least + (each.most - each.least) * step // _STEPS, 1) for each in stored))

    best = at(0)
    if best.peak > budget.bytes:
        raise ValueError(
            f"Budget: {who} needs {best.peak} bytes at least for this input, got {budget.bytes}. Take a smaller batch "
            "or a larger budget; with net.backprop = Reconstruct(), net.plan(x) says what needs it."
        )
    low, high, least, most = 0, _STEPS, best.peak, at(_STEPS)
    if most.peak <= budget.bytes:
        low, best = _STEPS, most
    while high - low > 1:
        middle = (low + high) // 2
        found = at(middle)
        if found.peak <= budget.bytes:
            low, best = middle, found
        else:
            high = middle
    *others, last = best.budgets
    found = of(*others, max(budget.bytes - _before(chains[:-1], inputs, best.plans), last))
    return replace(found, least=least, most=most.peak)


def plan(
    who: str,
    chains: Mapping[str, Sequential],
    inputs: Sequence[Any],
    parameters: Sequence[Tensor],
    budget: Budget | None,
) -> Plan:
    """The plan of a network, in which the layers have their names there.

    Args:
        who: the network's name, for the message.
        chains: by their names in the network.
        inputs: of the chains.
        parameters: of the whole network.
        budget: that the chains share, or ``None`` where they have strategies.
    """
    found = list(chains.values())
    each: Sequence[Plan] = [] if budget else [chain.plan(x) for chain, x in zip(found, inputs, strict=True)]
    if len(each) == 1:
        least, most = each[0].least, each[0].most
    else:
        shares = share(who, found, inputs, budget or Budget(_PLENTY))
        each, least, most = each or shares.plans, shares.least, shares.most
    rows = [
        replace(row, layer=f"{name}.{row.layer}") for name, own in zip(chains, each, strict=True) for row in own.rows
    ]
    return Plan(
        rows,
        peak=peak_of(found, inputs, each),
        least=least,
        most=most,
        parameters=sum(p.numel() * p.element_size() for p in parameters),
        gradients=sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
    )
