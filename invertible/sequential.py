"""One layer after another."""

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from . import _check
from ._buffers import buffers_stay
from ._environment import decoded, encoded
from ._estimate import with_error
from ._grids import Peak, admit, peak_of, place, proposed, refuse_unfit, run_on_grid
from ._range import is_handed
from ._running import call, walked
from ._value import Value
from .backprop import Plan, Strategy
from .backprop._chain import run
from .backprop._drift import Drift
from .backprop._segments import calls
from .grid import Grid, grid_of
from .latent import Latent
from .module import Exactness, InvertibleModule, check_layer, zero_log_det

__all__ = ["Sequential"]

Layer = InvertibleModule[Any, Any]


class Sequential(InvertibleModule[Any, Any]):
    r"""Applies layers one after another, and backwards in ``inverse``.

    .. math::
        y = f_n(\dots f_2(f_1(x))) \qquad\Longleftrightarrow\qquad x = f_1^{-1}(\dots f_n^{-1}(y))

    Like :class:`torch.nn.Sequential` it is indexed, sliced, iterated and nested, and its keys are the positions
    or, given a mapping, names. A slice shares the layers and keeps their keys, so its ``state_dict`` is a part of
    the whole's. ``reversed(net)`` iterates the layers backwards; the swapped map is ``Inverse(net)``.

    ``backprop`` decides what is kept for the gradients of all layers inside, whatever containers they are in.
    ``grid`` makes all values between the layers multiples of a power of two, on which sums do not round: then
    ``inverse(forward(x))`` is :meth:`snap(x) <snap>`, bit for bit, and reconstructed gradients are those of stored
    activations. ``forward`` rounds what it is given and returns values in the grid's dtype; ``inverse`` takes these.

    The weakest layer decides the properties. Log-determinants add up, except that after an injective layer only
    isometric ones may follow: :math:`\det J^\top J` of a product is no product otherwise.

    Cost: that of the layers.

    Args:
        layers: the layers in the order of ``forward``; or one mapping from names to layers.
        backprop: what is kept for the gradients: :class:`Store`, :class:`Recompute`, :class:`Reconstruct` or
            :class:`Budget`; ``None`` takes the strategy of the container around, and :class:`Store` if there is none.
        grid: ``"exact"``, ``"exact32"``, another :class:`Grid`, or ``None`` for that of the container around, and
            plain floating point if there is none.

    Shape:
        - Input: what the first layer takes; any value, if there is none
        - Output: what the last layer returns

    Raises:
        TypeError: if a layer is not an :class:`InvertibleModule`, ``backprop`` is no strategy, or ``grid`` no grid;
            on a grid, if the input is not floating point, or ``inverse`` is given values in a narrower dtype.
        StreamRangeError: on a grid, if a value reaches its limit.
        ValueError: if a layer does not keep the grid, or is on another one; from the log-determinants, if a layer that
            is not isometric follows an injective one.

    Example:
        >>> net = Sequential(PixelUnshuffle(2), Split(), Coupling(nn.Tanh()), Merge())
        >>> image = torch.rand(1, 3, 4, 4)
        >>> torch.allclose(net.inverse(net(image)), image)
        True
        >>> len(net[:2]), net[-1]
        (2, Merge())
    """

    def __init__(
        self,
        *layers: Layer | Mapping[str, Layer],
        backprop: Strategy | None = None,
        grid: Grid | Literal["exact", "exact32"] | None = None,
    ) -> None:
        super().__init__()
        self.backprop = backprop
        self._peak: Peak | None = None  # of the last run
        if len(layers) == 1 and isinstance(layers[0], Mapping):
            named = dict(layers[0])
        else:
            named = {str(position): layer for position, layer in enumerate(layers)}
        for layer in named.values():
            check_layer("Sequential", layer)
        refuse_unfit(self, grid_of(grid), cast("dict[str, Layer]", named).items())
        for key, layer in named.items():
            self.add_module(key, cast("Layer", layer))
        self.grid = grid

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Layer]:
        return iter(cast("list[Layer]", list(self._modules.values())))

    def __reversed__(self) -> Iterator[Layer]:
        return reversed(list(self))

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> "Sequential": ...
    def __getitem__(self, index: int | slice) -> "Layer | Sequential":
        if not isinstance(index, slice):
            return list(self)[operator.index(index)]
        if index.step is not None and index.step < 0:
            raise ValueError(
                f"Sequential: a slice cannot turn the order round, got step {index.step}. "
                "The swapped map is Inverse(net); reversed(net) iterates the layers backwards."
            )
        return Sequential(dict(list(self._items())[index]), backprop=self.backprop, grid=self.grid)

    @property
    def backprop(self) -> Strategy | None:
        """What is kept for the gradients; ``None`` takes the strategy of the container around, or :class:`Store`.

        It may be changed at any time, and applies to the forward passes from then on. Keys and values stay.
        """
        return self._backprop

    @backprop.setter
    def backprop(self, strategy: Strategy | None) -> None:
        if strategy is not None and not isinstance(strategy, Strategy):  # pyright: ignore[reportUnnecessaryIsInstance]
            fix = " Add parentheses." if isinstance(strategy, type) and issubclass(strategy, Strategy) else ""
            rule = "backprop must be Store(), Recompute(), Reconstruct(), Budget(bytes) or None"
            raise TypeError(f"Sequential: {rule}, got {strategy!r}.{fix}")
        self._backprop = strategy
        self._drift: Drift | None = None  # of the last backward pass

    @property
    def grid(self) -> Grid | None:
        """The grid that all values between the layers are on: its own, or that of the container around; or ``None``.

        It may be set at any time, by a name, a :class:`Grid` or ``None``. Keys and values stay.
        """
        return self._grid

    @grid.setter
    def grid(self, grid: Grid | Literal["exact", "exact32"] | None) -> None:
        new = grid_of(grid)
        refuse_unfit(self, new, self._items())
        self._own_grid = new
        self._peak = None
        place(self, new)

    @property
    def peak(self) -> float | None:
        """The largest absolute value between the layers in the last run on a grid, entry and end included.

        ``None`` before the first one since ``grid`` was set, and in a container whose values come from one around it
        on the same grid: the figure is the outer one's. Not counted under ``torch.compile``, ``torch.export`` and
        ``torch.func``. With ``on_range="record"`` the figure is on the device, and to read it waits for the device.
        """
        return None if self._peak is None else self._peak.read()

    def snap(self, x: Any) -> Any:
        """Returns ``x`` as it enters the network: its tensors rounded to the grid, in the grid's dtype.

        It is what ``inverse(forward(x))`` returns, bit for bit. On the grid ``"exact"`` it holds the values of ``x``
        itself if these are 0 or of a size in [2^-16, 8192) in float32, as those of all 8-bit images, ``x / 255``, are.
        Without a grid it is ``x``.

        Example:
            >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge(), grid="exact")
            >>> x = torch.rand(3, 4)
            >>> torch.equal(net.inverse(net(x)), net.snap(x))
            True
        """
        return x if self.grid is None else admit(self, self.grid, "forward", x)

    def encode(self, x: Any, *, condition: Value | None = None) -> Latent:
        """Returns what ``forward`` makes of ``x``, with all that its exact way back depends on.

        ``inverse(latent)`` then returns ``snap(x)`` bit for bit, or raises an :class:`EnvironmentMismatch` that says
        what has changed: weights, mode, batch, autocast, memory format, threads, device, version of torch and more. It
        runs without gradients and leaves buffers as they are. What it can't see: functions that are not deterministic,
        or depend on more than their input, modules and the settings of torch.

        Raises:
            ValueError: if the network has no grid, or draws random numbers.

        Example:
            >>> net = Sequential(Split(), Coupling(nn.Linear(2, 2)), Merge(), grid="exact")
            >>> x = torch.rand(3, 4)
            >>> torch.equal(net.inverse(net.encode(x)), net.snap(x))
            True
        """
        return encoded(self, x, condition)

    @torch.no_grad()
    def calibrate(self, x: Any, *, condition: Value | None = None) -> Grid:
        """Proposes the finest grid for values like those of ``x``, with two bits to spare.

        It runs forward once, in the mode that the network is in, and leaves grid and buffers as they are.

        Raises:
            ValueError: if the network has no grid to begin with, or none of its dtype is wide enough.

        Example:
            >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge(), grid="exact")
            >>> net.calibrate(torch.full((1, 2), 6.0))
            Grid(48, torch.float64)
        """
        if self.grid is None:
            raise ValueError('Sequential: calibrate needs a grid to begin with. Set net.grid = "exact".')
        with buffers_stay(self):
            return proposed(self.grid, peak_of(self, self.snap(x), condition))

    def plan(self, x: Any, *, condition: Value | None = None) -> Plan:
        """Says what each layer keeps for its gradients when ``x`` goes forward, and what that costs.

        Nothing is computed: ``x`` may be on the meta device.

        Raises:
            ValueError: if ``backprop`` has segments or anchors, or is a :class:`Budget` that is too small.
        """
        from .backprop._budget import planned  # imports what counts, which is slow

        return planned(self, self.snap(x), condition)

    @property
    def drift(self) -> float | None:
        """How far off reconstructed values were in the last backward pass that had any; see :class:`Reconstruct`.

        ``None`` before the first one since ``backprop`` was set. A container inside one with the same strategy is part
        of its chain, and the figure is the outer one's. Under ``on_drift="record"`` the figure is on the device, and to
        read it waits for the device.
        """
        return None if self._drift is None else float(self._drift.figure)

    @property
    def drift_flag(self) -> Tensor | None:
        """Whether the last drift was beyond ``drift_error`` or no number: a boolean tensor on the device, not read.

        For loops that must agree across processes: reduce it with the loss, and skip the step everywhere.
        """
        return None if self._drift is None else self._drift.flag

    def extra_repr(self) -> str:
        options = {"backprop": self.backprop, "grid": self._own_grid}
        return ", ".join(f"{key}={value}" for key, value in options.items() if value is not None)

    def append(self, layer: Layer) -> "Sequential":
        """Adds a layer at the end and returns the container."""
        return self.insert(len(self), layer)

    def insert(self, index: int, layer: Layer) -> "Sequential":
        """Adds a layer before position ``index``, counted as in a list, and returns the container.

        Keys that are positions stay positions; names, and the keys of a slice, stay with their layers.
        """
        check_layer("Sequential", layer)
        refuse_unfit(self, self.grid, [(str(index), layer)])
        place(layer, self.grid)
        items = self._items()
        numbered = [key for key, _ in items] == [str(position) for position in range(len(items))]
        free = next(str(n) for n in range(len(items), 2 * len(items) + 1) if str(n) not in self._modules)
        items.insert(index, (free, layer))
        self._modules.clear()
        for position, (key, each) in enumerate(items):
            self.add_module(str(position) if numbered else key, each)
        return self

    @property
    def bijective(self) -> bool:
        return all(layer.bijective for layer in self)

    @property
    def isometric(self) -> bool:
        return all(layer.isometric for layer in self)

    @property
    def exactness(self) -> Exactness:
        return max((layer.exactness for layer in self), default=Exactness.EXACT)

    @property
    def keeps_grid(self) -> bool:
        return all(layer.keeps_grid for layer in self)

    @property
    def stochastic(self) -> bool:
        return any(layer.stochastic for layer in self)

    @walked
    def forward(self, x: Any, *, condition: Value | None = None) -> Any:
        return self._run("forward", x, condition)

    @walked
    def inverse(self, y: Any, *, condition: Value | None = None, strict: bool = True, estimate: bool = False) -> Any:
        """Applies the inverses from the last to the first.

        Args:
            y: what ``forward`` has returned, or a :class:`Latent` of :meth:`encode`.
            condition: what ``forward`` was given.
            strict: of a latent whose way back may have other bits: raise an :class:`EnvironmentMismatch`, or warn.
            estimate: return the pair of the result and an :class:`ErrorEstimate`, for three times the time.
        """
        known = True
        if isinstance(y, Latent):
            y, known = decoded(self, y, condition, strict=strict)
        if estimate:
            return with_error(self, lambda y: self._run("inverse", y, condition), y, condition, known=known)
        return self._run("inverse", y, condition)

    @walked
    def forward_and_log_det(self, x: Any, *, condition: Value | None = None) -> tuple[Any, Tensor]:
        """Applies the layers and returns the sum of their log-determinants per sample."""
        return self._sum_log_dets("forward_and_log_det", x, condition)

    @walked
    def inverse_and_log_det(self, y: Any, *, condition: Value | None = None) -> tuple[Any, Tensor]:
        """Applies the inverses and returns the sum of their log-determinants per sample."""
        return self._sum_log_dets("inverse_and_log_det", y, condition)

    def trace(self, x: Any, *, condition: Value | None = None) -> Iterator[tuple[str, Any]]:
        """Runs forward and yields each layer's name and output, in the order of computation.

        A ``Sequential`` inside is entered: its layers' names carry its own, with a dot, as in ``state_dict``.

        Example:
            >>> net = Sequential({"down": PixelUnshuffle(2), "split": Split()})
            >>> [name for name, value in net.trace(torch.zeros(1, 3, 4, 4))]
            ['down', 'split']
        """
        return self._trace("forward", self.snap(x), condition)

    def trace_inverse(self, y: Any, *, condition: Value | None = None) -> Iterator[tuple[str, Any]]:
        """Runs backwards and yields each layer's name and the input that it recovered, last layer first."""
        y = y if self.grid is None else admit(self, self.grid, "inverse", y)
        return self._trace("inverse", y, condition)

    def _items(self) -> list[tuple[str, Layer]]:
        return cast("list[tuple[str, Layer]]", list(self._modules.items()))

    def _ordered(self, method: str) -> Iterator[tuple[int, str, Layer]]:
        layers = [(position, key, layer) for position, (key, layer) in enumerate(self._items())]
        return iter(layers) if method.startswith("forward") else reversed(layers)

    def _run(self, method: str, value: Any, condition: Value | None) -> Any:
        walk = partial(self._walk, method, condition=condition)
        return self._enter(method, value, walk, condition)

    def _walk(self, method: str, value: Any, condition: Value | None) -> Any:
        for step in self._calls(method):
            value = step(value, condition)
        return value

    def _enter(self, method: str, value: Any, walk: Callable[[Any], Any], condition: Value | None) -> Any:
        """Runs by its strategy, and on the grid what comes from outside it."""
        through = partial(run, self, self.backprop, walk, method=method, condition=condition)
        if self.grid is None or is_handed(self):
            return through(value)
        return run_on_grid(self, method, value, through)

    def _calls(self, method: str) -> Iterator[Callable[[Any, Value | None], Any]]:
        return calls(self, ((position, layer) for position, _, layer in self._ordered(method)), method, self._run_layer)

    def _run_layer(self, position: int, layer: Layer, method: str, value: Any, condition: Value | None) -> Any:
        try:
            return call(self, layer, method, value, condition)
        except Exception as error:
            error.add_note(f"in Sequential, layer {position} of {len(self)}, {method}")
            raise

    def _trace(self, method: str, value: Any, condition: Value | None) -> Iterator[tuple[str, Any]]:
        for position, key, layer in self._ordered(method):
            if isinstance(layer, Sequential) and type(layer).forward is Sequential.forward:  # fully_shard subclasses
                try:
                    for inner, result in layer._trace(method, value, condition):
                        yield f"{key}.{inner}", result
                        value = result
                except Exception as error:
                    error.add_note(f"in Sequential, layer {position} of {len(self)}, {method}")
                    raise
            else:
                value = self._run_layer(position, layer, method, value, condition)
                yield key, value

    def _sum_log_dets(self, method: str, value: Any, condition: Value | None) -> tuple[Any, Tensor]:
        _check.has_log_det(self, list(self))
        _check.is_value(self, value)

        def sum_up(value: Any) -> tuple[Any, Tensor]:
            total = zero_log_det(value)
            for step in self._calls(method):
                value, log_det = step(value, condition)
                total = total + log_det
            return value, total

        return self._enter(method, value, sum_up, condition)
