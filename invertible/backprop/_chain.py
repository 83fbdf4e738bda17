"""Runs the layers of a network by its strategy."""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from invertible import _check
from invertible._buffers import buffers_moving
from invertible._products import Keeper
from invertible._range import is_unread
from invertible._running import engine_of, running
from invertible._tracing import exporting
from invertible._value import leaves
from invertible.module import InvertibleModule

from ._drift import Checksum, DriftWarning, Probes, report
from ._node import Cell, Node, Seed, Step, form_of, rebuilt
from ._replay import Replay, Survey
from ._rules import has_products, opposite, rule_of
from ._torch import tape_serves
from .plan import Choice, Decision
from .strategies import Budget, Recompute, Reconstruct, Store, Strategy

__all__ = ["Chain", "chain_of", "refuse_scripted", "run", "run_chain"]

Layer = InvertibleModule[Any, Any]
Call = Callable[[Any, Any], Any]


def run(
    net: Layer, strategy: Strategy | None, walk: Callable[[Any], Any], x: Any, *, method: str, condition: Any = None
) -> Any:
    """Returns ``walk(x)``, which calls the layers of ``net``, with gradients by the strategy.

    Without a strategy of its own the network takes that of the chain in which it runs, if any.
    """
    outer = chain_of(net)
    if strategy is None or (outer is not None and outer.strategy == strategy):
        return walk(x)
    if outer is not None:
        outer.refuse_inner(net, strategy)
    if torch.compiler.is_dynamo_compiling() and not isinstance(strategy, Store):
        if exporting() or not torch.is_grad_enabled():
            return walk(x)
        from ._uncompiled import run_uncompiled  # imports the compiler, which is slow

        return run_uncompiled(net, strategy, walk, x, method, condition)
    if isinstance(strategy, Store) or not tape_serves() or is_unread():
        with running(None) if outer is not None else nullcontext():
            return walk(x)
    return run_chain(net, strategy, walk, x, method, condition)


