"""What the networks of this zoo share: their images, and chains of invertible layers that a strategy trains."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from invertible import Budget, Grid, Sequential
from invertible.backprop import Strategy
from zoo._dimensions import AVERAGE, BATCH_NORM, INPUT, SIZES, SIZES_IN_PROSE

__all__ = ["ReversibleNetwork", "check_images", "pooling_head"]


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


def pooling_head(channels: int, num_classes: int, dimensions: int = 2) -> nn.Sequential:
    """Batch norm, ReLU, global average, and a linear classifier; with 0 classes none."""
    return nn.Sequential(
        BATCH_NORM[dimensions](channels),
        nn.ReLU(),
        AVERAGE[dimensions](1),
        nn.Flatten(),
        nn.Linear(channels, num_classes) if num_classes else nn.Identity(),
    )


class ReversibleNetwork(nn.Module, abc.ABC):
    """A classifier with one chain of invertible layers or more, and perhaps other layers between them.

    ``backprop`` and ``grid`` apply to all chains; what is outside of them is stored, and computed without a grid.
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

    @property
    @abc.abstractmethod
    def chains(self) -> Sequence[Sequential]:
        """The chains, in the order in which data meets them."""

    @property
    def backprop(self) -> Strategy | None:
        """What the chains keep for their gradients: :class:`~invertible.Store` if ``None``. Keys and values stay.

        A :class:`~invertible.Budget` is for all of them together: each gets a part of it.
        """
        first = self.chains[0].backprop
        return self._budget if isinstance(first, Budget) and len(self.chains) > 1 else first

    @backprop.setter
    def backprop(self, strategy: Strategy | None) -> None:
        weights = self._weights()
        for chain, weight in zip(self.chains, weights, strict=True):
            if isinstance(strategy, Budget):
                chain.backprop = dataclasses.replace(strategy, bytes=max(strategy.bytes * weight // sum(weights), 1))
            else:
                chain.backprop = strategy
        self._budget = strategy if isinstance(strategy, Budget) else None

    def _weights(self) -> Sequence[int]:
        """In what proportion the chains share a budget."""
        return [1] * len(self.chains)

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
        who = next(kind.__name__ for kind in type(self).__mro__ if not kind.__name__.startswith("FSDP"))
        check_images(
            who,
            x,
            in_channels=self.in_channels,
            size_divisor=self.size_divisor,
            total_stride=self.total_stride,
            training=self.training,
            dimensions=self.dimensions,
        )

    def _dtype(self) -> torch.dtype:
        """That of the head, which is none of the grid."""
        return next(self.head.parameters()).dtype
