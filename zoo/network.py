"""What the networks of this zoo share: their images, and chains of invertible layers that a strategy trains."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from invertible import Budget, Grid, Latent, Sequential
from invertible.backprop import Plan, Strategy, strategies_apply
from zoo._dimensions import AVERAGE, BATCH_NORM, INPUT, SIZES, SIZES_IN_PROSE
from zoo._sharing import plan, share
from zoo.state import Stateful, name_of

__all__ = ["InvertibleNetwork", "ReversibleNetwork", "check_dtype", "check_images", "pooling_head"]


def check_images(
    who: str,
    x: Tensor,
    *,
    in_channels: int,
    size_divisor: int,
    total_stride: int,
    training: bool,
    dimensions: int = 2,
) -> None:
    """Refuses what is no batch of images for a network; of signals in one dimension, or of volumes in three.

    Args:
        who: the network's name, for the message.
        x: what it was given.
        in_channels: how many channels an image has.
        size_divisor: what height and width must be divisible by, in pixels.
        total_stride: pixels from one value of its last stage to the next.
        training: whether it is in training mode, in which batch norm must see two values at least.
        dimensions: the number of spatial ones.

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: if it has another shape, or in training mode a single value would be left of it.
    """
    image, sizes = INPUT[dimensions], SIZES_IN_PROSE[dimensions]
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{who}: expected a tensor of {image}s, got an object of type {type(x).__name__}.")
    shape = tuple(x.shape)
    if len(shape) != 2 + dimensions or shape[1] != in_channels:
        rule = f"expected {image}s of shape (batch, {in_channels}, {SIZES[dimensions]})"
        raise ValueError(f"{who}: {rule}, got a tensor of shape {shape}.")
    if any(size % size_divisor or not size for size in shape[2:]):
        rule = f"be divisible by {size_divisor}" if size_divisor > 1 else "not be 0"
        raise ValueError(f"{who}: {sizes} must {rule}, got a tensor of shape {shape}.")
    if training and shape[0] == 1 and all(size <= total_stride for size in shape[2:]):
        raise ValueError(
            f"{who}: in training mode batch norm needs more than one value per channel in the last stage, "
            f"got a tensor of shape {shape}. Take a larger batch or {image}, or net.eval()."
        )
    if not x.is_floating_point():
        fix = " Scale them: x / 255." if dimensions == 2 else " Convert them: x.float()."
        raise TypeError(f"{who}: expected floating-point {image}s, got dtype {x.dtype}.{fix}")


def check_dtype(net: nn.Module, x: Tensor, what: str) -> None:
    """Refuses a tensor in another dtype than the network's weights, unless autocast converts it.

    Args:
        net: whose weights count. If they are in several dtypes, each will do.
        x: what it was given.
        what: the word for it, for the message.

    Raises:
        TypeError: if the dtype is another.
    """
    first = next(net.parameters(), x).dtype
    if x.dtype == first or any(p.dtype == x.dtype for p in net.parameters()):
        return
    kinds = {"cpu", x.device.type} - {"meta"}
    if any(torch.is_autocast_enabled(kind) for kind in kinds) or type(net).__name__.startswith("FSDP"):
        return  # FSDP may cast weights where they are used
    raise TypeError(
        f"{name_of(net)}: expected {what} of the weights' dtype, {first}, got {x.dtype}. "
        f"Convert them, x.to({first}), or the network, net.to({x.dtype})."
    )


def pooling_head(channels: int, num_classes: int, dimensions: int = 2) -> nn.Sequential:
    """Batch norm, ReLU, global average, and a linear classifier; with 0 classes none."""
    return nn.Sequential(
        BATCH_NORM[dimensions](channels),
        nn.ReLU(),
        AVERAGE[dimensions](1),
        nn.Flatten(),
        nn.Linear(channels, num_classes) if num_classes else nn.Identity(),
    )


class ReversibleNetwork(Stateful, abc.ABC):
    """A classifier with one chain of invertible layers or more, and perhaps other layers between them.

    ``backprop`` and ``grid`` apply to all chains; what is outside of them is stored, and computed without a grid.
    ``load_state_dict`` loads whole or not at all, and raises a :class:`~zoo.errors.StateError`.

    Example:
        >>> import zoo
        >>> net = zoo.revnet38()
        >>> [len(chain) for chain in net.chains]  # couplings of each stage, two to a unit
        [6, 4, 4]
        >>> net.backprop = Recompute()
        >>> net.chains[2].backprop
        Recompute(every=1)
    """

    num_classes: int
    """Of the head; 0: it has no classifier, and the network returns pooled features."""
    in_channels: int
    """Of the images."""
    feature_channels: int
    """Of the last values, which the head sees."""
    size_divisor: int
    """What height and width must be divisible by, in pixels."""
    total_stride: int
    """Pixels from one value of the last stage to the next."""
    dimensions: int = 2
    """The number of spatial ones: 1 for signals, 2 for images, 3 for volumes."""
    head: nn.Sequential
    """What makes logits, or pooled features, of the last values."""

    def __init__(self) -> None:
        super().__init__()
        self._budget: Budget | None = None
        self._shares: list[Budget] = []  # of the chains, as they were set last
        self._divided: dict[Any, list[Budget]] = {}  # by what a plan depends on

    @property
    @abc.abstractmethod
    def chains(self) -> Sequence[Sequential]:
        """The chains, in the order in which data meets them."""

    @property
    def backprop(self) -> Strategy | None:
        """What the chains keep for their gradients: :class:`~invertible.Store` if ``None``. Keys and values stay.

        A :class:`~invertible.Budget` is for all of them together, and not for what is outside of them. It is divided
        at the first forward pass for each kind of input: see :meth:`plan`.
        """
        return self._budget if self._shared() else self.chains[0].backprop

    @backprop.setter
    def backprop(self, strategy: Strategy | None) -> None:
        for chain in self.chains:
            chain.backprop = strategy
        self._budget = strategy if isinstance(strategy, Budget) and len(self.chains) > 1 else None
        self._shares, self._divided = [self._budget] * len(self.chains) if self._budget else [], {}

    def _shared(self) -> bool:
        """Whether the chains share a budget: none has got a strategy of its own since it was set."""
        return self._budget is not None and [chain.backprop for chain in self.chains] == self._shares

    def plan(self, x: Tensor) -> Plan:
        """Says what each layer of the chains keeps for its gradients when ``x`` goes forward, and what that costs.

        Nothing is computed: ``x`` may be on the meta device. What is outside of the chains is not counted. Where there
        are several, the output of each is held until the one before it is at work in backward, and so is what it keeps:
        the peak is the largest of each chain's own with all that those before it hold. Of a budget each chain gets the
        least that it needs, and of what it could use above that the same part.

        Raises:
            TypeError, ValueError: as ``forward`` does for what is no image, and :meth:`invertible.Sequential.plan`
                for a strategy that can't be planned or a budget that is too small.
        """
        self._check_image(x)
        names = {part: name for name, part in self.named_modules()}
        chains = {names[chain]: chain for chain in self.chains}
        budget = self._budget if self._shared() else None
        return plan(name_of(self), chains, self._inputs(x), list(self.parameters()), budget)

    def _inputs(self, x: Tensor) -> Sequence[Any]:
        """For each chain a value like what it is given when ``x`` goes forward: shapes, strides and dtypes count."""
        return [x]

    def _share(self, x: Tensor) -> None:
        """Divides a budget among the chains; to be called before the first of several."""
        if self._budget is None or not strategies_apply() or not self._shared():
            return
        if torch.compiler.is_dynamo_compiling():
            from zoo._uncompiled import run_uncompiled  # imports the compiler, which is slow

            run_uncompiled(self._divide, x)
        else:
            self._divide(x)

    def _divide(self, x: Tensor) -> None:
        if (budget := self._budget) is None:
            return
        key = self._situation(x)
        if key not in self._divided:
            found = share(name_of(self), self.chains, self._inputs(x), budget).budgets
            self._divided[key] = [dataclasses.replace(budget, bytes=each) for each in found]
        if self._divided[key] != self._shares:
            self._shares = self._divided[key]
            for chain, each in zip(self.chains, self._shares, strict=True):
                chain.backprop = each

    def _situation(self, x: Tensor) -> Any:
        """What plans depend on."""
        kinds = sorted({"cpu", x.device.type} - {"meta"})
        autocast = tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)
        parameters = tuple((p.shape, p.dtype, p.requires_grad) for p in self.parameters())
        modes = tuple(part.training for part in self.modules())
        return (x.shape, x.stride(), x.dtype, x.device, x.requires_grad), autocast, parameters, modes, self.grid

    @property
    def drift(self) -> float | None:
        """How far off reconstructed values were in the last backward pass, the largest of the chains' figures.

        See :class:`~invertible.Reconstruct`. ``None`` if none were reconstructed.
        """
        return max((chain.drift for chain in self.chains if chain.drift is not None), default=None)

    @property
    def drift_flag(self) -> Tensor | None:
        """Whether a chain's drift was too large: see :attr:`invertible.Sequential.drift_flag`."""
        flags = [chain.drift_flag for chain in self.chains]
        found = [flag for flag in flags if flag is not None]
        return torch.stack(found).any() if found else None

    @property
    def grid(self) -> Grid | None:
        """The grid that the values of the chains are on, or ``None``; see :class:`~invertible.Grid`.

        On one the inverse of a chain is exact to the last bit. It is set by a name, such as ``"exact"``, a grid, or
        ``None``. Keys and values stay.
        """
        return self.chains[0].grid

    @grid.setter
    def grid(self, grid: Grid | Literal["exact", "exact32"] | None) -> None:
        for chain in self.chains:
            chain.grid = grid

    def compile_functions(self, **options: Any) -> None:
        """Compiles the functions of all couplings; see :meth:`invertible.InvertibleModule.compile_functions`."""
        for chain in self.chains:
            chain.compile_functions(**options)

    def _check_image(self, x: Tensor) -> None:
        check_images(
            name_of(self),
            x,
            in_channels=self.in_channels,
            size_divisor=self.size_divisor,
            total_stride=self.total_stride,
            training=self.training,
            dimensions=self.dimensions,
        )
        self._check_dtype(x, f"{INPUT[self.dimensions]}s")

    def _check_dtype(self, x: Tensor, what: str) -> None:
        check_dtype(self, x, what)

    def _dtype(self) -> torch.dtype:
        """That of the head, which is none of the grid."""
        return next(self.head.parameters()).dtype


