"""What a benchmark needs of a device: its clock, its settings, what it can do at best, and when it says no."""

import gc
import platform
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from benchmarks.floors import Machine

__all__ = ["PRECISIONS", "about", "broken", "clear", "fault", "machine_of", "precision", "seconds", "switched"]

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
"""What matrix products and convolutions compute in, and the dtype of their results."""


def about(device: torch.device) -> dict[str, Any]:
    """The device and the versions that figures are from."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "memory": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long a function takes, by a GPU's events or by the clock. It begins when the device has nothing to do."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


@contextmanager
def switched(**flags: Any) -> Generator[None]:
    """Sets flags of cuDNN, and ``deterministic_algorithms``, for a while."""
    algorithms = flags.pop("deterministic_algorithms", None)
    cudnn, mode = torch.backends.cudnn, torch.get_deterministic_debug_mode()
    before = {name: getattr(cudnn, name) for name in flags}
    try:
        for name, value in flags.items():
            setattr(cudnn, name, value)
        if algorithms is not None:
            torch.use_deterministic_algorithms(algorithms)
        yield
    finally:
        for name, value in before.items():
            setattr(cudnn, name, value)
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def precision(name: str) -> Generator[None]:
    """Lets float32 products compute in TF32, or in float32 alone; autocast is the caller's.

    By torch's older flags: after ``fp32_precision`` was set, the compiler of torch 2.9 and later raises on a GPU
    (pytorch#166387).
    """
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = name != "fp32"
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def machine_of(device: torch.device, name: str, *, tiny: bool = False) -> Machine:
    """Measures the best rates of a matrix product, under a precision, and of a copy. Nothing is from a data sheet."""
    side = 256 if tiny else 8192 if device.type == "cuda" else 1024
    powers = range(12, 19, 3) if tiny else range(12, 29 if device.type == "cuda" else 25, 2)
    with ExitStack() as stack:
        stack.enter_context(precision(name))
        rates = {str(d).removeprefix("torch."): _rate(side, d, device) for d in {torch.float32, PRECISIONS[name]}}
        return Machine(rates, [(8 * 2**power, _bandwidth(2**power, device)) for power in powers])


def _rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a square matrix product."""
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    return 2 * side**3 / min(seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(8))


def _bandwidth(length: int, device: torch.device) -> float:
    """Bytes per second that a copy of so many float32 values reads and writes."""
    source, target = torch.rand(length, device=device), torch.empty(length, device=device)
    repeats = max(1, 2**20 // length)

    def copies() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return 8 * length * repeats / min(seconds(copies, device) for _ in range(8))


MEMORY = ("allocate memory", "error: out of memory", "status_alloc_failed")
"""What errors say of memory that are not of torch's allocator: the CPU's, CUDA's, those of cuBLAS and cuDNN."""


def broken(device: torch.device) -> bool:
    """Whether the device does nothing more in this process, as after an illegal access."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:  # noqa: BLE001 (whatever it says)
        return True
    return False


def fault(error: BaseException) -> str:
    """What a table says of an error: that memory did not suffice, or its kind and first line."""
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    said = first.lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in said for word in MEMORY):
        return "out of memory"
    return f"{type(error).__name__}: {first}"[:160]


def clear(device: torch.device) -> None:
    """Gives back the memory that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
