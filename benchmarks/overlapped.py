"""Couplings of which one is reconstructed while the gradients of the one after it are computed, on two CUDA streams.

An experiment beside :class:`benchmarks.contenders.Floor`, whose numbers it has to the bit: the same code, issued in
another order. It is PaReprop (Zhu and Mangalam, 2023, https://arxiv.org/abs/2306.09342), whose published code
(https://github.com/karttikeya/minREV, ``fast_rev.py``) lets the host wait for events; here only streams wait.

Why it is right, stream by stream. There are two lanes, and block i has lane i mod 2.

1. *One block, one lane.* Autograd runs an operation's backward on the stream of its forward, so that a block's
   gradients run where it was evaluated again. Two streams of which one only evaluates and the other only
   differentiates can't overlap anything.
2. *Order.* Block i is evaluated again once ``rebuilt[i + 1]`` has happened on the other lane: then both of its outputs
   are there. Its gradients wait for ``turned[i + 1]``. What its own lane did before, that is block i + 2, comes first
   by itself. Before all, both lanes wait for the caller's stream, and in the end it waits for both.
3. *Memory.* The allocator gives a freed tensor's memory to the next one on the stream that made it, and knows nothing
   of other streams. So each tensor is lent (``record_stream``) to every lane, or to the caller, that uses it and did
   not make it: a block's outputs, the gradients that come in, and those of parameters. What is inside a block never
   leaves its lane. Parameters and buffers are nobody's to free.
4. *What there is one of.* A parameter of two blocks gets its gradients in the order of ``turned``. A buffer is written
   when its block is evaluated, in the order of ``rebuilt``. Random numbers are not drawn again here, as in ``Floor``.

Two blocks' activations are alive at once, where there is one block's without.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Floor, Reversed

__all__ = ["CudaLanes", "Lanes", "Overlapped"]

CALLER = -1
"""Stands for the stream on which the backward pass was called."""


class Lanes:
    """Two streams, which here are none: one after the other is right, too."""

    def on(self, lane: int) -> AbstractContextManager[Any]:
        """What is issued inside runs on this lane."""
        return nullcontext()

    def mark(self, lane: int) -> Any:
        """An event: all that was issued on this lane so far."""

    def wait(self, lane: int, event: Any) -> None:
        """What is issued on this lane from now on comes after an event, if there is one."""

    def lend(self, tensors: Iterable[Tensor], lane: int) -> None:
        """Says that a lane uses these, so that their memory is not given away before it has done so."""

    def after(self, lane: int, other: int) -> None:
        """What is issued on one lane from now on comes after all on the other."""
        self.wait(lane, self.mark(other))


@lru_cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class CudaLanes(Lanes):
    """Two streams of a GPU, the same in every step."""

    def __init__(self, device: torch.device) -> None:
        self._all = {CALLER: torch.cuda.current_stream(device), **dict(enumerate(_streams(device)))}

    def on(self, lane: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._all[lane])

    def mark(self, lane: int) -> Any:
        return self._all[lane].record_event()

    def wait(self, lane: int, event: Any) -> None:
        if event is not None:
            self._all[lane].wait_event(event)

    def lend(self, tensors: Iterable[Tensor], lane: int) -> None:
        for tensor in tensors:
            tensor.record_stream(self._all[lane])


class Overlapped(Floor):
    """A :class:`Floor` on two lanes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(Overlapping.apply(list(self.functions), *x.chunk(2, 1), *self.parameters()), 1)


class Overlapping(Reversed):
    """All couplings as one node."""

    lanes: Any = None
    """What makes lanes for a device, in place of the usual; for tests."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        device = grads[0].device
        make = Overlapping.lanes or (CudaLanes if device.type == "cuda" else lambda _: Lanes())
        work = _Backward(ctx.functions, make(device))
        grad_a, grad_b = work.run(ctx.saved_tensors, grads)
        return (None, grad_a, grad_b, *(None for _ in ctx.needs_input_grad[3:]))


class _Backward:
    """One backward pass."""

    def __init__(self, functions: Sequence[nn.Module], lanes: Lanes) -> None:
        self.functions, self.lanes = functions, lanes
        self.rebuilt: Any = None
        self.turned: Any = None

    def run(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the inputs; those of the parameters are added where they belong."""
        for lane in (0, 1):
            self.lanes.after(lane, CALLER)
        last = len(self.functions) - 1
        read, shift, base = self.evaluate(last, outputs)
        for i in range(last, -1, -1):
            # The host is ahead of both lanes: what is issued first does not hold up the other.
            before = self.evaluate(i - 1, (base, read)) if i else None
            grads = self.differentiate(i, read, shift, grads)
            if before is not None:
                read, shift, base = before
        for lane in (0, 1):
            self.lanes.after(CALLER, lane)
        self.lanes.lend(grads, CALLER)
        return grads

    def evaluate(self, i: int, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Block i again, from its outputs: what its function read, what that gave, and the stream that it added to."""
        lane = i % 2
        self.lanes.wait(lane, self.rebuilt)
        self.lanes.lend(outputs, lane)
        with self.lanes.on(lane):
            read = outputs[0].detach().requires_grad_()
            with torch.enable_grad():
                shift = self.functions[i](read)
            base = outputs[1] - shift.detach()
        self.rebuilt = self.lanes.mark(lane)
        return read, shift, base

    def differentiate(self, i: int, read: Tensor, shift: Tensor, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of block i's inputs, from those of its outputs."""
        lane = i % 2
        self.lanes.wait(lane, self.turned)
        self.lanes.lend(grads, lane)
        parameters = list(self.functions[i].parameters())
        self.lanes.lend((p.grad for p in parameters if p.grad is not None), lane)  # of a step before, or a block
        with self.lanes.on(lane):
            found = torch.autograd.grad(shift, [read, *parameters], grads[1])
            for parameter, gradient in zip(parameters, found[1:], strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            grad = grads[0] + found[0]
        self.lanes.lend((p.grad for p in parameters if p.grad is not None), CALLER)
        self.turned = self.lanes.mark(lane)
        return grads[1], grad
