"""Compares the strategies of backpropagation on a network of your own."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from invertible import _check
from invertible._running import running
from invertible._value import Value, leaves, map_value
from invertible.backprop import Strategy
from invertible.backprop._chain import Chain
from invertible.backprop._replay import Replay, Survey
from invertible.backprop._rules import opposite
from invertible.backprop.strategies import Budget, Recompute, Reconstruct, Store
from invertible.coupling import Coupling
from invertible.inverse import Inverse
from invertible.module import InvertibleModule
from invertible.sequential import Sequential

from .memory import Memory, measure_memory

__all__ = ["BackpropReport", "StrategyReport", "check_backprop"]

_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class StrategyReport:
    """One training step by one strategy, against the same step with every activation stored.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Coupling(nn.Tanh()), Merge())
        >>> row = check_backprop(net, torch.rand(2, 4), strategies=[Reconstruct()]).rows[1]
        >>> row.strategy == Reconstruct(), row.gradients < 1e-6, row.buffers, row.random, row.evaluations
        (True, True, True, True, 4)
    """

    strategy: Strategy
    values: float
    """The largest relative error of an output."""
    gradients: float
    """The largest relative error of a gradient."""
    worst: str
    """Whose gradient that is."""
    buffers: bool
    """Whether all buffers are the same afterwards."""
    random: bool
    """Whether the random stream is where it was."""
    memory: Memory
    """Bytes between forward and backward, and at the peak."""
    evaluations: int
    """How often the functions of all couplings ran, together."""
    drift: float | None
    """How far off the reconstructed input was, relative to it; ``None`` if nothing was reconstructed."""


@dataclass(frozen=True)
class BackpropReport:
    """What :func:`check_backprop` found; as text, a table.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Coupling(nn.Tanh()), Merge())
        >>> report = check_backprop(net, torch.zeros(2, 4))
        >>> print(report)
        strategy       values  gradients  buffers  random  kept     peak     F runs  drift
        Store()        0e+00   0e+00      same     same    0.0 MiB  0.0 MiB  2
        Recompute()    0e+00   0e+00      same     same    0.0 MiB  0.0 MiB  4
        Reconstruct()  0e+00   0e+00      same     same    0.0 MiB  0.0 MiB  4       0e+00
    """

    rows: tuple[StrategyReport, ...]

    def __str__(self) -> str:
        head = ("strategy", "values", "gradients", "buffers", "random", "kept", "peak", "F runs", "drift")
        table: list[tuple[str, ...]] = [head]
        for row in self.rows:
            errors = (f"{row.values:.0e}", f"{row.gradients:.0e}")
            same = ("same" if row.buffers else "DIFFER", "same" if row.random else "DIFFERS")
            sizes = tuple(f"{size / 2**20:.1f} MiB" for size in row.memory)
            drift = "" if row.drift is None else f"{row.drift:.0e}"
            table.append((_short(row.strategy), *errors, *same, *sizes, str(row.evaluations), drift))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def check_backprop(
    net: nn.Module,
    x: Value,
    *,
    condition: Value | None = None,
    strategies: Sequence[Strategy] = (Recompute(), Reconstruct()),
    limit: float | None = None,
) -> BackpropReport:
    """Trains copies of a network for one step by each strategy, and refuses what differs from ``Store``.

    The outermost :class:`~invertible.Sequential` containers of the network take the strategy; those inside keep
    their own. Values, gradients of the input, the condition and the parameters, buffers and the random stream are
    compared; bytes and evaluations are counted. Nothing is left behind in ``net``, nor in the random stream. The first
    layer that computes keeps its input under every strategy: one that is to be tried needs another before it.

    Args:
        net: the network, in the mode and on the device in which it is trained.
        x: its input.
        condition: its condition, if it takes one.
        strategies: those to compare with ``Store``.
        limit: the relative error of a gradient that is let pass; by default 1e-9 for float64, 1e-3 for float32,
            and 0.05 below. Deep networks with ReLU may need more, with every activation stored too.

    Raises:
        AssertionError: if a strategy leaves something else behind. It names the first layer, from the output, that
            is the cause by itself, and why.
        ValueError: if the network has no ``Sequential`` to give a strategy to.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Coupling(nn.Tanh()), Merge())
        >>> report = check_backprop(net, torch.rand(2, 4))
        >>> [row.evaluations for row in report.rows]
        [2, 4, 4]
    """
    if not _outermost(net):
        raise ValueError("check_backprop: the network has no Sequential inside that could take a strategy.")
    with cast("Any", torch.random).fork_rng(), torch.enable_grad():
        start = _random_states()
        reference = _train(net, Store(), x, condition)
        if limit is None:
            dtypes = [t.dtype for t in reference.values.values() if t is not None and t.is_floating_point()]
            limit = _LIMITS.get(dtypes[0], 0.05) if dtypes else 0.05
        rows = [_compared(Store(), reference, reference)]
        for strategy in strategies:
            _set_random_states(start)
            rows.append(_compared(strategy, reference, _train(net, strategy, x, condition)))
            fault = _fault(rows[-1], limit)
            if fault is not None:
                _set_random_states(start)
                why = _first_cause(net, x, condition, limit) or "Every layer by itself is right: rounding adds up."
                raise AssertionError(f"{_short(strategy)}: {fault}. {why}\n{BackpropReport(tuple(rows))}")
    return BackpropReport(tuple(rows))


@dataclass
class Left:
    """What a training step leaves behind."""

    values: dict[str, Tensor | None]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    random: list[Tensor]
    memory: Memory
    evaluations: int
    drift: float | None


def train_once(net: nn.Module, strategy: Strategy, x: Value, condition: Value | None) -> Left:
    """Trains a copy of the network for one step by a strategy."""
    return _run(net, strategy, x, condition, backward=True)[0]


def _train(net: nn.Module, strategy: Strategy, x: Value, condition: Value | None) -> Left:
    start = _random_states()
    _, before = _run(net, strategy, x, condition, backward=False)
    _set_random_states(start)
    left, whole = _run(net, strategy, x, condition, backward=True)
    left.memory = Memory(before.kept, whole.peak)
    return left


def _run(
    net: nn.Module, strategy: Strategy, x: Value, condition: Value | None, *, backward: bool
) -> tuple[Left, Memory]:
    """Runs a copy of the network, forward and, if asked for, backward."""
    net = copy.deepcopy(net)
    chains = _outermost(net)
    for part in net.modules():
        if isinstance(part, Sequential):
            own = strategy if part in chains else Store() if isinstance(strategy, Store) else part.backprop
            part.backprop = _recording(own)
    net.zero_grad()
    given = {"input": _copied(x)} | ({} if condition is None else {"condition": _copied(condition)})
    options = {} if condition is None else {"condition": given["condition"]}
    counter = _Counter(net)

    def step() -> list[Tensor]:
        outputs = list(leaves(net(given["input"], **options)))
        trained = [y for y in outputs if y.requires_grad]
        if backward:
            torch.autograd.backward(trained, [_cotangent(y) for y in trained])  # pyright: ignore[reportUnknownMemberType]
        return outputs

    outputs, memory = measure_memory(step, next(leaves(x)).device)
    gradients = {f"{k} {i}": t.grad for k, v in given.items() for i, t in enumerate(leaves(v)) if t.requires_grad}
    gradients |= {f"parameter {k}": p.grad for k, p in net.named_parameters()}
    drifts = [chain.drift for chain in chains if chain.drift is not None]
    values: dict[str, Tensor | None] = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    buffers: dict[str, Tensor | None] = dict(net.named_buffers())
    return Left(values, gradients, buffers, _random_states(), memory, counter.calls, max(drifts, default=None)), memory


def _recording(strategy: Strategy | None) -> Strategy | None:
    """The same, but drift is noted and does not raise."""
    if isinstance(strategy, Budget):
        return replace(strategy, reconstruct=replace(strategy.reconstruct, on_drift="record"))
    return replace(strategy, on_drift="record") if isinstance(strategy, Reconstruct) else strategy


def _random_states() -> list[Tensor]:
    """The random states of the CPU and of every CUDA device."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