def strategies_apply() -> bool:
    """Whether networks run by their strategies here; elsewhere, as without gradients, plain autograd is right.

    For what prepares a run, as a network does that divides a :class:`~invertible.Budget` among several chains.

    Example:
        >>> with torch.no_grad():
        ...     strategies_apply()
        False
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.is_grad_enabled() and not exporting()
    return tape_serves() and not is_unread()


def run_chain(net: Layer, strategy: Strategy, walk: Callable[[Any], Any], x: Any, method: str, condition: Any) -> Any:
    """Returns ``walk(x)`` by a chain of its own."""
    chain = Chain(net, strategy)
    if isinstance(strategy, Budget):
        from ._budget import decisions  # imports what counts, which is slow

        chain.decisions = decisions(net, strategy, walk, x, method, condition)
    with running(chain, net):
        result = walk(x)
    if method.endswith("log_det"):
        return chain.finish(result[0]), result[1]
    return chain.finish(result)


def chain_of(layer: Layer) -> "Chain | None":
    """The chain in which a layer runs now; ``None`` where plain autograd serves it."""
    return cast("Chain | None", engine_of(layer))


@dataclass
class _Link:
    """A tensor that a layer has returned and none has taken yet."""

    tensor: Tensor
    version: int
    cell: Cell | None
    """Where its maker awaits it in backward; ``None`` if it needs it not."""
    fresh: bool
    """Whether the first layer that computes something from it keeps it. So it is for what enters a chain, and for what
    an injective layer made: exact zeros would come back as noise, which batch norm amplifies and ReLU cuts in half.
    On a grid it does not; but what leaves a grid is kept, for the way back to be exact there."""
    on_grid: bool = False
    """Whether a layer on a grid has made it."""
    sample: Tensor | None = None
    """The elements of it that its maker compares, for the layer behind not to keep them once more."""


class Chain:
    """Layers that run one after another by one strategy, from one entry to one end."""

    def __init__(self, net: Layer, strategy: Strategy) -> None:
        self.net = net
        self.strategy = strategy
        """What a container inside must have, to be part of the chain."""
        self.every = strategy.every if isinstance(strategy, Recompute) else 1
        self.decisions: Sequence[tuple[Layer, Decision]] = ()
        """Those of a plan, for the layers in the order of computation."""
        self._decided = 0
        reconstruct = strategy.reconstruct if isinstance(strategy, Budget) else strategy
        self._reconstruct = reconstruct if isinstance(reconstruct, Reconstruct) else None
        self._links: dict[int, _Link] = {}
        self._count = 0
        self._warned = False

    def step(self, layer: Any, method: str, function: Callable[..., Any], value: Any, condition: Any) -> Any:
        """Runs one layer."""

        def call(value: Any, condition: Any) -> Any:
            return function(layer, value, condition=condition)

        return self._run([layer], method, call, value, condition, called=layer)

    def segment(self, layers: Sequence[Layer], method: str, call: Call, value: Any, condition: Any) -> Any:
        """Runs several layers as one, whose input is kept."""
        return self._run(layers, method, call, value, condition)

    def refuse_inner(self, net: Layer, strategy: Strategy) -> None:
        """Raises, if a container inside must not have a strategy of its own."""
        if isinstance(self.strategy, Budget):
            rule = "a container inside must take the strategy of the one around it (backprop=None)"
            raise ValueError(f"Budget: {rule}, got {strategy}.")  # noqa: TRY004 (a value that does not fit here)

    def finish(self, value: Any) -> Any:
        """Keeps the output, and what no layer has taken: a hook or another strategy has put something in its place."""
        tensors = list(leaves(value))
        tensors = _sealed(tensors, [self._take(t) for t in tensors])
        for link in self._links.values():
            if link.cell is not None:
                _refuse_changed(link)
                link.cell.keep(link.tensor)
        self._links.clear()
        return rebuilt(form_of(value), iter(tensors))

    def _run(
        self, layers: Sequence[Any], method: str, call: Call, value: Any, condition: Any, *, called: Layer | None = None
    ) -> Any:
        tensors: list[Any] = list(leaves(value))
        given: list[Any] = list(leaves(condition))
        conditions: list[Tensor] = [t for t in given if isinstance(t, Tensor)]
        survey = Survey(layers)
        if not all(isinstance(t, Tensor) for t in tensors) or any(is_lazy(p) for p in survey.held):
            with running(None):  # the layer's own error, or its very first run: plain autograd is right for it
                return call(value, condition)
        trained = [p for p in survey.held if p.requires_grad]
        links = [self._take(t) for t in tensors]
        first = layers[0]
        moves = len(layers) == 1 and first.isometric and (first.bijective or method.startswith("forward"))
        free = moves and not trained and not any(t.requires_grad for t in conditions)
        fresh = any(link.fresh or (link.on_grid and first.grid is None) for link in links)
        fresh_after = (fresh and free) or (method.startswith("forward") and not all(each.bijective for each in layers))
        if not any(t.requires_grad for t in (*tensors, *conditions, *trained)):
            for link in links:
                if link.cell is not None:  # a stream that has no gradient, as integers: nobody will reconstruct it
                    link.cell.keep(link.tensor)
            result = self._run_untracked(call, value, condition)
            _refuse_without_data(first, result, (*tensors, *conditions, *survey.held))
            self._remember(first, leaves(result[0] if method.endswith("log_det") else result), fresh_after)
            return result
        _refuse_inference(self.net, (*tensors, *conditions))
        decision = None if free else self._decision(first)
        if decision is not None and decision.choice is Choice.STORE:
            with running(None):
                result = call(rebuilt(form_of(value), iter(_sealed(tensors, links))), condition)
            _refuse_without_data(first, result, (*tensors, *conditions, *survey.held))
            self._remember(first, leaves(result[0] if method.endswith("log_det") else result), fresh_after)
            return result
        refuse_scripted(self.net, (part for part, *_ in survey.modes))
        _refuse_late_gathering(self.net, survey, called)
        step = Step(
            layers=layers,
            run=call,
            log_det=method.endswith("log_det"),
            value=form_of(value),
            condition=form_of(condition),
            parameters=trained,
            in_cells=[link.cell for link in links],
            replay=Replay(survey, tensors, moving=buffers_moving(default=method.startswith("forward"))),
        )
        if free:
            step.adjoint = opposite(first, method)
        elif self._reconstruct is not None and (decision is None or decision.choice is Choice.RECONSTRUCT):
            self._count += 1
            if not (self._is_anchor() or first._keeps_input(method)):
                if self._count > 1:
                    self._warn_of_narrow(first, tensors)
                if not fresh or first.grid is not None:  # on a grid zeros come back as zeros
                    self._reconstruct_input(step, first, method, links, self._reconstruct)
        if decision is not None and decision.products and step.rule is not None and has_products(first):
            step.keeper = Keeper(frozenset(decision.products))
        outputs = self._apply(step, tensors, conditions)
        _refuse_without_data(first, tuple(outputs), (*tensors, *conditions, *survey.held))
        count = len(step.shapes)
        samples: Sequence[Tensor] = ()
        if step.rule is None and not free and decision is None and self._reconstruct is not None:
            samples = self._compare_output(step, first, outputs[:count], self._reconstruct)
        if step.rule is not None or (free and any(cell is not None for cell in step.in_cells)):
            step.out_cells = [Cell() for _ in range(count)]
        self._remember(first, outputs[:count], fresh_after, step.out_cells, samples)
        result = rebuilt(step.output, iter(outputs))
        return (result, outputs[count]) if step.log_det else result

    def _run_untracked(self, call: Call, value: Any, condition: Any) -> Any:
        with running(None):
            return call(value, condition)

    def _decision(self, layer: Layer) -> Decision | None:
        """The next one for this layer: others may have had nothing to train, after all."""
        for i in range(self._decided, len(self.decisions)):
            if self.decisions[i][0] is layer:
                self._decided = i + 1
                return self.decisions[i][1]
        return None

    def _apply(self, step: Step, tensors: Sequence[Tensor], conditions: Sequence[Tensor]) -> Sequence[Tensor]:
        return Node.apply(step, *tensors, *conditions, *step.parameters)

    def _is_anchor(self) -> bool:
        every = self._reconstruct.anchor_every if self._reconstruct is not None else None
        return every is not None and self._count % every == 0

    def _reconstruct_input(
        self, step: Step, layer: Layer, method: str, links: Sequence[_Link], strategy: Reconstruct
    ) -> None:
        step.rule, step.repeats_random = rule_of(layer, method)
        step.probed = [i for i, cell in enumerate(step.in_cells) if cell is None or strategy.locate]
        if step.probed:
            exact = layer.grid is not None
            tensors, samples = [links[i].tensor for i in step.probed], [links[i].sample for i in step.probed]
            step.probes = Checksum(tensors) if exact else Probes(tensors, samples)
            step.report = functools.partial(report, self.net, strategy, layer, self._count, exact=exact)

    def _compare_output(
        self, step: Step, layer: Layer, outputs: Sequence[Tensor], strategy: Reconstruct
    ) -> Sequence[Tensor]:
        """Of a layer whose input is kept, as no input behind it would tell that its function does not repeat itself."""
        exact = layer.grid is not None
        place = functools.partial(report, self.net, strategy, layer, self._count, exact=exact, again=True)
        detached = [t.detach() for t in outputs]
        if exact:
            checksum = Checksum(detached)
            step.again = lambda found: place(checksum.drift(found))
            return ()
        probes = Probes(detached)
        step.again = lambda found: place(probes.repeated(found))
        return probes.true

    def _warn_of_narrow(self, layer: Layer, tensors: Sequence[Tensor]) -> None:
        narrow = next((t.dtype for t in tensors if t.dtype in {torch.float16, torch.bfloat16}), None)
        if narrow is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.net).__name__}: values of {narrow} enter {_check.name(layer)}, and what is computed in 16 "
                "bits can't be undone: gradients will be off, or everything is kept. Keep the network in float32 and "
                "use torch.autocast; under fully_shard, a MixedPrecisionPolicy without param_dtype.",
                DriftWarning,
                stacklevel=2,
            )

    def _take(self, tensor: Tensor) -> _Link:
        """What is known of a tensor that enters a layer; a tensor from elsewhere is an entry of the chain."""
        link = self._links.pop(id(tensor), None) or self._take_alias(tensor)
        if link is None:
            return _Link(tensor, 0, None, fresh=True)
        _refuse_changed(link)
        return link

    def _take_alias(self, tensor: Tensor) -> _Link | None:
        """Finds a tensor again that autograd's own identities have wrapped, as full backward hooks do."""
        if tensor.grad_fn is None or not self._links:
            return None
        before = {edge[0] for edge in tensor.grad_fn.next_functions}
        for key, link in self._links.items():
            same = link.tensor.shape == tensor.shape and link.tensor.stride() == tensor.stride()
            if same and link.tensor.grad_fn in before and _place(link.tensor) == _place(tensor):
                return self._links.pop(key)
        return None

    def _remember(
        self,
        layer: Layer,
        tensors: Iterable[Tensor],
        fresh: bool,
        cells: Sequence[Cell] = (),
        samples: Sequence[Tensor] = (),
    ) -> None:
        if self._reconstruct is None:
            return
        for i, tensor in enumerate(tensors):
            cell = cells[i] if cells else None
            on_grid, sample = layer.grid is not None, samples[i] if samples else None
            self._links[id(tensor)] = _Link(tensor, _version(tensor), cell, fresh, on_grid, sample)


