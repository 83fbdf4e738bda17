"""Plans what each layer of a network keeps, once for each kind of input."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import is_lazy

from invertible import _check
from invertible._compiled import compiled_call
from invertible._range import nothing_read
from invertible._running import running
from invertible._value import Value, leaves

from ._chain import Layer
from ._knapsack import Option, Stage, cheapest, kept_by, least_peak, peak_of
from ._planner import Planner
from ._torch import (
    buffers_of,
    children_of,
    parameters_of,
    without_cached_parametrizations,
    without_global_hooks,
    without_modes,
)
from .plan import Choice, Decision, Plan, PlanRow
from .strategies import Budget, Recompute, Reconstruct, Store, Strategy

__all__ = ["decisions", "planned", "plans_of"]

Walk = Callable[[Any], Any]

Decisions = list[tuple[Layer, Decision]]

_UNCHOSEN = (Choice.MOVE, Choice.UNTRAINED)

MOST = 64
"""Plans that are remembered for a network."""

_plans: WeakKeyDictionary[nn.Module, dict[Any, tuple[Decisions, list[nn.Module]]]] = WeakKeyDictionary()


def decisions(net: Layer, strategy: Budget, walk: Walk, x: Value, method: str, condition: Value | None) -> Decisions:
    """What the layers of a network do that compute something, in the order of computation."""
    if any(map(is_lazy, net.parameters())):
        return []  # the very first run is for their shapes
    if not _are_tensors(x):
        return []  # the layer's own error
    known = _plans.setdefault(net, {})
    situation, inside = _situation(net, x, condition)
    key = (strategy, method, situation)
    if key not in known:
        counted = _Counted(net, strategy, walk, x, method)
        chosen = [(layer, o.choice) for layer, o in zip(counted.layers, counted.chosen(strategy), strict=True)]
        if len(known) == MOST:
            known.pop(next(iter(known)))
        # With the modules, or new ones might get their numbers.
        known[key] = [each for each in chosen if each[1].choice not in _UNCHOSEN], inside
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
    if not _are_tensors(x):
        raise _check.type_error(net, "expected a tensor, or a tuple of tensors", x)
    walk = partial(net._walk, "forward", condition=condition)
    return _plan(_Counted(net, strategy, walk, x, "forward"), strategy)


def plans_of(net: Any, x: Value, budget: Budget) -> Callable[[Strategy], Plan]:
    """Counts once, and returns what plans for other budgets, and for storing everything."""
    if not _are_tensors(x):
        raise _check.type_error(net, "expected a tensor, or a tuple of tensors", x)
    return partial(_plan, _Counted(net, budget, partial(net._walk, "forward", condition=None), x, "forward"))


def _plan(counted: "_Counted", strategy: Strategy) -> Plan:
    stages, sizes, fixed = counted.stages, counted.sizes, counted.fixed
    allowed = [stage.only(option) for stage, option in zip(stages, counted.chosen(strategy), strict=True)]
    rows: list[PlanRow] = []
    for name, stage, kept in zip(counted.names, allowed, kept_by(allowed, sizes), strict=True):
        option = stage.options[0]
        work = option.work / max(counted.work, 1)
        rows.append(PlanRow(name, option.choice.choice, option.choice.products, kept, work))
    held = list({id(p): p for p in counted.net.parameters()}.values())
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
        with ExitStack() as stack:
            stack.enter_context(without_modes())
            stack.enter_context(without_global_hooks())
            stack.enter_context(without_cached_parametrizations())
            stack.enter_context(saved_tensors_hooks(Tensor.detach, Tensor.detach))  # no hooks around see what is saved
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
            for kind in _kinds_of(x):  # casts that are remembered would be missing where they are made again
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False))
            stack.enter_context(planner.quiet())
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(nothing_read())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(running(planner, net))
            result = walk(planner.enter(x, given=net.grid is None))
        planner.allow_for_conditions()
        outputs = {planner.know(t)[1] for t in leaves(result[0] if method.endswith("log_det") else result)}
        self.net = net
        self.names, self.layers, self.work = planner.names, planner.layers, planner.work
        self.fixed = sum(planner.sizes[storage] for storage in outputs) + planner.shared()
        """The output is there as long as the loss needs it."""
        self.sizes = planner.sizes | dict.fromkeys(outputs, 0)
        self.stages = [self._before_output(stage, planner.sizes) for stage in planner.stages]

    def _before_output(self, stage: Stage, sizes: dict[int, int]) -> Stage:
        """In forward there is nothing of what is fixed but the parts of the output that are made already."""
        there = stage.there | {storage for _, storage in stage.inputs}
        more = sum(sizes[s] - self.sizes[s] for s in there) - self.fixed
        return replace(stage, options=[replace(o, forward=o.forward + more) for o in stage.options])

    def chosen(self, strategy: Strategy) -> Sequence[Option]:
        """An option for each layer."""
        if not isinstance(strategy, Budget):
            wanted = 0 if isinstance(strategy, Store) else 1 if isinstance(strategy, Recompute) else 2
            return [stage.options[min(wanted, len(stage.options) - 1)] for stage in self.stages]
        found = cheapest(self.stages, self.sizes, strategy.bytes, fixed=self.fixed)
        if found is None:
            least = least_peak(self.stages, self.sizes, fixed=self.fixed)
            raise ValueError(
                f"Budget: {type(self.net).__name__} needs {least} bytes at least for this input, got {strategy.bytes}. "
                "Take a smaller batch or a larger budget; with net.backprop = Reconstruct(), net.plan(x) says what "
                "needs it."
            )
        return found


def _are_tensors(x: Any) -> bool:
    return all(isinstance(t, Tensor) for t in cast("Iterable[Any]", leaves(x)))


def _kinds_of(x: Value) -> list[str]:
    """Of the devices at work, for autocast."""
    return sorted({"cpu", *(t.device.type for t in leaves(x))} - {"meta"})


def _situation(net: nn.Module, x: Value, condition: Value | None) -> tuple[Any, list[nn.Module]]:
    """All that a plan depends on, and the modules inside the network."""
    inputs = tuple(
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
        for t in leaves((x,) if condition is None else (x, condition))
        if isinstance(t, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance] (a condition may hold anything)
    )
    others = repr([t for t in leaves(condition) if not isinstance(t, Tensor)]) if condition is not None else ""  # pyright: ignore[reportUnnecessaryIsInstance]
    autocast = tuple((k, torch.get_autocast_dtype(k)) for k in _kinds_of(x) if torch.is_autocast_enabled(k))
    parts: list[Any] = []
    todo, seen = [net], dict[nn.Module, None]()
    while todo:
        part = todo.pop()
        if part not in seen:
            seen[part] = None
            children = [child for child in children_of(part).values() if child is not None]
            todo += children
            held = tuple(
                None if t is None else (t.shape, t.dtype, t.device, t.requires_grad)
                for t in (*parameters_of(part).values(), *buffers_of(part).values())
            )
            # Which children in which order, too: a layer may be in several places.
            parts.append((id(part), tuple(map(id, children)), part.training, compiled_call(part) is None, held))
    return (inputs, others, autocast, tuple(parts), net.grid), [part for part in seen if part is not net]
