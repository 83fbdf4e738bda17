"""Walks through a network on tensors without data and takes down what each layer could keep, and what that costs."""

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, cast
from weakref import ProxyTypes

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from invertible._buffers import one_at_a_time
from invertible._compiled import is_compiled
from invertible._value import leaves, map_value

from ._chain import Chain, refuse_scripted
from ._counting import Numbers, Watch, storage_of
from ._kinds import Kind, measured
from ._knapsack import Option, Stage
from ._node import Step
from ._rules import rule_of
from ._torch import buffers_of, parameters_of
from ._undone import same_random, undone
from .plan import Choice, Decision
from .strategies import Reconstruct, Strategy

__all__ = ["Planner"]


def _makes_weights(hook: Any) -> bool:
    """Whether a hook is one by which torch's weight norm, spectral norm and pruning compute a weight."""
    return type(hook).__module__.startswith("torch.nn.utils.")


class Planner(Chain):
    """A chain that counts and does not compute, inside a mode in which no tensor has data."""

    def __init__(self, net: Any, strategy: Strategy) -> None:
        super().__init__(net, strategy)
        self._reconstruct = self._reconstruct or Reconstruct()
        self.every = 1
        self.names: list[str] = []
        self.layers: list[Any] = []
        self.stages: list[Stage] = []
        self.sizes: dict[int, int] = {}
        self.work = 0
        """Of a forward pass."""
        self._fakes: dict[int, Tensor] = {}
        self._kinds: dict[Any, Kind] = {}
        self._uses: Counter[int] = Counter()
        self._conditions: dict[int, dict[int, int]] = {}  # by stage: bytes of the trained ones
        self._tensors, self._storages = Numbers(), Numbers()
        self._there: frozenset[int] = frozenset()
        self._allowed: set[int] = set()
        self._held: list[Tensor] = []  # or others would get their places
        self._paths = {id(part): path for path, part in net.named_modules()}
        self._path, self._method, self._look, self._layer = "", "", None, net
        self._compiled: set[nn.Module] = set()
        self._warned = True  # by the chain that runs

    def enter(self, value: Any, *, given: bool) -> Any:
        """What enters, without data; ``given``: its memory is the caller's, and not counted."""
        made = map_value(self._fake_shape, value)
        for t in leaves(made):
            storage = self.know(t)[1]
            if given:
                self.sizes[storage] = 0
        return made

    def refuse_inner(self, net: Any, strategy: Strategy) -> None:
        super().refuse_inner(net, strategy)
        rule = "every container inside must take the strategy of the one around it (backprop=None)"
        raise ValueError(f"plan: {rule}, got {strategy} in layer {self._paths[id(net)]!r}.")

    @contextmanager
    def quiet(self) -> Generator[None]:
        """Lets no hook fire, nor compiled code run, while tensors have no data."""
        parts = list(self.net.modules())
        with one_at_a_time, same_random(), undone(parts):
            self._compiled = {part for part in parts if is_compiled(part)}
            for part in parts:
                for key in _HOOKS & part.__dict__.keys():
                    hooks = part.__dict__[key]
                    part.__dict__[key] = type(hooks)((k, h) for k, h in hooks.items() if _makes_weights(h))
                part.__dict__.pop(_COMPILED, None)
            yield

    def _run(
        self, layers: Sequence[Any], method: str, call: Any, value: Any, condition: Any, *, called: Any = None
    ) -> Any:
        layer = self._layer = layers[0]
        self._path = self._paths[id(layer)]
        self._method, self._look = method, (_look(layer), method)
        self._there = self._storages.there()
        refuse_scripted(self.net, layer.modules())
        with self._without_data(layer):
            try:
                return super()._run(layers, method, call, value, map_value(self._fake_shape, condition), called=called)
            except Exception as error:
                error.add_note(
                    "while planning what to keep, on tensors without data and with hooks silent; other strategies need "
                    "no plan"
                )
                raise

    def _run_untracked(self, call: Any, value: Any, condition: Any) -> Any:
        """Counts what a layer before the first trained one needs while it runs."""
        with Watch() as watch:
            result = super()._run_untracked(call, value, condition)
        self.work += watch.work
        if watch.peak:
            option = Option(Decision(Choice.UNTRAINED), 0, 0, frozenset(), watch.peak, 0, keeps_input=True)
            outputs = leaves(result[0] if self._method.endswith("log_det") else result)
            self._append([option], map(self.know, leaves(value)), map(self.know, outputs))
        return result

    def _reconstruct_input(
        self, step: Step, layer: Any, method: str, links: Sequence[Any], strategy: Reconstruct
    ) -> None:
        step.rule, step.repeats_random = rule_of(layer, method)

    def _compare_output(
        self, step: Step, layer: Any, outputs: Sequence[Tensor], strategy: Reconstruct
    ) -> Sequence[Tensor]:
        return ()  # there is nothing to compare

    def _apply(self, step: Step, tensors: Sequence[Tensor], conditions: Sequence[Tensor]) -> Sequence[Tensor]:
        if step.rule is not None and step.replay.survey.random and not step.repeats_random:
            step.rule = None
        self._uses.update(id(p) for p in step.parameters)
        compiled = any(part in self._compiled for part in step.layers[0].modules())
        key = (
            self._look,
            compiled,
            step.rule is None,
            step.adjoint is None,
            _plain(step.value),
            _plain(step.condition),
            _specs(tensors),
            _specs(conditions),
        )
        if key not in self._kinds:
            self._kinds[key] = measured(step, tensors, conditions, compiled=compiled)
        kind = self._kinds[key]
        made = list(tensors)
        for output in kind.outputs:
            made.append(output.make(made))
        outputs = made[len(tensors) :]
        step.output, step.shapes = kind.form, [(t.shape, t.dtype, t.device) for t in outputs]
        self._stage(kind, tensors, outputs)
        self._conditions[len(self.stages) - 1] = {
            id(t): t.numel() * t.element_size() for t in conditions if t.requires_grad
        }
        return outputs if kind.log_det is None else [*outputs, kind.log_det.make(())]

    def _stage(self, kind: Kind, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        known = [self.know(t) for t in (*tensors, *outputs)]
        options = [
            Option(
                way.decision,
                way.work,
                way.inside,
                frozenset(known[i][1] for i in way.keeps),
                way.forward,
                way.backward,
                check=way.check,
                probes=way.probes,
                values=way.values,
                needs_output=way.decision.choice is Choice.RECONSTRUCT,
                keeps_input=way.decision.choice is Choice.STORE,
            )
            for way in kind.ways
        ]
        self._append(options, known[: len(tensors)], known[len(tensors) :])
        if kind.views and self.stages[-1].moves:
            self._allow_for_views()
        self.work += kind.work

    def _append(
        self, options: Sequence[Option], inputs: Iterable[tuple[int, int]], outputs: Iterable[tuple[int, int]]
    ) -> None:
        waiting = frozenset(self.know(link.tensor)[1] for link in self._links.values())
        moves = options[0].choice.choice is Choice.MOVE
        self.stages.append(Stage(options, tuple(inputs), tuple(outputs), moves, waiting, self._there))
        self.names.append(self._path)
        self.layers.append(self._layer)

    def _allow_for_views(self) -> None:
        """Gradients that are views keep what they are views of, and a layer may pass one on: to the layer before it."""
        computing = [i for i, stage in enumerate(self.stages) if len(stage.options) > 1]
        if len(computing) > 1 and computing[-2] not in self._allowed:  # more moves make new memory, or the same views
            self._allowed.add(computing[-2])
            sizes = [self.sizes[s] for _, s in self.stages[computing[-1]].outputs]
            self._add_to_backward(computing[-2], sum(sizes) - min(sizes))

    def _add_to_backward(self, i: int, extra: int) -> None:
        options = [replace(o, backward=o.backward + extra, check=o.check + extra) for o in self.stages[i].options]
        self.stages[i] = replace(self.stages[i], options=options)

    def allow_for_conditions(self) -> None:
        """The gradient of a condition waits from the last layer that uses it on, for those before to add theirs."""
        waiting: dict[int, int] = {}
        for i in reversed(range(len(self.stages))):
            self._add_to_backward(i, sum(waiting.values()))
            waiting |= self._conditions.get(i, {})

    def shared(self) -> int:
        """Bytes of the gradients that wait to be summed, of parameters that several layers use, and of one sum."""
        held = {id(fake): fake for fake in self._fakes.values()}
        sizes = [held[i].untyped_storage().nbytes() for i, count in self._uses.items() if count > 1]
        return sum(sizes) + max(sizes, default=0)

    def know(self, t: Tensor) -> tuple[int, int]:
        """The numbers of a tensor and of its storage."""
        storage = self._storages.of(storage_of(t), t.untyped_storage())
        if storage not in self.sizes:
            self.sizes[storage] = t.untyped_storage().nbytes()
        return self._tensors.of(id(t), t), storage

    def _fake_shape(self, t: Any) -> Any:
        """Inputs and conditions may come as shapes on the meta device, whatever device the network is on."""
        meta = isinstance(t, Tensor) and t.is_meta
        held = chain(self.net.parameters(), self.net.buffers())
        return self._fake(t, next((each.device for each in held), None) if meta else None)

    def _fake(self, t: Any, device: torch.device | None = None) -> Any:
        if not isinstance(t, Tensor):
            return t
        if id(t) not in self._fakes and t.numel() == 1 and not t.is_floating_point() and not t.is_meta:
            with unset_fake_temporarily(), torch.no_grad():
                self._fakes[id(t)] = t.clone()  # a count that is read
            self._held.append(t)
        if id(t) not in self._fakes:
            with torch.no_grad():
                fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device or t.device)
            if isinstance(t, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=False)
            self._fakes[id(t)] = fake.requires_grad_(t.requires_grad)
            self._held.append(t)
        return self._fakes[id(t)]

    @contextmanager
    def _without_data(self, layer: nn.Module) -> Generator[None]:
        """Lets a layer work on tensors without data in place of its own."""
        held: list[dict[str, Any]] = [
            each for part in layer.modules() for each in (parameters_of(part), buffers_of(part))
        ]
        true = [dict(each) for each in held]
        try:
            for each in held:
                each.update({key: self._fake(t) for key, t in each.items()})
            yield
        finally:
            for each, before in zip(held, true, strict=True):
                each.clear()
                each.update(before)