def _version(tensor: Tensor) -> int:
    """Counts the writes to a tensor; inference tensors don't count theirs, and nothing is trained of them."""
    return 0 if tensor.is_inference() else tensor._version


def _refuse_changed(link: _Link) -> None:
    if _version(link.tensor) != link.version:
        raise RuntimeError("A value between two layers was changed in place, by a hook? Return a new one instead.")


def _refuse_inference(net: Layer, given: Iterable[Tensor]) -> None:
    """What autograd says when it is to save such a tensor, before anything has run."""
    if any(t.is_inference() for t in given):
        raise RuntimeError(
            f"{type(net).__name__}: inputs and conditions that are trained on must not be made under "
            "torch.inference_mode. Make them under torch.no_grad, or hand over clones: x.clone()."
        )


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies, with data or without."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())  # pyright: ignore[reportPrivateUsage]


def _sealed(tensors: Sequence[Tensor], links: Sequence[_Link]) -> list[Tensor]:
    """The same tensors, kept for the layers before that await them."""
    made = list(tensors)
    trained = [i for i, t in enumerate(tensors) if t.requires_grad]
    if any(links[i].cell is not None for i in trained):  # one node for all, so that it runs whichever is used
        sealed = Seed.apply([links[i].cell for i in trained], *(tensors[i] for i in trained))
        for i, tensor in zip(trained, sealed, strict=True):
            made[i] = tensor
    for i, link in enumerate(links):
        if i not in trained and link.cell is not None:
            link.cell.keep(link.tensor)
    return made


