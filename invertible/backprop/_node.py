"""One layer in autograd's graph, without what autograd would keep."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from invertible import _check
from invertible._products import Keeper, Player, watched
from invertible._value import alike, describe, detached_leaf, graph_leaves, leaves

from ._drift import Checksum, Probes, during_backward
from ._replay import Replay
from ._torch import hooks_of, parametrizations_cached

__all__ = ["Cell", "Node", "Rule", "Seed", "Step", "form_of", "rebuilt"]

_TENSOR = object()
"""Stands for a tensor in the form of a value."""


class Cell:
    """One tensor between two layers: in backward the layer behind fills it for the one before.

    It holds detached tensors only: one with a graph would hold the cell itself, through its node.
    """

    __slots__ = ("_kept", "_tensor", "_version")

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._kept = False
        self._version = 0

    def fill(self, tensor: Tensor) -> None:
        """Puts in the reconstructed tensor, unless the true one is kept."""
        if not self._kept:
            self._tensor = tensor.detach()

    def keep(self, tensor: Tensor) -> None:
        """Holds the true tensor from now on: no layer behind will reconstruct it."""
        self._tensor, self._kept, self._version = tensor.detach(), True, tensor._version

    def take(self, maker: "Step") -> Tensor:
        """Returns the tensor and, if it was reconstructed, forgets it."""
        tensor = self._tensor
        if tensor is None:
            raise RuntimeError(
                f"{maker.name}: its output can't be reconstructed, because the loss depends on a value inside the "
                "network and not on the network's output. Use the output too, or Store()."
            )
        if not self._kept:
            self._tensor = None
            return tensor
        if tensor._version != self._version:
            raise RuntimeError(f"{maker.name}: its output was changed in place between forward and backward.")
        during_backward().cells.append(self)
        return tensor

    def clear(self, *, final: bool) -> None:
        """Forgets a tensor that nobody took; one that is kept, if there will be no other backward pass."""
        if final or not self._kept:
            self._tensor = None


def fill(cells: Sequence[Cell | None], tensors: Sequence[Tensor]) -> None:
    """Puts tensors into cells, to be forgotten at the end of the backward pass if nobody takes them."""
    filled = [(cell, tensor) for cell, tensor in zip(cells, tensors, strict=True) if cell is not None]
    for cell, tensor in filled:
        cell.fill(tensor)
    if filled:
        during_backward().cells += [cell for cell, _ in filled]


def form_of(value: Any) -> Any:
    """The nesting of a value; what is no tensor stays as it is."""
    if isinstance(value, tuple):
        return alike(value, (form_of(part) for part in cast("tuple[Any, ...]", value)))
    return _TENSOR if isinstance(value, Tensor) else value


def rebuilt(form: Any, tensors: Iterator[Any]) -> Any:
    """A value of this form from these tensors."""
    if isinstance(form, tuple):
        return alike(form, (rebuilt(part, tensors) for part in cast("tuple[Any, ...]", form)))
    return next(tensors) if form is _TENSOR else form


Call = Callable[[Any, Any], Any]
"""A direction of a layer, of value and condition."""

Derivation = tuple[Any, Sequence[Tensor], Sequence[Tensor | None]]
"""A layer's input; tensors with graphs that lead to it and to the parameters; their cotangents."""

Rule = Callable[["Step", Any, Any, Tensor | None, Any], Derivation]
"""Makes it from the step, the output, its cotangents, that of the log-determinant, and the condition."""