_HOOKS = {
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
}  # fmt: skip
_COMPILED = "_compiled_call_impl"


def _specs(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """All that a layer's work may depend on."""
    storages: list[int] = []
    found: list[Any] = []
    for t in tensors:
        storages.append(storage_of(t))
        where = (storages.index(storages[-1]), t.storage_offset())
        found.append((tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad, where))
    return tuple(found)


def _look(layer: nn.Module) -> tuple[Any, ...]:
    """What layers of one kind have in common: modules of the same classes, options and shapes."""
    first: dict[int, int] = {}  # of tensors and modules that occur more than once
    found: list[Any] = []
    modules = cast("Iterable[tuple[str, nn.Module]]", layer.named_modules(remove_duplicate=False))
    for name, part in modules:
        seen = first.setdefault(id(part), len(first))
        options = tuple((key, _plain(value)) for key, value in part.__dict__.items() if key not in _STATE)
        tensors: list[Any] = []
        for key, t in (*parameters_of(part).items(), *buffers_of(part).items()):
            same = first.setdefault(id(t), len(first))
            tensors.append((key, None if t is None else (tuple(t.shape), t.dtype, t.device, t.requires_grad, same)))
        found.append((name, type(part), seen, options, tuple(tensors)))
    return tuple(found)


_STATE = frozenset(nn.Module().__dict__) - {"training"} | {_COMPILED}


def _plain(value: Any) -> Any:
    """An option, to be compared: itself, or which object it is."""
    if type(value) in ProxyTypes:
        return id(value)  # to ask a dead one for anything raises
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each) for each in cast("Iterable[Any]", value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
