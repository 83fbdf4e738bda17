"""Chooses for each layer what is kept, so that a step stays within a budget and the added work is least."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

__all__ = ["Option", "Stage", "cheapest", "kept_by", "least_peak", "peak_of"]


@dataclass(frozen=True)
class Option:
    """A way to run one layer: what it keeps, what it adds, and the most bytes that are there meanwhile.

    Bytes are above those that are kept for other layers. A tensor has a number; tensors that share memory share a
    storage, which has a number, too, and is kept once.
    """

    choice: Any
    work: int
    """What is computed again."""
    inside: int
    """Bytes that are kept and nobody else knows."""
    keeps: frozenset[int]
    """Storages of its inputs and outputs that are kept."""
    forward: int
    """The most bytes that its forward pass allocates at a time, outputs included."""
    backward: int
    """The same of its backward pass, with what is kept inside."""
    needs_output: bool = False
    """Whether its outputs must come back, or be kept by the layer behind."""
    check: int = 0
    """The most bytes while an input that came back, and that nobody awaits, is compared with what is known of it."""
    probes: int = 0
    """Bytes that are kept to compare with."""
    keeps_input: bool = False
    """Whether it is of no help to the layer before: that one's outputs must be kept."""
    values: int = 0
    """More bytes of its backward pass, if it only moves elements and its inputs are awaited: gradients move anyway."""


@dataclass(frozen=True)
class Stage:
    """One layer at its place: its options, and the tensors that enter and leave it, each with its storage."""

    options: Sequence[Option]
    inputs: Sequence[tuple[int, int]]
    outputs: Sequence[tuple[int, int]]
    moves: bool = False
    """Whether it only moves elements: what its outputs need, its inputs can give, and it needs nothing itself."""
    waiting: frozenset[int] = frozenset()
    """Storages of streams that wait beside it."""
    there: frozenset[int] = frozenset()
    """Storages that are there in forward until it has run: its inputs, what waits, and what containers around hold."""

    def only(self, option: Option) -> "Stage":
        """The same with one option."""
        return replace(self, options=(option,))


class _Known(NamedTuple):
    """What the past says to the layers that follow: which tensors must come back, which storages are kept."""

    awaited: frozenset[int]
    kept: frozenset[int]


@dataclass
class _Way:
    """Some layers' choices: bytes kept, work added."""

    kept: int
    work: int
    peak: int
    option: Option | None = None
    before: "_Way | None" = field(default=None, repr=False)

    def options(self) -> list[Option]:
        way: _Way | None = self
        found: list[Option] = []
        while way is not None and way.option is not None:
            found.append(way.option)
            way = way.before
        return found[::-1]


_FEW = 8
"""So many layers that compute something are compared in full."""

_WAYS = 50_000
"""Ways that are followed, over all layers and per state, if there are more: some that differ little are dropped."""


def cheapest(stages: Sequence[Stage], sizes: dict[int, int], budget: float, *, fixed: int = 0) -> list[Option] | None:
    """The options of least added work within a budget of bytes, and of these those that keep least; or ``None``.

    Exact for 8 layers whatever they are, and for many more if these are alike; beyond 50 000 ways some are dropped
    that differ little from others.
    """
    found = _ways(stages, sizes, budget, fixed)
    return min(found, key=lambda way: (way.work, way.kept, way.peak)).options() if found else None


def least_peak(stages: Sequence[Stage], sizes: dict[int, int], *, fixed: int = 0) -> int:
    """The smallest budget that can be kept."""
    idle = [_without_work(stage) for stage in stages]
    low, high = -1, min(way.peak for way in _ways(idle, sizes, float("inf"), fixed))
    while high - low > 1:
        middle = (low + high) // 2
        found = _ways(idle, sizes, middle, fixed)
        low, high = (low, min(way.peak for way in found)) if found else (middle, high)
    return high


def peak_of(stages: Sequence[Stage], sizes: dict[int, int], *, fixed: int = 0) -> int:
    """The peak, if every stage has one option."""
    return _ways(stages, sizes, float("inf"), fixed)[0].peak