def refuse_scripted(net: Layer, parts: Iterable[nn.Module]) -> None:
    """Modes and buffers of TorchScript can't be set for a replay, as those of other modules can."""
    scripted = next((part for part in parts if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise TypeError(
            f"{type(net).__name__}: a function must not be TorchScript, which can't be run again as it ran, got "
            f"{type(scripted).__name__}. Take the module as it was and net.compile_functions(), or Store()."
        )


def _refuse_late_gathering(net: Layer, survey: Survey, called: Layer | None) -> None:
    """Parameters must be there when a layer is called, for autograd and for the replay."""
    late = next((part for part in survey.sharded if part is not called), None)
    if late is not None:
        modules = cast("Iterable[tuple[str, Any]]", net.named_modules())
        key = next((key for key, part in modules if part is late), "?")
        raise ValueError(
            f"{_check.name(late)}: fully_shard must be applied to a layer of the network or to a container, got "
            f"{key!r}, a part that is run again as part of something larger, so that its parameters can't be gathered "
            "in time. Inside a coupling's function or a segment of Recompute(every=...) only Store() can train it."
        )


def _refuse_without_data(layer: Layer, result: Any, given: Iterable[Tensor]) -> None:
    """Raises, if what a layer has made has no data though all that it was given has some: training would be void."""
    made = any(isinstance(t, FakeTensor) for t in leaves(result))
    if made and not any(isinstance(t, FakeTensor) for t in given):
        raise RuntimeError(
            f"{_check.name(layer)}: a function must not keep tensors that it made while planning, as these have no "
            "data, but the output has none. Clear its cache (functools.lru_cache, a global) after net.plan, or don't "
            "cache."
        )
