"""Puts networks on grids, lets values in, and checks how large they became."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from . import _check
from ._buffers import in_training
from ._range import note, taken_down
from ._tracing import transformed
from ._value import Value, leaves, map_value
from .grid import Grid, StreamRangeError
from .module import InvertibleModule

__all__ = ["Peak", "admit", "place", "refuse_unfit", "run_on_grid"]

Layer = InvertibleModule[Any, Any]


def refuse_unfit(container: Layer, grid: Grid | None, layers: Iterable[tuple[str, Layer]], prefix: str = "") -> None:
    """Refuses, by name, what can't be on the grid of its container."""
    who = type(container).__name__
    for key, layer in layers:
        path = prefix + key
        own: Grid | None = cast("Any", layer)._own_grid
        if grid is not None and own is not None and own != grid:
            rule = f"layer {path!r} must have the grid of the container around it, {grid}, or None"
            raise ValueError(f"{who}: {rule}, got {own}.")
        if own is None and layer.grid not in {None, grid, container.grid}:
            raise ValueError(
                f"{who}: a layer must be on the grid of its container, {grid}, got layer {path!r}, "
                f"{_check.name(layer)}, on {layer.grid}, which is that of another container. "
                "Set the same grid for both."
            )
        inside = list(cast("Any", layer)._on_grid())
        refuse_unfit(container, grid if own is None else own, inside, f"{path}.")
        if grid is not None and not layer.keeps_grid:
            raise ValueError(
                f"{who}: every layer must keep its values on the grid, got layer {path!r}, {_check.name(layer)}, which "
                "does not (keeps_grid). Leave it outside, or take grid=None."
            )


def place(layer: Layer, grid: Grid | None) -> None:
    """Sets the grid of a layer and of all inside that have none of their own."""
    anything = cast("Any", layer)
    anything._grid = grid if anything._own_grid is None else anything._own_grid
    for _, inner in anything._on_grid():
        place(inner, layer.grid)


class Peak:
    """The largest absolute value of a run on a grid: on the device until it is read."""

    def __init__(self, values: list[Tensor]) -> None:
        self.figure: Tensor | float = torch.stack([v.to(values[0].device) for v in values]).abs().amax()

    def read(self) -> float:
        """Waits for the device."""
        self.figure = float(self.figure)
        return self.figure


def admit(net: Layer, grid: Grid, method: str, value: Any) -> Any:
    """What enters a network, rounded to the grid; what goes backwards must have its dtype at least."""
    _check.is_value(net, value)
    for tensor in leaves(value):
        _check.is_floating(net, tensor)
        if method.startswith("inverse") and torch.promote_types(tensor.dtype, grid.dtype) != tensor.dtype:
            raise TypeError(
                f"{_check.name(net)}: inverse takes the {grid.dtype} values that forward returned, got {tensor.dtype}, "
                "which has lost their last bits. Keep the output as it is; a value from elsewhere is cast by "
                f"y.to({grid.dtype})."
            )
    return map_value(grid.round, value)


def run_on_grid(net: Any, method: str, value: Any, run: Callable[[Any], Any]) -> Any:
    """Returns ``run(value)`` for a network that is called from outside its grid."""
    grid: Grid = net.grid
    value = admit(net, grid, method, value)
    if transformed():
        return run(value)  # there nothing can be read
    with taken_down() as peaks:
        note(leaves(value))
        result = run(value)
    if peaks and not peaks[0].is_meta:
        net._peak = Peak(peaks)
        if grid.on_range == "raise" and not _captured(peaks[0]):
            _judge(net, grid, net._peak.read(), moved=method.startswith("forward") and _counts(net))
    return result


def _counts(net: Layer) -> bool:
    return in_training(net) and any(True for _ in net.buffers())


def _captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _judge(net: Layer, grid: Grid, peak: float, *, moved: bool) -> None:
    if peak < grid.limit:  # strictly, for rounding leads to the limit from above, too; and no NaN passes
        return
    rule = f"on {grid} all values between the layers must be below {grid.limit:g} in size"
    fix = ""
    if peak < 2.0**40:
        better = proposed(replace(grid, dtype=torch.float64), peak)
        fix = f" Take fewer bits or a wider dtype, such as {better}; net.calibrate(x) proposes them."
    late = " The functions' buffers have moved already." if moved else ""
    error = StreamRangeError(f"{type(net).__name__}: {rule}, got {peak:g}.{fix}{late}")
    error.peak, error.limit = peak, grid.limit
    raise error


def proposed(grid: Grid, peak: float) -> Grid:
    """The finest grid of this dtype on which four times the peak is within the limit."""
    size = Grid(0, grid.dtype).limit
    bits = 0
    while bits < 52 and size / 2.0 ** (bits + 1) >= 4 * peak and 2.0 ** (bits + 1) < size:
        bits += 1
    if not size / 2.0**bits >= 4 * peak:  # no number, too
        raise ValueError(f"Grid: no grid of {grid.dtype} holds values of size {peak:g} with two bits to spare.")
    return replace(grid, bits=bits)


def peak_of(net: Any, x: Value, condition: Value | None) -> float:
    """The largest value of a forward run, whatever the limit."""
    with taken_down() as peaks:
        note(leaves(x))
        net._walk("forward", x, condition)
    return Peak(peaks).read() if peaks else 0.0
