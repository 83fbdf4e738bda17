"""How far reconstructed inputs are off: probes, and the verdict at the end of a backward pass."""

import math
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from invertible import _check

from ._torch import at_end_of_backward, backward_keeps_graph, backward_number
from .strategies import Reconstruct

__all__ = ["Drift", "DriftError", "DriftWarning", "Probes", "during_backward", "report"]

PROBES = 1024


class DriftWarning(UserWarning):
    """Reconstructed inputs are off by more than ``drift_warn``: the gradients are less exact than stored ones."""


class DriftError(ArithmeticError):
    """Reconstructed inputs are off by more than ``drift_error``: the gradients of this step are wrong."""

    drift: float = math.nan
    """How far off they are, relatively."""


class Probes:
    """Some elements of the tensors that entered a layer, to compare the reconstructed ones with."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.true = [_sample(t.detach()) for t in tensors]

    def drift(self, tensors: Sequence[Tensor]) -> Tensor:
        """The largest relative error of a tensor; the absolute one where the true values are all zero."""
        return torch.stack(_together([_error(_sample(t), b) for t, b in zip(tensors, self.true, strict=True)])).amax()


def _error(found: Tensor, true: Tensor) -> Tensor:
    if not true.numel():
        return found.new_zeros((), dtype=torch.float32)
    size = true.abs().amax()  # or the squares of small numbers would be zero, and those of large ones infinite
    size = torch.where(size > 0, size, torch.ones_like(size))
    norm = (true / size).abs().square().sum()
    return (((found - true) / size).abs().square().sum() / torch.where(norm > 0, norm, torch.ones_like(norm))).sqrt()


def _sample(x: Tensor) -> Tensor:
    """At most ``PROBES`` elements, spread evenly but not at a fixed distance, which might always meet one channel."""
    n = x.numel()
    if n > PROBES:
        bits = min(31, 62 - n.bit_length())  # so that the product below fits into 63 bits
        hashed = torch.arange(PROBES, device=x.device) * 2654435769 % 2**32 >> (32 - bits)  # by the golden ratio
        x = x.take(hashed * n >> bits)
    x = x.flatten() if n <= PROBES else x
    if x.dtype in {torch.float64, torch.complex64, torch.complex128}:
        return x.clone() if n <= PROBES else x
    return x.to(torch.float32, copy=n <= PROBES)


class Drift:
    """What the last backward pass through a network says of its reconstruction."""

    def __init__(self, figure: Tensor | float, limit: float) -> None:
        self.figure, self.limit = figure, limit

    @property
    def flag(self) -> Tensor:
        """Whether the figure is beyond the limit, or is no number; on the figure's device."""
        return ~(torch.as_tensor(self.figure) <= self.limit)


@dataclass
class _Figures:
    """The figures of one network in one backward pass, from its last layer to its first."""

    net: Any
    strategy: Reconstruct
    layers: list[tuple[nn.Module, int]] = field(default_factory=list[tuple[nn.Module, int]])
    values: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is being captured, in which nothing can be read."""
        return self.values[0].is_cuda and torch.cuda.is_current_stream_capturing()

    def record(self) -> None:
        # Not max(): it may pass over a NaN.
        worst = self.values[0] if len(self.values) == 1 else torch.stack(_together(self.values)).amax()
        self.net.__dict__["_drift"] = Drift(worst, self.strategy.drift_error)

    def judge(self) -> DriftError | None:
        """Reads the figures; warns, or returns the error."""
        figures: list[float] = torch.stack(_together(self.values)).tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        worst = next((f for f in figures if math.isnan(f)), max(figures))
        self.net.__dict__["_drift"] = Drift(worst, self.strategy.drift_error)
        if worst <= self.strategy.drift_warn:
            return None
        where = ""
        if self.strategy.locate:
            first = next(i for i, f in enumerate(figures) if not f <= self.strategy.drift_warn)
            where = f" From the output, the first bad one enters {self._place(first)}: {figures[first]:.0e}."
        who = f"{type(self.net).__name__}: the reconstructed inputs are off by {worst:.0e} (relative)"
        if worst <= self.strategy.drift_error:
            warnings.warn(
                f"{who}, above drift_warn={self.strategy.drift_warn:g}.{where} Gradients lose precision with it.",
                DriftWarning,
                stacklevel=2,
            )
            return None
        locate = "" if self.strategy.locate else " Reconstruct(locate=True) names the layer."
        if math.isfinite(worst):
            error = DriftError(
                f"{who}, above drift_error={self.strategy.drift_error:g}, so that the gradients of this step are "
                f"wrong.{where} Keep more: Reconstruct(anchor_every=10) or Store().{locate}"
            )
        else:
            error = DriftError(
                f"{type(self.net).__name__}: the reconstructed inputs are not finite: a value between the layers is "
                f"infinite or no number.{where}{locate}"
            )
        error.drift = worst
        return error

    def _place(self, index: int) -> str:
        layer, position = self.layers[index]
        modules = cast("Iterable[tuple[str, nn.Module]]", self.net.named_modules())
        key = next((key for key, module in modules if module is layer), "?")
        return f"layer {key!r}, {_check.name(layer)}, the {position}. that computes something"


def _together(values: Sequence[Tensor]) -> list[Tensor]:
    return [v.to(values[0].device, torch.promote_types(v.dtype, torch.float32)) for v in values]


class _Backward:
    """What has to be done when the running backward pass ends."""

    def __init__(self) -> None:
        self.cells: list[Any] = []
        self.keeps_graph = backward_keeps_graph()
        self.figures: dict[int, _Figures] = {}

    def finish(self) -> None:
        """Clears what is left, then reads the figures."""
        for cell in self.cells:
            cell.clear(final=not self.keeps_graph)
        figures = self.figures.values()
        read = [each for each in figures if each.strategy.on_drift == "raise" and not each.captured]
        for each in figures:
            if each not in read:
                each.record()
        errors = [each.judge() for each in read]
        error = next((e for e in errors if e is not None), None)
        if error is not None:
            # Once more at the end: DDP and FSDP finish their own work there, and must not be kept from it.
            at_end_of_backward(partial(_raise, error))


def _raise(error: Exception) -> None:
    raise error


_lock = threading.Lock()
_backwards: WeakValueDictionary[int, _Backward] = WeakValueDictionary()


def during_backward() -> _Backward:
    """The running backward pass of this thread; nested ones are their own."""
    task = backward_number()
    with _lock:
        backward = _backwards.get(task)
        if backward is None:
            backward = _backwards[task] = _Backward()
            # Autograd holds the callback, and so the object, until the pass has ended or failed.
            at_end_of_backward(backward.finish)
    return backward


def report(net: nn.Module, strategy: Reconstruct, layer: nn.Module, position: int, figure: Tensor) -> None:
    """Takes down how far off a layer's input is, to be read with all others at the end of the backward pass."""
    if not figure.is_meta:
        figures = during_backward().figures.setdefault(id(net), _Figures(net, strategy))
        figures.layers.append((layer, position))
        figures.values.append(figure)