class _Counter:
    """Counts the evaluations of the functions in all couplings."""

    def __init__(self, net: nn.Module) -> None:
        self.calls = 0
        for function in {part.function for part in net.modules() if isinstance(part, Coupling)}:  # some are shared
            function.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


def _cotangent(y: Tensor) -> Tensor:
    """Different for every element, so that errors don't cancel."""
    return torch.linspace(0.5, 1.5, y.numel(), device=y.device).to(y.dtype).view(y.shape)


def _copied(value: Value) -> Value:
    def copied(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex())

    return map_value(copied, value)


def _outermost(net: nn.Module) -> list[Sequential]:
    """The containers that may take a strategy and are in no other."""
    if isinstance(net, Sequential):
        return [net]
    return [chain for child in net.children() for chain in _outermost(child)]


def _compared(strategy: Strategy, reference: Left, found: Left) -> StrategyReport:
    values, _ = _largest_error(reference.values, found.values)
    gradients, worst = _largest_error(reference.gradients, found.gradients)
    buffers, _ = _largest_error(reference.buffers, found.buffers)
    same = all(map(torch.equal, reference.random, found.random))
    return StrategyReport(
        strategy, values, gradients, worst, buffers < 1e-6, same, found.memory, found.evaluations, found.drift
    )


def _largest_error(expected: dict[str, Tensor | None], found: dict[str, Tensor | None]) -> tuple[float, str]:
    """Relative to each tensor's size; what is next to nothing beside the largest is rounding, and let pass."""
    least = 1e-4 * max((_norm(t) for t in expected.values() if t is not None), default=0.0)
    worst = (0.0, "")
    for key, a in expected.items():
        b = found[key]
        if a is None and b is None:
            continue
        if a is None or b is None:
            size = _norm(cast("Tensor", b if a is None else a))
            error = math.inf if size > least else 0.0
        else:
            wide = torch.promote_types(a.dtype, torch.float64)
            a, b = a.to(wide), b.to(wide)
            same = (a == b) | ((a != a) & (b != b))  # infinities, too: their difference is no number
            error = _norm(torch.where(same, 0, a - b)) / (
                max(_norm(torch.where(same, a.nan_to_num(), a)), least) or 1.0
            )
        worst = max(worst, (math.inf if math.isnan(error) else error, key))
    return worst


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t.detach().to(torch.promote_types(t.dtype, torch.float64))))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _fault(row: StrategyReport, limit: float) -> str | None:
    if not row.values <= limit:
        return f"an output is another one, off by {row.values:.0e}"
    if not row.gradients <= limit:
        return f"the gradient of {row.worst} is off by {row.gradients:.0e}"
    reconstruct = row.strategy.reconstruct if isinstance(row.strategy, Budget) else row.strategy
    if isinstance(reconstruct, Reconstruct) and row.drift is not None and not row.drift <= reconstruct.drift_error:
        return f"the reconstructed input is off by {row.drift:.0e}"
    if not row.buffers:
        return "the buffers differ after the step"
    return None if row.random else "the random stream is elsewhere after the step"


