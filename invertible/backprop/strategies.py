"""What a network keeps for its gradients: the choice, apart from how it is carried out."""

import math
import operator
from dataclasses import dataclass
from typing import Literal

from invertible import _check

__all__ = ["Budget", "Recompute", "Reconstruct", "Store", "Strategy"]


class Strategy:
    """What a :class:`~invertible.Sequential` keeps for its gradients. It changes neither values nor keys.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge())
        >>> strategy: Strategy = Recompute(every=3)
        >>> net.backprop = strategy
    """


@dataclass(frozen=True)
class Store(Strategy):
    """Keeps every activation: plain autograd.

    The only strategy with second derivatives of everything, and the fastest where memory suffices.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge(), backprop=Store())
    """


@dataclass(frozen=True)
class Recompute(Strategy):
    """Keeps the input of each segment and runs the segment forward once more in the backward pass.

    A segment is ``every`` consecutive layers of a :class:`~invertible.Sequential`; containers inside are entered and
    have segments of their own. Hooks of the layers of a segment fire in the replay too, if ``every`` is not 1.

    Unlike :func:`torch.utils.checkpoint.checkpoint` it counts batch-norm statistics once.

    Source: Chen et al., 2016, https://arxiv.org/abs/1604.06174

    Args:
        every: the number of layers in a segment; the square root of the depth is a good choice.

    Raises:
        TypeError: if ``every`` is not an integer.
        ValueError: if it is less than 1.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge(), backprop=Recompute(every=2))
    """

    every: int = 1

    def __post_init__(self) -> None:
        _at_least_one("Recompute", "every", self.every)


@dataclass(frozen=True)
class Reconstruct(Strategy):
    r"""Keeps what enters and what leaves the network; in between each layer's input comes from its ``inverse``.

    Memory does not grow with depth. What has no exact inverse is kept: the inputs of layers that are not bijective or
    iterative, of the layer after an injective one (its zeros come back as noise, which batch norm would amplify), and
    of layers without a fused rule that draw random numbers.

    A reconstructed input is off by rounding, and a deep network may amplify it. At the end of each backward pass the
    *drift* says how much: at 1024 probe elements of each stream that the first layer returned,

    .. math::
        \mathrm{drift} = \lVert \hat x - x \rVert_2 / \lVert x \rVert_2,

    the largest of the streams; without the denominator where that is zero. Layers whose input is kept are compared by
    what they return when they run again, which is off only if a function does not repeat itself. The figure is read
    once, which synchronises a GPU once per step.

    Source: RevNet (Gomez et al., 2017), https://arxiv.org/abs/1707.04585

    Args:
        anchor_every: keep the input of every so manieth layer that computes something, which bounds the drift;
            ``None`` for no such anchors.
        drift_warn: the relative error above which a :class:`DriftWarning` is given.
        drift_error: the relative error above which ``backward`` raises a :class:`DriftError`, before any optimiser
            has used the gradients.
        on_drift: ``"raise"`` as described; ``"record"`` reads nothing, so that it does not synchronise, and leaves the
            figure at ``net.drift`` and the verdict, on the device, at ``net.drift_flag``.
        locate: compare every layer's input, not only the first, so that warnings and errors name the first bad layer.
            It keeps 4 KiB more per stream and layer.

    Raises:
        TypeError: if ``anchor_every`` is not an integer.
        ValueError: if ``anchor_every`` is less than 1, a threshold is negative or no number, ``drift_warn`` is above
            ``drift_error``, or ``on_drift`` is another word.

    Example:
        >>> net = Sequential(Split(), *(Coupling(nn.Tanh()) for _ in range(9)), Merge(), backprop=Reconstruct())
        >>> net(torch.rand(1, 4, requires_grad=True)).sum().backward()
        >>> net.drift < 1e-4
        True
    """

    anchor_every: int | None = None
    drift_warn: float = 1e-4
    drift_error: float = 1e-2
    on_drift: Literal["raise", "record"] = "raise"
    locate: bool = False

    def __post_init__(self) -> None:
        if self.anchor_every is not None:
            _at_least_one("Reconstruct", "anchor_every", self.anchor_every)
        for option in ("drift_warn", "drift_error"):
            value = getattr(self, option)
            if not isinstance(value, (int, float)) or math.isnan(value) or value < 0:
                raise ValueError(f"Reconstruct: {option} must be a number that is not negative, got {value!r}.")
        if self.drift_warn > self.drift_error:
            raise ValueError(
                f"Reconstruct: drift_warn must not be above drift_error, got {self.drift_warn} and {self.drift_error}."
            )
        if self.on_drift not in {"raise", "record"}:
            raise ValueError(f'Reconstruct: on_drift must be "raise" or "record", got {self.on_drift!r}.')


@dataclass(frozen=True)
class Budget(Strategy):
    """Keeps as much as fits: chooses for each layer, so that a step stays within a budget and the added work is least.

    A layer is stored, its input is kept and it runs again, or its input is reconstructed; then some of the matrix
    products and convolutions inside its function may be kept, which are not computed again: those that are small and
    cost much. So memory is not flat in depth, but what fits.

    The choice is planned at the first forward pass for each kind of input, by counting bytes and operations on tensors
    without data: ``net.plan(x)`` shows it. Nothing is timed, so every process plans the same.

    The budget is for the most bytes of tensors at any time of a step, with what a layer needs while it runs again and
    the network's output. Beside it are parameters, their gradients, the optimizer's state, the input, the loss, and the
    workspaces of kernels, which nobody can count before; functions that are compiled count as if they were not.

    Args:
        bytes: the budget.
        reconstruct: how the inputs that are reconstructed are checked.

    Raises:
        TypeError: if ``bytes`` is not an integer, or ``reconstruct`` is no :class:`Reconstruct`.
        ValueError: if ``bytes`` is less than 1, or ``reconstruct`` has anchors, which are chosen here; in the forward
            pass, if not even the smallest possible plan is within the budget.

    Example:
        >>> net = Sequential(Split(), *(Coupling(nn.Tanh()) for _ in range(9)), Merge(), backprop=Budget(20_000))
        >>> x = torch.rand(16, 32, requires_grad=True)
        >>> net(x).sum().backward()
        >>> net.plan(x).peak <= 20_000
        True
    """

    bytes: int
    reconstruct: Reconstruct = Reconstruct()

    def __post_init__(self) -> None:
        if isinstance(self.bytes, bool):
            raise TypeError(f"Budget: bytes must be an integer, got {self.bytes!r}.")
        _at_least_one("Budget", "bytes", self.bytes)
        object.__setattr__(
            self, "bytes", operator.index(self.bytes)
        )  # tensors are equal to none: plans are found by it
        if not isinstance(self.reconstruct, Reconstruct):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Budget: reconstruct must be a Reconstruct(), got {self.reconstruct!r}.")
        if self.reconstruct.anchor_every is not None:
            raise ValueError(f"Budget: chooses by itself what is kept, got {self.reconstruct!r} with anchors.")


def _at_least_one(who: str, option: str, value: int) -> None:
    if _check.integer(who, option, value) < 1:
        raise ValueError(f"{who}: {option} must be at least 1, got {value}.")