@dataclass
class Step:
    """One run of one layer, or of a segment: what its backward needs, without any activation."""

    layers: Sequence[nn.Module]
    run: Call
    """The layer's method, of value and condition."""
    log_det: bool
    """Whether the method returns one."""
    value: Any
    """The form of the input."""
    condition: Any
    """The form of the condition."""
    parameters: Sequence[nn.Parameter]
    """Those that are trained."""
    in_cells: Sequence[Cell | None]
    """Where the layers before await each input in backward."""
    replay: Replay
    rule: Rule | None = None
    """How input and gradients come from the output; ``None``: the input is kept."""
    repeats_random: bool = False
    """Whether the rule draws random numbers in the order of the first run."""
    adjoint: Call | None = None
    """For a layer that only moves elements: the other direction, which moves values and gradients back."""
    probes: Probes | Checksum | None = None
    probed: Sequence[int] = ()
    """Which inputs the probes are of."""
    report: Callable[[Tensor], None] | None = None
    again: Callable[[Sequence[Tensor]], None] | None = None
    """Takes what was returned when the layer was run again on an input that was kept, to be compared."""
    out_cells: Sequence[Cell] = ()
    keeper: Keeper | None = None
    """Keeps some results inside a coupling's function, for the replay not to compute them again."""
    output: Any = None
    """The form of the output, without the log-determinant."""
    shapes: Sequence[tuple[torch.Size, torch.dtype, torch.device]] = ()

    def __post_init__(self) -> None:
        # Frozen ones, too: the replay reads them. To cast one is not counted as a write.
        self._versions = [(p, p._version, p.dtype) for p in self.replay.survey.held]
        self._trained = [p.requires_grad for p in self.parameters]

    @property
    def name(self) -> str:
        """What runs, for messages."""
        first, last = self.layers[0], self.layers[-1]
        return _check.name(first) if first is last else f"{_check.name(first)} to {_check.name(last)}"

    def accept(self, result: Any) -> list[Tensor]:
        """The tensors of what the layer returned."""
        value, log_det = result if self.log_det else (result, None)
        tensors = list(leaves(value))
        for tensor in tensors:
            if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{self.name}: a layer must return tensors, got {describe(value)}.")
        self.output = form_of(value)
        self.shapes = [(t.shape, t.dtype, t.device) for t in tensors]
        return tensors if log_det is None else [*tensors, log_det]

    def backward(self, saved: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Any]:
        """Gradients of inputs, conditions and parameters; fills the cells of the inputs."""
        self._refuse_changed_parameters()
        inputs = len(self.in_cells)
        before = len(needs) - inputs - len(self.parameters)
        conditions = [detached_leaf(t) for t in saved[:before]]
        condition = rebuilt(self.condition, iter(conditions))
        grad_value = rebuilt(self.output, iter(grads))
        if self.adjoint is not None:
            return [*self._move_back(self.adjoint, grads, condition), *(None for _ in needs[inputs:])]
        if self.rule is None:
            value = rebuilt(self.value, (detached_leaf(t) for t in saved[len(conditions) :]))
            with self._trained_as_then(), self.replay.again(), torch.enable_grad():
                result = self.run(value, condition)
            tensors, cotangents = self.accept(result), grads
            if self.again is not None:
                self.again([t.detach() for t in tensors[: len(self.shapes)]])
        else:
            output = rebuilt(self.output, (cell.take(self) for cell in self.out_cells))
            given = nullcontext() if self.keeper is None else watched(Player(self.keeper, saved[before:]))
            with self._trained_as_then(), given:
                value, tensors, cotangents = self.rule(
                    self, output, grad_value, grads[-1] if self.log_det else None, condition
                )
            del output
        sources = [*leaves(value), *conditions, *self.parameters]
        gradients = self._differentiate(tensors, cotangents, sources, needs)
        del tensors, cotangents, sources
        self._hand_on(list(leaves(value)))
        return gradients

    def _move_back(self, adjoint: Call, grads: Sequence[Tensor | None], condition: Any) -> Sequence[Tensor | None]:
        with self.replay.again(random=False):
            if any(cell is not None for cell in self.in_cells):
                output = rebuilt(self.output, (cell.take(self) for cell in self.out_cells))
                self._hand_on(list(leaves(adjoint(output, condition))))
            if all(g is None for g in grads[: len(self.shapes)]):
                return [None] * len(self.in_cells)
            filled = [
                torch.zeros(shape, dtype=dtype, device=device) if g is None else g
                for g, (shape, dtype, device) in zip(grads, self.shapes, strict=False)  # without the log-determinant's
            ]
            return list(leaves(adjoint(rebuilt(self.output, iter(filled)), condition)))

    def _hand_on(self, inputs: list[Tensor]) -> None:
        """Gives the inputs to the layers before, and says how far off they are."""
        fill(self.in_cells, inputs)
        if self.probes is not None and self.report is not None:
            self.report(self.probes.drift([inputs[i].detach() for i in self.probed]))

    def _differentiate(
        self,
        tensors: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        sources: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        # A source that is itself among the tensors gets its cotangent as it is; autograd has the rest.
        direct: dict[int, Tensor] = {}
        own = {id(source) for source in sources}
        outputs: list[Tensor] = []
        grads: list[Tensor] = []
        for tensor, cotangent in zip(tensors, cotangents, strict=True):
            if cotangent is None or not tensor.requires_grad:
                continue
            if id(tensor) in own:
                before = direct.get(id(tensor))
                direct[id(tensor)] = cotangent if before is None else before + cotangent
            else:
                outputs.append(tensor)
                grads.append(cotangent)
        wanted = [source for source, need in zip(sources, needs, strict=True) if need]
        found: Iterator[Tensor | None] = iter([None] * len(wanted))
        if outputs and wanted:
            self._refuse_strangers(outputs, sources)
            with self._trained_as_then(), _without_hooks(self.parameters):
                found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return [
            _sum(next(found), direct.get(id(source))) if need else None
            for source, need in zip(sources, needs, strict=True)
        ]

    def _refuse_changed_parameters(self) -> None:
        held = self.replay.survey.held
        for parameter, version, dtype in self._versions:
            where, key = held[parameter]
            if where.get(key) is not parameter:
                raise RuntimeError(
                    f"{self.name}: its parameters are no longer those of the forward pass (functional_call?), so that "
                    "the layer cannot be run again. Use Store() here."
                )
            if parameter.dtype != dtype:
                raise RuntimeError(
                    f"{self.name}: a parameter was cast from {dtype} to {parameter.dtype} between forward and "
                    "backward, by net.half() or net.to()? Call backward first."
                )
            if parameter._version != version:
                raise RuntimeError(
                    f"{self.name}: a parameter was changed in place between forward and backward, by an optimizer's "
                    "step? Call backward first."
                )
        if parametrizations_cached():
            raise RuntimeError(
                f"{self.name}: cannot be run again while parametrizations are cached. Put the forward pass, too, into "
                "torch.nn.utils.parametrize.cached(), or neither."
            )

    def _refuse_strangers(self, tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """A tensor that is trained but no parameter would get no gradient, without a word."""
        known = {id(t) for t in (*sources, *self.replay.survey.held)}
        stranger = next((t for t in graph_leaves(tensors) if id(t) not in known), None)
        if stranger is not None:
            raise RuntimeError(
                f"{self.name}: depends on a {describe(stranger)[2:]} that requires gradients and is none of its "
                "parameters, inputs or conditions, so that it would get no gradient. Make it an nn.Parameter of the "
                "layer or pass it as the condition; or use Store()."
            )

    @contextmanager
    def _trained_as_then(self) -> Generator[None]:
        """Sets ``requires_grad`` of the parameters to what it was in forward."""
        changed = [p for p, trained in zip(self.parameters, self._trained, strict=True) if p.requires_grad != trained]
        for p in changed:
            p.requires_grad_(not p.requires_grad)
        try:
            yield
        finally:
            for p in changed:
                p.requires_grad_(not p.requires_grad)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class Node(torch.autograd.Function):
    """A step in autograd's graph. Its inputs: those of the layer, the condition, the parameters."""

    @staticmethod
    def forward(ctx: Any, step: Step, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        given = tensors[: len(tensors) - len(step.parameters)]
        inputs, conditions = given[: len(step.in_cells)], given[len(step.in_cells) :]
        versions = [t._version for t in given]
        value, condition = rebuilt(step.value, iter(inputs)), rebuilt(step.condition, iter(conditions))
        with nullcontext() if step.keeper is None else watched(step.keeper):
            result = step.replay.record(lambda: step.run(value, condition))
        if versions != [t._version for t in given]:
            raise ValueError(f"{step.name}: a layer must not write to its input, but it did, and the input is lost.")
        outputs = step.accept(result)
        if step.rule is not None and step.replay.drew and not step.repeats_random:
            step.rule, step.probes, step.keeper = None, None, None  # its inverse may draw in another order
        # What is returned as it was given, or a part of it, would count as a view: in-place changes and FSDP complain.
        outputs = [t.detach() if t._is_view() or any(t is each for each in given) else t for t in outputs]
        ctx.step = step
        kept = inputs if step.rule is None and step.adjoint is None else step.keeper.kept() if step.keeper else ()
        ctx.save_for_backward(*conditions, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            gradients = ctx.step.backward(ctx.saved_tensors, ctx.needs_input_grad[1:], grads)
        return (None, *(_once(gradients, ctx.step.name) if torch.is_grad_enabled() else gradients))


class Seed(torch.autograd.Function):
    """The identity at the end of a chain: keeps its outputs, from which the layers before are reconstructed.

    ``save_for_backward`` makes in-place changes raise, and lets hooks on saved tensors, ``retain_graph`` and the
    freeing of memory work as for any operation.
    """

    @staticmethod
    def forward(ctx: Any, cells: Sequence[Cell | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.cells = [cell for cell in cells if cell is not None]
        ctx.save_for_backward(*(t for cell, t in zip(cells, tensors, strict=True) if cell is not None))
        return tuple(t.detach() for t in tensors)  # as it is, it would count as a view

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        fill(ctx.cells, ctx.saved_tensors)
        return (None, *grads)


class _Once(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name}: second derivatives need the activations, which were not kept. Use backprop=Store() for them."
        )


def _once(gradients: Sequence[Tensor | None], name: str) -> list[Tensor | None]:
    """Makes gradients that can't be differentiated again."""
    present = [detached_leaf(g) for g in gradients if g is not None]
    refusing = iter(_Once.apply(name, *present) if present else ())
    return [None if g is None else next(refusing) for g in gradients]


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Generator[None]:
    """Silences hooks on the parameters' gradients: autograd runs them when the gradients arrive, once."""
    hooks = [(h, dict(h)) for h in map(hooks_of, parameters) if h]
    for present, _ in hooks:
        present.clear()
    try:
        yield
    finally:
        for present, before in hooks:
            present.update(before)