class _Recorder(Chain):
    """Runs the layers with plain autograd and writes down what went in and what came out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(cast("Any", net), Store())
        self.runs: list[tuple[Any, str, Any, Any, Any, Replay]] = []

    def step(self, layer: Any, method: str, function: Any, value: Any, condition: Any) -> Any:
        replay = Replay(Survey([layer]), list(leaves(value)))
        result = replay.record(lambda: function(layer, value, condition=condition))
        self.runs.append((layer, method, value, condition, result, replay))
        return result

    def seal(self, value: Any) -> Any:
        return value


class _Copy(InvertibleModule[Any, Any]):
    """The identity, as a layer that computes something."""

    @property
    def keeps_grid(self) -> bool:
        return True

    def forward(self, x: Any, *, condition: Value | None = None) -> Any:
        return map_value(torch.clone, x)

    def inverse(self, y: Any, *, condition: Value | None = None) -> Any:
        return map_value(torch.clone, y)


def _first_cause(net: nn.Module, x: Value, condition: Value | None, limit: float) -> str | None:
    """Tries every layer by itself on what it was given, the last one first."""
    net = copy.deepcopy(net)
    for part in net.modules():
        if isinstance(part, Sequential):
            part.backprop = None
    recorder = _Recorder(net)
    options = {} if condition is None else {"condition": condition}
    with torch.no_grad(), running(recorder):
        net(x, **options)
    names: dict[nn.Module, str] = {module: name for name, module in cast("Any", net.named_modules())}
    for layer, method, value, given, result, replay in reversed(recorder.runs):
        why = _why(layer, method, value, given, result, replay, limit)
        if why is not None:
            return f"The first cause, from the output, is layer {names.get(layer, '?')!r}, {_check.name(layer)}: {why}."
    return None


def _why(layer: Any, method: str, value: Any, condition: Any, result: Any, replay: Replay, limit: float) -> str | None:
    def listed(v: Any) -> dict[str, Tensor | None]:
        return {str(i): t for i, t in enumerate(leaves(v))}

    with torch.no_grad():
        with replay.again():
            again = getattr(cast("Any", type(layer)), method)(layer, value, condition=condition)
        error, _ = _largest_error(listed(result), listed(again))
        if error > (1e-3 * limit if layer.grid is None else 0):
            return f"run again on the same input it returns something else, off by {error:.0e}"
        output: Any = result[0] if method.endswith("log_det") else result
        if layer.bijective:
            with replay.again():
                back = opposite(layer, method)(output, condition)
            error, _ = _largest_error(listed(value), listed(back))
            if error > math.sqrt(limit) * 1e-2:
                return f"its inverse is off by {error:.0e}"
    mapped = layer if method.startswith("forward") else Inverse(layer)  # behind a layer that keeps the chain's entry
    chain = Sequential(_Copy(), mapped, grid=layer.grid)
    alone = [train_once(chain, strategy, value, condition) for strategy in (Store(), Reconstruct())]
    error, where = _largest_error(alone[0].gradients, alone[1].gradients)
    return f"the gradient of its {where} is off by {error:.0e}" if error > limit else None


def _short(strategy: Strategy) -> str:
    """Its name, with the options that are not as usual."""
    defaults = {each.name: each.default for each in fields(cast("Any", strategy))}
    options = [f"{k}={v!r}" for k, v in vars(strategy).items() if v != defaults.get(k)]
    return f"{type(strategy).__name__}({', '.join(options)})"