def kept_by(stages: Sequence[Stage], sizes: dict[int, int]) -> list[int]:
    """Bytes that each layer keeps above those before it, if every stage has one option."""
    found: list[int] = []
    way = _ways(stages, sizes, float("inf"), 0)[0]
    while way.before is not None:
        found.append(way.kept - way.before.kept)
        way = way.before
    return found[::-1]


def _without_work(stage: Stage) -> Stage:
    return replace(stage, options=[replace(option, work=0) for option in stage.options])


def _ways(stages: Sequence[Stage], sizes: dict[int, int], budget: float, fixed: int) -> list[_Way]:
    """The best ways through all layers: none is worse than another in bytes and in work."""
    last = {s: i for i, stage in enumerate(stages) for s in (*_storages(stage.inputs, stage.outputs), *stage.there)}
    last |= {
        storage: len(stages) for stage in stages[-1:] for storage in _storages(stage.outputs)
    }  # it may be kept at the end
    states: dict[_Known, list[_Way]] = {_Known(frozenset(), frozenset()): [_Way(fixed, 0, fixed)]}
    few = sum(len(stage.options) > 1 for stage in stages) <= _FEW
    most = None if few else max(64, _WAYS // len(stages))
    for i, stage in enumerate(stages):
        new: dict[_Known, list[_Way]] = {}
        for known, ways in states.items():
            for option in stage.options:
                after, added, forward, backward = _through(stage, option, known, sizes)
                after = _Known(after.awaited, frozenset(s for s in after.kept if last[s] > i and sizes[s]))
                for way in ways:
                    kept = way.kept + added
                    peak = max(way.peak, way.kept + forward, kept + backward)
                    if peak <= budget:
                        new.setdefault(after, []).append(_Way(kept, way.work + option.work, peak, option, way))
        states = {known: _best(ways, most) for known, ways in new.items()}
    closed = [_closed(stages, way, known, sizes) for known, ways in states.items() for way in ways]
    return [way for way in closed if way.peak <= budget]


def _storages(*tensors: Sequence[tuple[int, int]]) -> set[int]:
    return {storage for each in tensors for _, storage in each}


def _through(stage: Stage, option: Option, known: _Known, sizes: dict[int, int]) -> tuple[_Known, int, int, int]:
    """What is known after a layer; bytes that it adds; the most forward above those kept before, backward after."""
    beside = stage.waiting - known.kept
    there = sum(sizes[s] for s in (stage.there | _storages(stage.inputs) | beside) - known.kept)
    awaited = {t for t, _ in stage.inputs if t in known.awaited}
    keeps = set(option.keeps)
    if option.keeps_input:
        keeps |= {storage for t, storage in stage.inputs if t in awaited}
    kept = known.kept | keeps
    compared = len(awaited) < len(stage.inputs)
    added = option.inside + option.probes * compared + sum(sizes[s] for s in keeps - known.kept)
    left = known.awaited - {t for t, _ in stage.inputs}
    if option.needs_output or (stage.moves and awaited):
        left |= {t for t, _ in stage.outputs}
    backward = option.backward - option.inside
    if compared:
        backward = max(backward, option.check)
    if stage.moves and awaited:
        backward += option.values
    backward += 2 * sum(sizes[s] for s in beside)
    return _Known(frozenset(left), frozenset(kept)), added, there + option.forward, backward


def _closed(stages: Sequence[Stage], way: _Way, known: _Known, sizes: dict[int, int]) -> _Way:
    """The end: what is awaited is kept there."""
    storages = dict(stages[-1].outputs) if stages else {}
    kept = way.kept + sum(sizes[s] for s in {storages[t] for t in known.awaited if t in storages} - known.kept)
    return _Way(kept, way.work, max(way.peak, kept), way.option, way.before)


def _best(ways: Iterable[_Way], most: int | None) -> list[_Way]:
    """Those that no other beats in bytes kept and in work; at most so many, if it is said, the extremes among them."""
    front: list[_Way] = []
    for way in sorted(ways, key=lambda way: (way.kept, way.work, way.peak)):
        if not front or way.work < front[-1].work:
            front.append(way)
    if most is None or len(front) <= most:
        return front
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)]
