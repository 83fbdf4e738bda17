"""What one kind of layer allocates and computes, found by running it in each way on tensors without data."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from invertible._products import watched
from invertible._running import running
from invertible._value import detached_leaf

from ._counting import Lister, Watch, storage_of
from ._drift import Checksum, Probes
from ._node import Cell, Step, rebuilt
from ._rules import has_products
from .plan import Choice, Decision

__all__ = ["Kind", "measured"]


@dataclass(frozen=True)
class Output:
    """An output of a layer: in the memory of an input, of an output before it, or in its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    source: int | None
    """The position of the tensor that it shares memory with, outputs counted after inputs."""
    tracked: bool
    """Whether it has a gradient."""

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns a new tensor like it."""
        with torch.no_grad():
            if self.source is not None:
                made = tensors[self.source].as_strided(self.shape, self.stride, self.offset).detach()
            else:
                made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.tracked)


@dataclass(frozen=True)
class Way:
    """An option of a kind of layer: as an :class:`Option`, of positions in place of storages."""

    decision: Decision
    work: int
    inside: int
    keeps: frozenset[int]
    forward: int
    backward: int
    check: int = 0
    probes: int = 0
    values: int = 0


@dataclass(frozen=True)
class Kind:
    """What layers of one kind do with values of one kind."""

    form: Any
    outputs: Sequence[Output]
    log_det: Output | None
    ways: Sequence[Way]
    views: bool
    """Whether gradients are moved back as views, which keep all of it."""
    work: int
    """Of a forward pass."""


def measured(step: Step, tensors: Sequence[Tensor], conditions: Sequence[Tensor], *, compiled: bool) -> Kind:
    """What a layer of a new kind allocates and computes, by running it in each way."""
    step = replace(step, in_cells=[None] * len(tensors))
    value, condition = rebuilt(step.value, iter(tensors)), rebuilt(step.condition, iter(conditions))
    with Watch() as watch, torch.no_grad(), running(None):
        lister = Lister(watch)
        with watched(lister):
            outputs = step.accept(step.run(value, condition))
        forward, work = watch.peak, watch.work
    usable = not compiled and not lister.written() and has_products(cast("Any", step.layers[0]))
    products = lister.found if usable else []
    del lister
    tracked = any(t.requires_grad for t in (*tensors, *conditions)) or bool(step.parameters)
    described = _described(outputs, tensors, tracked=tracked)
    count = len(step.shapes)
    needs = [*(t.requires_grad for t in (*tensors, *conditions)), *(True for _ in step.parameters)]
    del outputs
    views = False
    if step.adjoint is not None:
        _, backward, views = _replayed(step, tensors, conditions, needs)
        ways = [Way(Decision(Choice.MOVE), 0, 0, frozenset(), forward, backward, values=backward)]
    else:
        ways = [_stored(step, tensors, conditions)]
        again, backward, _ = _replayed(replace(step, rule=None), tensors, conditions, needs)
        keeps = frozenset(range(len(tensors)))
        ways.append(Way(Decision(Choice.RECOMPUTE), again, 0, keeps, forward, backward))
        if step.rule is not None:
            again, backward, _ = _replayed(step, tensors, conditions, needs)
            plain = Way(Decision(Choice.RECONSTRUCT), again, 0, frozenset(), forward, backward)
            ways += _with_products(_compared(plain, step, tensors), products)
    log_det = described[count] if len(described) > count else None
    return Kind(step.output, described[:count], log_det, ways, views, work)


def _stored(step: Step, tensors: Sequence[Tensor], conditions: Sequence[Tensor]) -> Way:
    """Plain autograd."""
    saved: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        saved.add(storage_of(t))
        return t.detach()

    given = [detached_leaf(t) if t.requires_grad else t.detach() for t in (*tensors, *conditions)]
    values = iter(given)
    value, condition = rebuilt(step.value, values), rebuilt(step.condition, values)
    with Watch() as watch, torch.enable_grad(), running(None):
        with saved_tensors_hooks(pack, lambda t: t):
            outputs = step.accept(step.run(value, condition))
        forward = watch.peak
        kept = [i for i, t in enumerate([*tensors, *outputs[: len(step.shapes)]]) if storage_of(t) in saved]
        inside = watch.now - sum(watch.sizes.get(s, 0) for s in {storage_of(t) for t in outputs})
        trained = [i for i, t in enumerate(outputs) if t.requires_grad]
        edges = [get_gradient_edge(outputs[i]) for i in trained]
        # Of all outputs: a gradient may be a view of memory in which that of one without gradient is, too.
        grads = [torch.empty_like(t, requires_grad=False) for t in outputs]
        wanted = [*(t for t in given if t.requires_grad), *step.parameters]
        del outputs
        # A parameter's gradient is added to what is there and freed, before the next one is made.
        with _gradients_there(step.parameters) as there:
            watch.forget_peak()
            if edges:
                torch.autograd.backward(edges, [grads[i] for i in trained], inputs=wanted)
        backward = watch.peak - there
    return Way(Decision(Choice.STORE), 0, inside, frozenset(kept), forward, backward)


@contextmanager
def _gradients_there(parameters: Sequence[Tensor]) -> Generator[int]:
    """Gives parameters gradients to be added to, and yields their bytes."""
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = torch.empty_like(p, requires_grad=False)
        yield sum(p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None)
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def _replayed(
    step: Step, tensors: Sequence[Tensor], conditions: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[int, int, bool]:
    """The work that a layer does again in its backward pass, the most bytes that it allocates; if it returns views."""
    work = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal work
            before = watch.work
            result = function(*arguments)
            work += watch.work - before
            return result

        return run

    with Watch() as watch, torch.no_grad():
        saved = [t.detach() for t in conditions]
        grads: list[Any] = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in step.shapes]
        if step.log_det:
            grads.append(None)
        if step.rule is not None:
            cells = [Cell() for _ in step.shapes]
            for cell, (shape, dtype, device) in zip(cells, step.shapes, strict=True):
                cell.fill(torch.empty(shape, dtype=dtype, device=device))
            step = replace(step, rule=counted(step.rule), out_cells=cells)
        elif step.adjoint is None:
            saved += [t.detach() for t in tensors]
            step = replace(step, run=counted(step.run))
        given = {storage_of(g) for g in grads if g is not None}
        found = step.backward(saved, needs, grads)
        views = any(g is not None and storage_of(g) in given for g in found)
    return work, watch.peak, views


def _compared(way: Way, step: Step, tensors: Sequence[Tensor]) -> Way:
    """With the bytes of what inputs are compared with, and the most while they are, with all gradients there."""
    with Watch() as watch, torch.no_grad():
        gradients = (*(t for t in tensors if t.requires_grad), *step.parameters)
        there = [torch.empty_like(t) for t in (*tensors, *gradients)]
        there += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in step.shapes]
        before = watch.now
        probes = (Probes if cast("Any", step.layers[0]).grid is None else Checksum)(there[: len(tensors)])
        probes.drift(there[: len(tensors)])
        return replace(way, check=watch.peak, probes=watch.now - before)


def _with_products(way: Way, products: Sequence[tuple[int, int]]) -> list[Way]:
    """Nothing kept inside the function; and the products that cost most work per byte."""
    found = [way]
    order = sorted(range(len(products)), key=lambda i: (-products[i][0] / max(products[i][1], 1), i))
    for count in range(1, len(order) + 1):
        kept = tuple(sorted(order[:count]))
        inside = sum(products[i][1] for i in kept)
        more = replace(
            way,
            decision=Decision(Choice.RECONSTRUCT, kept),
            work=way.work - sum(products[i][0] for i in kept),
            inside=inside,
            forward=way.forward + inside,
            backward=way.backward + inside,  # the products are not always among what is there anyway
            check=way.check + inside,
        )
        found.append(more)
    return found


def _described(outputs: Sequence[Tensor], tensors: Sequence[Tensor], *, tracked: bool) -> list[Output]:
    found: list[Output] = []
    storages = [storage_of(t) for t in tensors]
    for t in outputs:
        source = storages.index(storage_of(t)) if storage_of(t) in storages else None
        has_grad = tracked and (t.is_floating_point() or t.is_complex())
        found.append(Output(tuple(t.shape), t.stride(), int(t.storage_offset()), t.dtype, t.device, source, has_grad))
        storages.append(storage_of(t))
    return found
