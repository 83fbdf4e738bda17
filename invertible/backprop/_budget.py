"""Plans what each layer of a network keeps, once for each kind of input."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from invertible._compiled import compiled_call
from invertible._range import nothing_read
from invertible._running import running
from invertible._value import Value, leaves

from ._chain import Layer
from ._counting import storage_of
from ._knapsack import Option, cheapest, kept_by, least_peak, peak_of
from ._planner import Planner
from ._torch import children_of, parameters_of
from .plan import Choice, Decision, Plan, PlanRow
from .strategies import Budget, Recompute, Reconstruct, Store, Strategy

__all__ = ["decisions", "planned"]

Walk = Callable[[Any], Any]

MOST = 64
"""Plans that are remembered for a network."""

_plans: WeakKeyDictionary[nn.Module, dict[Any, tuple[list[Decision], list[nn.Module]]]] = WeakKeyDictionary()


def decisions(
    net: Layer, strategy: Budget, walk: Walk, x: Value, method: str, condition: Value | None
) -> list[Decision]:
    """What the layers of a network do that compute something, in the order of computation."""
    if any(map(is_lazy, net.parameters())):
        return []  # the very first run is for their shapes
    known = _plans.setdefault(net, {})
    situation, inside = _situation(net, x, condition)
    key = (strategy, method, situation)
    if key not in known:
        counted = _Counted(net, strategy, walk, x, method)
        chosen = [option.choice for option in counted.chosen(strategy)]
        if len(known) == MOST:
            known.pop(next(iter(known)))
        # With the modules, or new ones might get their numbers.
        known[key] = [decision for decision in chosen if decision.choice is not Choice.MOVE], inside
    return known[key][0]


def planned(net: Any, x: Value, condition: Value | None) -> Plan:
    """What a network's strategy keeps when ``x`` goes forward, and what that costs."""
    strategy: Strategy = net.backprop or Store()
    if any(map(is_lazy, net.parameters())):
        raise ValueError("plan: some parameters have no shapes yet. Run the network once.")
    if (isinstance(strategy, Recompute) and strategy.every > 1) or (
        isinstance(strategy, Reconstruct) and strategy.anchor_every is not None
    ):
        raise ValueError(f"plan: counts layer by layer, not for segments or anchors, got {strategy!r}.")
    walk = partial(net._walk, "forward", condition=condition)
    counted = _Counted(net, strategy, walk, x, "forward")
    stages, sizes, fixed = counted.stages, counted.sizes, counted.fixed
    allowed = [stage.only(option) for stage, option in zip(stages, counted.chosen(strategy), strict=True)]
    rows: list[PlanRow] = []
    for name, stage, kept in zip(counted.names, allowed, kept_by(allowed, sizes), strict=True):
        option = stage.options[0]
        work = option.work / max(counted.work, 1)
        rows.append(PlanRow(name, option.choice.choice, option.choice.products, kept, work))
    held = list({id(p): p for p in net.parameters()}.values())
    return Plan(
        rows,
        peak=peak_of(allowed, sizes, fixed=fixed),
        least=least_peak(stages, sizes, fixed=fixed),
        most=peak_of([stage.only(stage.options[0]) for stage in stages], sizes, fixed=fixed),
        parameters=sum(p.numel() * p.element_size() for p in held),
        gradients=sum(p.numel() * p.element_size() for p in held if p.requires_grad),
    )


class _Counted:
    """The stages of a network, with the sizes of their tensors."""

    def __init__(self, net: Layer, strategy: Strategy, walk: Walk, x: Value, method: str) -> None:
        planner = Planner(net, strategy)
        with planner.quiet(), FakeTensorMode(), nothing_read(), torch.enable_grad(), running(planner, net):
            result = walk(planner.enter(x, given=net.grid is None))
        outputs = {storage_of(t) for t in leaves(result[0] if method.endswith("log_det") else result)}
        self.net = net
        self.names, self.stages, self.work = planner.names, planner.stages, planner.work
        self.fixed = sum(planner.sizes.get(storage, 0) for storage in outputs)
        """The output is there as long as the loss needs it."""
        self.sizes = planner.sizes | dict.fromkeys(outputs, 0)

    def chosen(self, strategy: Strategy) -> Sequence[Option]:
        """An option for each layer."""
        if not isinstance(strategy, Budget):
            wanted = 0 if isinstance(strategy, Store) else 1 if isinstance(strategy, Recompute) else 2
            return [stage.options[min(wanted, len(stage.options) - 1)] for stage in self.stages]
        found = cheapest(self.stages, self.sizes, strategy.bytes, fixed=self.fixed)
        if found is None:
            least = least_peak(self.stages, self.sizes, fixed=self.fixed)
            raise ValueError(
                f"Budget: {type(self.net).__name__} needs {least} bytes at least for this input, got {strategy.bytes}."
            )
        return found


def _situation(net: nn.Module, x: Value, condition: Value | None) -> tuple[Any, list[nn.Module]]:
    """All that a plan depends on, and the modules inside the network."""
    inputs = tuple(
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
        for t in leaves((x,) if condition is None else (x, condition))
        if isinstance(t, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance] (a condition may hold anything)
    )
    kinds = {"cpu", *(spec[3].type for spec in inputs)}
    autocast = tuple(
        (k, torch.get_autocast_dtype(k)) for k in sorted(kinds) if k != "meta" and torch.is_autocast_enabled(k)
    )
    parts: list[Any] = []
    todo, seen = [net], dict[nn.Module, None]()
    while todo:
        part = todo.pop()
        if part not in seen:
            seen[part] = None
            todo += [child for child in children_of(part).values() if child is not None]
            trained = tuple(None if p is None else p.requires_grad for p in parameters_of(part).values())
            parts.append((id(part), part.training, compiled_call(part) is None, trained))
    return (inputs, autocast, tuple(parts), net.grid), [part for part in seen if part is not net]