class InvertibleNetwork(ReversibleNetwork):
    """A network whose one chain, the body, maps the image itself, so that it comes back from the features.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", blocks=(1, 1, 1)).eval()
        >>> net.grid = "exact"
        >>> net.inverse(net.features(torch.ones(1, 3, 32, 32))).unique().tolist()
        [1.0]
        >>> [name for name, value in net.trace(torch.ones(1, 3, 32, 32))]
        ['0', '1', '2', '3', '4', '5']
    """

    body: Sequential
    """From the image to the features."""

    @property
    def chains(self) -> list[Sequential]:
        """The body: it is one chain."""
        return [self.body]

    def features(self, x: Tensor) -> Tensor:
        """Returns the last value of the body: ``(batch, feature_channels, ...)``."""
        self._check_image(x)
        return self.body(x)

    def encode(self, x: Tensor) -> Latent:
        """Returns the features with all that their way back depends on; see :meth:`invertible.Sequential.encode`."""
        self._check_image(x)
        return self.body.encode(x)

    def inverse(self, features: Tensor | Latent, *, strict: bool = True) -> Tensor:
        """Returns the image that has these features: bit for bit on a grid, and up to rounding without one.

        A latent of :meth:`encode` has them exactly, or raises an :class:`~invertible.EnvironmentMismatch` that says
        what has changed; with ``strict=False`` it warns.
        """
        if isinstance(features, Latent):
            return self.body.inverse(features, strict=strict)
        self._check_features(features)
        return self.body.inverse(features)

    def trace(self, x: Tensor) -> Iterator[tuple[str, Any]]:
        """Yields the name and the value of each layer of the body, from the image on; the last are the features.

        See :meth:`invertible.Sequential.trace`.
        """
        self._check_image(x)
        return self.body.trace(x)

    def trace_inverse(self, features: Tensor) -> Iterator[tuple[str, Any]]:
        """Yields the name and the input of each layer of the body, from the features back; the last is the image."""
        self._check_features(features)
        return self.body.trace_inverse(features)

    def _check_features(self, features: Tensor) -> None:
        who = name_of(self)
        if not isinstance(features, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{who}: inverse expects the tensor of net.features(x), got {type(features).__name__}.")
        shape = tuple(features.shape)
        if len(shape) != 2 + self.dimensions or shape[1] != self.feature_channels:
            rule = f"features have the shape (batch, {self.feature_channels}, {SIZES[self.dimensions]})"
            raise ValueError(f"{who}: {rule}, got a tensor of shape {shape}. Logits have no inverse.")
        if not all(shape[2:]):
            raise ValueError(f"{who}: {SIZES_IN_PROSE[self.dimensions]} must not be 0, got a tensor of shape {shape}.")
        self._check_dtype(features, "features")

    def _check_dtype(self, x: Tensor, what: str) -> None:
        if self.grid is None:  # which casts what enters
            super()._check_dtype(x, what)
