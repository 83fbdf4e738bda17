"""What an operation takes at least: its floating-point operations over a rate, or its bytes over a bandwidth."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Machine", "Operation", "counted", "floor", "flops_floor", "occupied"]


class Operation(NamedTuple):
    """What one operation of torch had to do."""

    flops: int
    bytes: int
    """Of its arguments and results, each read or written once."""
    dtype: str
    """Of its first result, such as ``"bfloat16"``."""


@dataclass(frozen=True)
class Machine:
    """What a device can do at best, as measured."""

    rates: dict[str, float]
    """Floating-point operations per second of a matrix product, by dtype."""
    bandwidth: list[tuple[int, float]] = field(default_factory=list)
    """Bytes per second of a copy, after the number of its bytes; ascending by that."""

    def bandwidth_of(self, size: int) -> float:
        """The best of all copies of so many bytes or more: caches make small ones faster."""
        largest = self.bandwidth[-1][0]
        return max(rate for moved, rate in self.bandwidth if moved >= min(size, largest))

    def rate_of(self, dtype: str) -> float:
        """The rate of a dtype; of one that was not measured, the best there is."""
        return self.rates.get(dtype, max(self.rates.values()))


class Count(TorchDispatchMode):
    """Takes down the floating-point operations and the bytes of every operation."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.name.startswith("aten::empty"):
            read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            flops = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
            size = sum(map(occupied, (*read.values(), *written)))
            dtype = str(written[0].dtype).removeprefix("torch.") if written else ""
            self.found.append(Operation(flops(*args, **(kwargs or {}), out_val=result), size, dtype))
        return result


def occupied(t: Tensor) -> int:
    """Bytes in memory: of an expanded tensor, those that are there."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def counted(function: Callable[[], object]) -> list[Operation]:
    """Operations and bytes of all that a function runs."""
    with Count() as count:
        function()
    return count.found


def floor(operations: Sequence[Operation], machine: Machine) -> float:
    """Seconds that these operations take at least, one after the other, each by whichever of its two floors is higher.

    What fuses them moves fewer bytes, and may take less.
    """
    return sum(
        max(op.flops / machine.rate_of(op.dtype), op.bytes / machine.bandwidth_of(op.bytes)) for op in operations
    )


def flops_floor(operations: Iterable[Operation], machine: Machine) -> float:
    """Seconds that their floating-point operations alone take at least, however they are fused."""
    return sum(op.flops / machine.rate_of(op.dtype) for op in operations)
