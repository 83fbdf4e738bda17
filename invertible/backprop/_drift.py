"""How far reconstructed inputs are off: probes and checksums, and the verdict at the end of a backward pass."""

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
from invertible._checksum import checksum

from ._torch import at_end_of_backward, backward_keeps_graph, backward_number
from .strategies import Reconstruct

__all__ = [
    "Checksum",
    "Drift",
    "DriftError",
    "DriftWarning",
    "InexactInverseError",
    "NondeterministicBlockError",
    "Probes",
    "during_backward",
    "report",
]

PROBES = 1024


class DriftWarning(UserWarning):
    """Reconstructed inputs are off by more than ``drift_warn``: the gradients are less exact than stored ones."""


class DriftError(ArithmeticError):
    """Reconstructed inputs are off by more than ``drift_error``: the gradients of this step are wrong."""

    drift: float = math.nan
    """How far off they are, relatively."""


class InexactInverseError(DriftError):
    """On a grid, reconstructed inputs are not the true ones bit for bit: a function did not repeat its bits."""


class NondeterministicBlockError(InexactInverseError):
    """On a grid, a layer did not repeat its bits, and is named: under ``locate=True``, or as its input was kept."""


class Probes:
    """Some elements of the tensors that entered a layer, to compare the reconstructed ones with."""

    def __init__(self, tensors: Sequence[Tensor], known: Sequence[Tensor | None] = ()) -> None:
        known = known or [None] * len(tensors)
        self.true = [_sample(t.detach()) if k is None else k for t, k in zip(tensors, known, strict=True)]

    def drift(self, tensors: Sequence[Tensor]) -> Tensor:
        """The largest relative error of a tensor; the absolute one where the true values are all zero."""
        return self._largest([_sample(t) for t in tensors])

    def repeated(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same of tensors that were computed again; zero where they are the same, finite or not."""
        found = [_sample(t) for t in tensors]
        same = [((t == b) | ((t != t) & (b != b))).all() for t, b in zip(found, self.true, strict=True)]
        return torch.where(torch.stack([each.to(same[0].device) for each in same]).all(), 0.0, self._largest(found))

    def _largest(self, found: Sequence[Tensor]) -> Tensor:
        return torch.stack(_together([_error(t, b) for t, b in zip(found, self.true, strict=True)])).amax()


class Checksum:
    """That of the tensors on a grid that entered a layer, and a few elements to say how far off others are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.sum, self.few = checksum(*tensors), self._few(tensors)

    def drift(self, tensors: Sequence[Tensor]) -> Tensor:
        """Zero if and only if all bits are the same; else the largest error seen, relative to the largest element."""
        least = torch.finfo(self.few.dtype).eps
        if not self.few.numel():
            return self.few.new_zeros(())
        size = self.few.abs().amax().clamp_min(least)
        seen = ((self._few(tensors) - self.few).abs().amax() / size).clamp_min(least)  # others may differ
        return torch.where(checksum(*tensors) == self.sum, 0.0, seen)

    def _few(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([_middle(t.detach()).flatten().to(tensors[0].device) for t in tensors])


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


def _middle(x: Tensor) -> Tensor:
    """At most 1024 elements: the middle pixel of the first channels of the first samples."""
    if x.ndim < 2 or not x.numel():
        return x[:1024]
    return x[(slice(32), slice(32), *(size // 2 for size in x.shape[2:]))]


class Drift:
    """What the last backward pass through a network says of its reconstruction."""

    def __init__(self, figure: Tensor | float, flag: Tensor | bool) -> None:
        self.figure, self._flag = figure, flag

    @property
    def flag(self) -> Tensor:
        """Whether a figure is beyond its limit, or is no number; on the figure's device."""
        return torch.as_tensor(self._flag)


@dataclass
class _Place:
    """A layer whose input is compared, and whether it must have the same bits."""

    layer: nn.Module
    position: int
    exact: bool
    again: bool
    """Whether that is said of its output, which it has computed again from an input that was kept."""


@dataclass
class _Figures:
    """The figures of one network in one backward pass, from its last layer to its first."""

    net: Any
    strategy: Reconstruct
    places: list[_Place] = field(default_factory=list[_Place])
    values: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is being captured, in which nothing can be read."""
        return self.values[0].is_cuda and torch.cuda.is_current_stream_capturing()

    def record(self) -> None:
        # Not max(): it may pass over a NaN.
        values = torch.stack(_together(self.values))
        beyond = [~(v <= limit) for v, limit in zip(values, self._limits(), strict=True)]
        self.net.__dict__["_drift"] = Drift(values.amax(), torch.stack(beyond).any())

    def judge(self) -> DriftError | None:
        """Reads the figures; warns, or returns the error."""
        figures: list[float] = torch.stack(_together(self.values)).tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        worst = next((f for f in figures if math.isnan(f)), max(figures))
        flag = any(not f <= limit for f, limit in zip(figures, self._limits(), strict=True))
        self.net.__dict__["_drift"] = Drift(worst, flag)
        inexact = next((i for i, f in enumerate(figures) if self.places[i].exact and f != 0), None)
        if inexact is not None:
            error = self._inexact(inexact, worst)
        elif worst <= self.strategy.drift_warn:
            return None
        else:
            error = self._far_off(figures, worst)
        if error is not None:
            error.drift = worst
        return error

    def _limits(self) -> list[float]:
        return [0.0 if place.exact else self.strategy.drift_error for place in self.places]

    def _inexact(self, first: int, worst: float) -> InexactInverseError:
        who = f"{type(self.net).__name__}: the reconstructed inputs are not the true ones bit for bit"
        size = f" (off by {worst:.0e})" if math.isfinite(worst) else " (not finite)"
        grid: Any = cast("Any", self.places[first].layer).grid
        if grid.on_range == "record" and self.net.peak is not None and not self.net.peak < grid.limit:
            return InexactInverseError(
                f"{who}{size}: a value between the layers, of size {self.net.peak:g}, was beyond the limit of {grid}, "
                f"{grid.limit:g}. Take fewer bits; net.calibrate(x) proposes them."
            )
        rule = "a function must repeat its bits, and draw random numbers from torch's global generator only"
        advice = "Skip the step, or keep the activations: Store()."
        if self.places[first].again:
            net, place = type(self.net).__name__, self._place(first)
            again = "was run again on the same input and did not return the same bits"
            return NondeterministicBlockError(f"{net}: {place}, {again}{size}: {rule}. {advice}")
        if not self.strategy.locate:
            return InexactInverseError(f"{who}{size}: {rule}. {advice} Reconstruct(locate=True) names the layer.")
        return NondeterministicBlockError(f"{who}{size} at {self._place(first)}: {rule}. {advice}")

    def _far_off(self, figures: Sequence[float], worst: float) -> DriftError | None:
        where = ""
        if self.strategy.locate:
            first = next(i for i, f in enumerate(figures) if not f <= self.strategy.drift_warn)
            does = "is what was returned again by" if self.places[first].again else "enters"
            where = f" From the output, the first bad one {does} {self._place(first)}: {figures[first]:.0e}."
        locate = "" if self.strategy.locate else " Reconstruct(locate=True) names the layer."
        who = f"{type(self.net).__name__}: the reconstructed inputs are off by {worst:.0e} (relative)"
        fix = f" Keep more: Reconstruct(anchor_every=10) or Store().{locate}"
        at = figures.index(worst)
        if self.places[at].again:
            rule = "was run again on the same input and returned something else, off by"
            who = f"{type(self.net).__name__}: {self._place(at)}, {rule} {worst:.0e} (relative)"
            where = " A function must draw random numbers from torch's global generator, and keep its state in buffers."
            fix = " Or take Store()."
        if worst <= self.strategy.drift_error:
            warnings.warn(
                f"{who}, above drift_warn={self.strategy.drift_warn:g}.{where} Gradients lose precision with it.",
                DriftWarning,
                stacklevel=3,
            )
            return None
        if math.isfinite(worst):
            return DriftError(
                f"{who}, above drift_error={self.strategy.drift_error:g}, so that the gradients of this step are "
                f"wrong.{where}{fix}"
            )
        return DriftError(
            f"{type(self.net).__name__}: the reconstructed inputs are not finite: a value between the layers is "
            f"infinite or no number.{where}{locate}"
        )

    def _place(self, index: int) -> str:
        place = self.places[index]
        modules = cast("Iterable[tuple[str, nn.Module]]", self.net.named_modules())
        key = next((key for key, module in modules if module is place.layer), "?")
        return f"layer {key!r}, {_check.name(place.layer)}, the {place.position}. that computes something"


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


def report(
    net: nn.Module,
    strategy: Reconstruct,
    layer: nn.Module,
    position: int,
    figure: Tensor,
    *,
    exact: bool,
    again: bool = False,
) -> None:
    """Takes down how far off a layer's input is, to be read with all others at the end of the backward pass.

    ``again``: or what it has returned when it was run again.
    """
    if not figure.is_meta:
        figures = during_backward().figures.setdefault(id(net), _Figures(net, strategy))
        figures.places.append(_Place(layer, position, exact, again))
        figures.values.append(figure)
