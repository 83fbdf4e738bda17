"""How many bytes a computation allocates, counted at the allocator."""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import profile

__all__ = ["Memory", "measure_memory"]


class Memory(NamedTuple):
    """Bytes that were allocated, above those before.

    Example:
        >>> net = nn.Sequential(nn.Tanh(), nn.Tanh())
        >>> x = torch.rand(1000, requires_grad=True)
        >>> measure_memory(lambda: net(x))[1]  # both outputs are kept for the gradients
        Memory(kept=8000, peak=8000)
    """

    kept: int
    """Still allocated at the end."""
    peak: int
    """The most at any time."""


def measure_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[Any, Memory]:
    """Runs a function and returns its result, and the bytes of tensors that it allocated on a device.

    Unlike hooks on saved tensors this sees all that is kept, on ``ctx``, in modules and in closures too. On the CPU it
    reads the profiler's memory events, on CUDA the allocator's statistics. On ``"meta"``, where tensors have no data,
    it adds up what operations return: what is kept is the same as on the CPU, but kernels' own workspace is no part of
    the peak.

    What was allocated before and is freed in the call is not counted on the CPU.

    Args:
        function: what to run, with no arguments.
        device: whose memory to count: the CPU's, that of a CUDA device, or ``"meta"``.

    Raises:
        RuntimeError: on the CPU, if a profiler is running already: there can be one only.

    Example:
        >>> x, memory = measure_memory(lambda: torch.zeros(1000).clone())
        >>> memory.kept, memory.peak
        (4000, 8000)
    """
    device = torch.device(device)
    if device.type == "meta":
        from invertible.backprop._counting import Watch  # imports what counts, which is slow

        with Watch() as watch:
            result = function()
        return result, Memory(watch.now, watch.peak)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        kept, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return result, Memory(kept - before, peak - before)
    if torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        raise RuntimeError("measure_memory: a profiler is running already, and there can be one only.")
    profiler: Any = profile(profile_memory=True)  # torch.profiler's would make a tree of all operations, which is slow
    with _silence():
        profiler.__enter__()
    try:
        result = function()
    finally:
        with _silence():
            profiler.__exit__(None, None, None)
    events: Any = profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    kept = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        kept += size
        peak = max(peak, kept)
    return result, Memory(kept, peak)


@contextmanager
def _silence() -> Generator[None]:
    """Torch 2.15's profiler writes lines of its log to the error stream, where users would take them for errors."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
