"""Reorders the channels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._value import Value, is_channels_last
from .module import InvertibleModule

__all__ = ["Permute"]


class Permute(InvertibleModule[Tensor, Tensor]):
    r"""Reorders the channels of a tensor.

    .. math::
        y_{:, c} = x_{:, p(c)}

    The order is a buffer, so a checkpoint carries it. :meth:`reversed` and :meth:`random` make the usual ones.

    Args:
        permutation: for each output channel, the input channel that it takes.

    Shape:
        - Input: ``(batch, channels, ...)`` with ``channels == len(permutation)``
        - Output: the same

    Raises:
        TypeError: if a channel of ``permutation`` is not an integer, or the input is not a tensor.
        ValueError: if ``permutation`` does not hold each of ``0 ... channels - 1`` once, or the input has another
            number of channels.

    Example:
        >>> Permute([2, 0, 1])(torch.tensor([[10., 11., 12.]]))
        tensor([[12., 10., 11.]])
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int]) -> None:
        super().__init__()
        order = [_check.integer("Permute", "a channel", channel) for channel in permutation]
        if fault := _fault(order):
            raise ValueError(f"Permute: {fault}")
        self.register_buffer("permutation", torch.tensor(order))

    @classmethod
    def reversed(cls, channels: int) -> "Permute":
        """Returns the layer that puts the last channel first."""
        return cls(range(channels)[::-1])

    @classmethod
    def random(cls, channels: int, *, seed: int) -> "Permute":
        """Returns a layer whose order is drawn from ``seed``, once; the caller's random numbers are not touched."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return cls([int(channel) for channel in torch.randperm(channels, generator=generator, device="cpu")])

    @property
    def isometric(self) -> bool:
        return True

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        return _take(self._check(x), self.permutation)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        return _take(self._check(y), torch.argsort(self.permutation))

    def _check(self, x: Tensor) -> Tensor:
        x = _check.is_tensor(self, x)
        if x.shape[1] != len(self.permutation):
            raise _check.value_error(self, f"expected {len(self.permutation)} channels", x)
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A corrupt order would give a layer that is not invertible, and no error.
        order = state_dict.get(f"{prefix}permutation")
        if isinstance(order, Tensor) and not order.is_meta and order.shape == self.permutation.shape:
            fault = _fault([int(channel) for channel in order])
            if fault:
                raise ValueError(f"{_check.name(self)}: {prefix}permutation: {fault}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]

    def extra_repr(self) -> str:
        return f"channels={len(self.permutation)}"


def _fault(order: list[int]) -> str:
    """Says what keeps a list from being a permutation; nothing, if it is one."""
    if not order:
        return "expected at least one channel, got []."
    if sorted(order) != list(range(len(order))):
        return f"expected each of the channels 0 ... {len(order) - 1} once, got {order[:8]}{'...' * (len(order) > 8)}."
    return ""


def _take(x: Tensor, channels: Tensor) -> Tensor:
    if is_channels_last(x):  # index_select would return the default layout
        return x.movedim(1, -1).index_select(-1, channels).movedim(-1, 1)
    return x.index_select(1, channels)
