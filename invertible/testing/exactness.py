"""What the bits of a network on a grid depend on, tried out on the network itself."""

import copy
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from invertible import _check
from invertible._buffers import buffers_stay
from invertible._value import Value, leaves, map_value
from invertible.backprop._replay import Survey
from invertible.backprop.strategies import Reconstruct, Store
from invertible.sequential import Sequential

from ._compare import as_channels_last, has_layout
from .backprop import train_once

__all__ = ["ExactnessReport", "ExactnessRow", "exactness_report"]

Call = Callable[[Value, Value | None], Value]
"""Runs a layer forward, on the same random numbers each time."""


@dataclass(frozen=True)
class ExactnessRow:
    """One comparison, over all layers that compute something.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Linear(4, 4)), Merge(), grid="exact").eval()
        >>> row = exactness_report(net, torch.rand(3, 8))["backwards"]
        >>> row.needed, row.layers, row.differ, row.first
        (True, 1, 0, None)
    """

    what: str
    """What was other than in the first run."""
    needed: bool
    """Whether the promise of an exact way back rests on it; else it says what must be kept as it is."""
    layers: int
    """How many could be compared."""
    differ: int
    """How many did not repeat their bits."""
    size: float
    """The largest difference, relative to the largest element."""
    first: str | None
    """The first layer that did not."""


@dataclass(frozen=True)
class ExactnessReport:
    """What :func:`exactness_report` found; as text, a table.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Linear(4, 4)), Merge(), grid="exact").eval()
        >>> report = exactness_report(net, torch.rand(3, 8))
        >>> print(str(report).splitlines()[0])
        again                    same bits
        >>> report["there and back"].differ
        0
    """

    rows: tuple[ExactnessRow, ...]

    @property
    def exact(self) -> bool:
        """Whether all that the promise rests on has held."""
        return not any(row.differ for row in self.rows if row.needed)

    def __getitem__(self, what: str) -> ExactnessRow:
        """The row of this name."""
        return next(row for row in self.rows if row.what == what)

    def __str__(self) -> str:
        return "\n".join(f"{row.what:<24} {_told(row)}" for row in self.rows)


def _told(row: ExactnessRow) -> str:
    if not row.layers:
        return "cannot be compared"
    if not row.differ:
        return "same bits"
    verdict = "NOT EXACT" if row.needed else "other bits"
    return f"{verdict} in {row.differ} of {row.layers} (by {row.size:.0e}), first {row.first}"


def exactness_report(
    net: Sequential, x: Value, *, condition: Value | None = None, compiled: bool = False
) -> ExactnessReport:
    """Tries on every layer of a network on a grid whether it repeats its bits, and under which changes.

    The promise of an exact way back rests on the rows that are *needed*: the same call again, with and without
    gradients, in inference mode, each layer backwards, the whole network there and back (unless it draws random
    numbers), and the gradients of ``Reconstruct`` against those of ``Store``. The other
    rows say what must be kept as it is between ``forward`` and ``inverse``: number of threads, size and order of the
    batch, memory format, kernel library. Nothing is left behind in ``net``, nor in the random stream. The gradient of a
    parameter that several layers share is a sum, and may differ in the last bit by its order.

    Args:
        net: the network, on a grid, in the mode, on the device and under the autocast in which it is to be exact.
        x: its input.
        condition: its condition, if it takes one.
        compiled: compare with the functions compiled by inductor, too, which takes a while.

    Raises:
        TypeError: if ``net`` is no ``Sequential``.
        ValueError: if it has no grid.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Linear(4, 4)), Merge(), grid="exact").eval()
        >>> report = exactness_report(net, torch.rand(3, 8))
        >>> report.exact, report["again"].layers
        (True, 1)
    """
    if not isinstance(net, Sequential):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"exactness_report: expected a Sequential, got {type(net).__name__}.")
    if net.grid is None:
        raise ValueError('exactness_report: the network has no grid. Set net.grid = "exact".')
    with cast("Any", torch.random).fork_rng():
        seed = int(torch.randint(2**31, ()))
        found = _tried_by_layer(net, x, condition, _trials(x, compiled=compiled), seed)
        rows = [_row(name, needed, results) for (name, needed), results in found.items()]
        rows.insert(5, _row("there and back", not Survey([net]).random, _round_trip(net, x, condition)))
        rows.insert(6, _row("gradients", True, _gradients(net, x, condition, seed)))
    return ExactnessReport(tuple(rows))


@dataclass(frozen=True)
class _Trial:
    """A run that differs from the first in one thing, and what its result is to be compared with."""

    name: str
    needed: bool
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    change: Callable[[Tensor], Tensor] = lambda t: t
    """Of the input, and of the expected output."""
    fits: Callable[[Tensor], bool] = lambda t: True
    """Whether this input can be changed so."""
    twin: bool = False
    """Whether to run the compiled copy."""
    backwards: bool = False


