"""What a network keeps, layer by layer: what a strategy has chosen, and what it costs."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .strategies import Budget, Strategy

__all__ = ["Choice", "Decision", "Plan", "PlanRow", "plans"]


class Choice(enum.Enum):
    """What is done for the gradients of one layer.

    Example:
        >>> net = Sequential(Split(), *(Coupling(nn.Linear(2, 2)) for _ in range(3)), Merge(), backprop=Reconstruct())
        >>> [row.choice.name for row in net.plan(torch.rand(16, 4)).rows]
        ['RECOMPUTE', 'RECONSTRUCT', 'RECONSTRUCT', 'MOVE']
    """

    STORE = "store"
    """Everything is kept: plain autograd."""
    RECOMPUTE = "recompute"
    """The input is kept, and the layer runs again."""
    RECONSTRUCT = "reconstruct"
    """The input comes back from the output, and the layer runs again."""
    MOVE = "move"
    """It only moves elements: nothing is kept, and gradients are moved back."""
    UNTRAINED = "untrained"
    """Neither it nor what comes before it is trained: nothing is kept, and no gradient goes there."""


@dataclass(frozen=True)
class Decision:
    """What is done for one layer, and which products of its function are kept: their positions."""

    choice: Choice
    products: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlanRow:
    """One layer of a :class:`Plan`.

    Example:
        >>> net = Sequential(Split(), *(Coupling(nn.Linear(2, 2)) for _ in range(2)), Merge(), backprop=Recompute())
        >>> row = net.plan(torch.rand(16, 4)).rows[1]
        >>> row.layer, row.what, row.bytes, round(row.work, 2)
        ('2', 'recompute', 128, 0.36)
    """

    layer: str
    """Its name in the network, as in ``named_modules``."""
    choice: Choice
    products: tuple[int, ...]
    """Which of its function's matrix products and convolutions are kept, and so not computed again: their positions."""
    bytes: int
    """What it keeps between forward and backward, above what the layers before it keep."""
    work: float
    """What is computed again for it, as a share of the network's forward pass."""

    @property
    def what(self) -> str:
        """The choice in words."""
        kept = len(self.products)
        return self.choice.value + (f", {kept} {'product' if kept == 1 else 'products'} kept" if kept else "")


@dataclass(frozen=True)
class Plan:
    """What each layer of a network keeps for its gradients, counted and not timed: ``print(net.plan(x))``.

    Work is floating-point operations of matrix products and convolutions, and 20 for each byte that any operation
    reads or writes. So a plan depends on the network, the shapes and dtypes alone, and is the same in every process.

    Example:
        >>> net = Sequential(Split(), *(Coupling(nn.Linear(8, 8)) for _ in range(9)), Merge(), backprop=Reconstruct())
        >>> print(net.plan(torch.empty(1024, 16, device="meta")))
        layer                    choice          kept  added work
        1                        recompute        0 B       10.2%
        2                        reconstruct  8.0 KiB       10.2%
        3 to 9 (7 layers, each)  reconstruct      0 B       10.2%
        10                       move             0 B        0.0%
        together                              8.0 KiB       92.1%
        peak 328.3 KiB; 328.3 KiB at least, 480.3 KiB if all is stored
        in addition: parameters 2.5 KiB, their gradients 2.5 KiB,
        optimizer 2.5 KiB (momentum) or 5.1 KiB (Adam), the input, the loss
    """

    rows: Sequence[PlanRow]
    """The layers in the order of computation."""
    peak: int
    """The most bytes at any time of a step, with what a layer needs while it runs again and the output that the loss
    is of. Not among them: the input, parameters and their gradients, the optimizer's state, and the loss itself."""
    least: int
    """The smallest peak that any choice has."""
    most: int
    """The peak if everything is stored."""
    parameters: int
    """Bytes of the parameters."""
    gradients: int
    """Bytes of the gradients of those that are trained. An optimizer has as much again for each number that it keeps
    per parameter: one for momentum, two for Adam."""

    @property
    def kept(self) -> int:
        """Bytes that are kept between forward and backward."""
        return sum(row.bytes for row in self.rows)

    @property
    def work(self) -> float:
        """What is computed again, as a share of a forward pass."""
        return sum(row.work for row in self.rows)

    def __str__(self) -> str:
        lines = [("layer", "choice", "kept", "added work")]
        groups: list[list[PlanRow]] = []
        for row in self.rows:
            like = groups and (groups[-1][0].what, groups[-1][0].bytes, groups[-1][0].work)
            if like == (row.what, row.bytes, row.work):
                groups[-1].append(row)
            else:
                groups.append([row])
        for group in groups:
            first, last = group[0], group[-1]
            names = first.layer if first is last else f"{first.layer} to {last.layer} ({len(group)} layers, each)"
            lines.append((names, first.what, _size(first.bytes), f"{first.work:.1%}"))
        lines.append(("together", "", _size(self.kept), f"{self.work:.1%}"))
        once, twice = _size(self.gradients), _size(2 * self.gradients)
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in lines
        ]
        return "\n".join(
            [
                *table,
                f"peak {_size(self.peak)}; {_size(self.least)} at least, {_size(self.most)} if all is stored",
                f"in addition: parameters {_size(self.parameters)}, their gradients {once},",
                f"optimizer {once} (momentum) or {twice} (Adam), the input, the loss",
            ]
        )


def plans(net: Any, x: Any, budget: Budget) -> Callable[[Strategy], Plan]:
    """Counts a network's forward pass once, and returns what makes plans of strategies.

    These are any :class:`~invertible.Budget`, and :class:`~invertible.Store`.

    For what compares plans, as a network that divides a budget among several chains. One is as by
    :meth:`invertible.Sequential.plan`, whatever the network's own strategy is.

    Args:
        net: a :class:`~invertible.Sequential`.
        x: what goes forward; nothing is computed, so that it may be on the meta device.
        budget: like those that plans are made of: of its bytes nothing depends.

    Example:
        >>> net = Sequential(Split(), *(Coupling(nn.Tanh()) for _ in range(9)), Merge())
        >>> plan_of = plans(net, torch.rand(16, 32, requires_grad=True), Budget(1))
        >>> least = plan_of(Store()).least
        >>> plan_of(Budget(least)).peak <= least < plan_of(Store()).peak
        True
    """
    from ._budget import plans_of  # imports what counts, which is slow

    return plans_of(net, net.snap(x), budget)


def _size(count: int) -> str:
    """Bytes in words."""
    if count < 1024:
        return f"{count} B"
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"