def _trials(x: Value, *, compiled: bool) -> Iterator[_Trial]:
    device = next(leaves(x)).device
    yield _Trial("again", True)
    yield _Trial("with gradients", True, torch.enable_grad)
    yield _Trial("without gradients", True, torch.no_grad)
    yield _Trial("inference mode", True, torch.inference_mode)
    yield _Trial("backwards", True, backwards=True)
    yield _Trial("one sample alone", False, change=lambda t: t[:1], fits=lambda t: len(t) > 1)
    yield _Trial("half of the batch", False, change=lambda t: t[: len(t) // 2], fits=lambda t: len(t) > 3)
    yield _Trial("batch in reverse", False, change=lambda t: t.flip(0), fits=lambda t: len(t) > 1)
    yield _Trial("a view of a larger one", False, change=_as_view, fits=lambda t: t.ndim > 1)
    yield _Trial("channels last", False, change=as_channels_last, fits=has_layout)
    if device.type == "cpu":
        yield _Trial("another thread count", False, _other_threads)
        yield _Trial("without oneDNN", False, _without_onednn)
    if device.type == "cuda":
        yield _Trial("cudnn.benchmark", False, _toggled(torch.backends.cudnn, "benchmark"))
        yield _Trial("cudnn.deterministic", False, _toggled(torch.backends.cudnn, "deterministic"))
        yield _Trial("other TF32", False, _other_tf32)
    if compiled:
        yield _Trial("compiled functions", False, twin=True)


Results = list[tuple[str, float | None]]
"""Of each layer by name: how large the difference is, if there was anything to compare."""


def _tried_by_layer(
    net: Sequential, x: Value, condition: Value | None, trials: Iterator[_Trial], seed: int
) -> dict[tuple[str, bool], Results]:
    """Follows a value through the network and runs each layer several times on the way."""
    tried = list(trials)
    found: dict[tuple[str, bool], Results] = {(trial.name, trial.needed): [] for trial in tried}
    twin = None
    if any(trial.twin for trial in tried):
        twin = copy.deepcopy(net)
        twin.compile_functions()
    with torch.no_grad(), buffers_stay(net), buffers_stay(twin or net):
        value: Value = net.snap(x)
        _seed(seed)
        for name, output in net.trace(x, condition=condition):
            layer = net.get_submodule(name)
            if not cast("Any", layer).isometric:
                place = f"layer {name!r}, {_check.name(layer)}"
                base = _call(layer, seed)(value, condition)
                for trial in tried:
                    part = twin.get_submodule(name) if twin is not None and trial.twin else layer
                    result = _compared(trial, part, value, condition, base, seed)
                    found[trial.name, trial.needed].append((place, result))
            value = output
    return found


def _seed(seed: int) -> None:
    cast("Any", torch).manual_seed(seed)


def _call(layer: Any, seed: int, method: str = "forward") -> Call:
    def call(value: Value, condition: Value | None) -> Value:
        _seed(seed)
        return (layer if method == "forward" else layer.inverse)(value, condition=condition)

    return call


def _compared(trial: _Trial, layer: Any, value: Value, condition: Value | None, base: Value, seed: int) -> float | None:
    if trial.backwards:
        if not layer.bijective:
            return None
        return _difference(_call(layer, seed, "inverse")(base, condition), value)
    if not all(trial.fits(t) for t in leaves(value)):
        return None
    size = len(next(leaves(value)))

    def changed(t: Any) -> Any:
        fits = isinstance(t, Tensor) and t.ndim and len(t) == size and trial.fits(t)
        return trial.change(t) if fits else t

    given = None if condition is None else map_value(changed, condition)
    try:
        with trial.context():
            result = _call(layer, seed)(map_value(changed, value), given)
    except Exception:
        if trial.needed:
            raise
        return None  # batch norm in training refuses a single sample, for example
    return _difference(result, map_value(trial.change, base))


def _difference(found: Value, expected: Value) -> float:
    """The largest, relative to the largest element; 0 if and only if all bits are the same."""
    worst = 0.0
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        if not torch.equal(a, b):
            size = float((a - b).abs().amax() / b.abs().amax())
            worst = max(worst, size if math.isfinite(size) else math.inf)
    return worst


def _round_trip(net: Sequential, x: Value, condition: Value | None) -> Results:
    """Through a copy of the whole network, whose buffers move: the way back of functions that read them is another."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        back = net.inverse(net(x, condition=condition), condition=condition)
    return [("the whole network", _difference(back, net.snap(x)))]


def _gradients(net: Sequential, x: Value, condition: Value | None, seed: int) -> Results:
    """Those of parameters, by strategy, from the output to the input; a difference goes from there to all before."""
    left: list[dict[str, Tensor | None]] = []
    with torch.inference_mode(False), torch.enable_grad():
        for strategy in (Store(), Reconstruct(on_drift="record")):
            _seed(seed)
            left.append(train_once(net, strategy, x, condition).gradients)
    results: Results = []
    for name, expected in reversed(left[0].items()):
        found = left[1][name]
        if expected is not None and found is not None and not name.startswith("condition"):  # a sum over layers
            results.append((name, _difference(found, expected)))
    return results


def _row(name: str, needed: bool, results: Results) -> ExactnessRow:
    compared = [(place, size) for place, size in results if size is not None]
    bad = [(place, size) for place, size in compared if size]
    largest = max((size for _, size in bad), default=0.0)
    return ExactnessRow(name, needed, len(compared), len(bad), largest, bad[0][0] if bad else None)


def _as_view(t: Tensor) -> Tensor:
    """The same values as every second channel of a larger tensor."""
    return torch.stack((t, t), 2).flatten(1, 2)[:, ::2]


@contextmanager
def _other_threads() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _toggled(module: Any, name: str) -> Callable[[], AbstractContextManager[None]]:
    """A context in which a flag is the other way round."""

    @contextmanager
    def toggled() -> Generator[None]:
        before = getattr(module, name)
        setattr(module, name, not before)
        try:
            yield
        finally:
            setattr(module, name, before)

    return toggled


_without_onednn = _toggled(torch.backends.mkldnn, "enabled")


@contextmanager
def _other_tf32() -> Generator[None]:
    backends: Any = torch.backends
    parts = [backends.cuda.matmul, backends.cudnn.conv]
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee" if part.fp32_precision == "tf32" else "tf32"
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value
