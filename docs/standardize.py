"""Zero mean and unit variance for each channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from invertible import InvertibleModule, Value


class Standardize(InvertibleModule[Tensor, Tensor]):
    r"""Subtracts a mean from each channel and divides by a standard deviation.

    .. math::
        y_{:, c} = \frac{x_{:, c} - m_c}{s_c}, \qquad \log|\det J| = -n \sum_c \log s_c

    for images of :math:`n` pixels. Mean and deviation are buffers: a checkpoint carries them, and
    no optimizer sees them.

    Args:
        mean: of each channel, in the input's unit.
        std: the standard deviation of each channel, positive, in the input's unit.

    Shape:
        - Input: ``(batch, channels, ...)`` with ``channels == len(mean)``, floating point
        - Output: the same

    Raises:
        TypeError: if the input is not a floating-point tensor.
        ValueError: if ``mean`` and ``std`` differ in length, ``std`` is not positive, or the input
            has another number of channels.

    Example:
        >>> Standardize(mean=[1.0, 2.0], std=[0.5, 2.0])(torch.tensor([[2.0, 4.0]]))
        tensor([[2., 1.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            got = f"{len(mean)} and {len(std)}"
            raise ValueError(f"Standardize: mean and std must have one length, got {got}.")
        if not all(s > 0 for s in std):
            raise ValueError(f"Standardize: std must be positive, got {list(std)}.")
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]))
        self.register_buffer("std", torch.tensor([float(s) for s in std]))

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        mean, std = self._constants(x)
        return (x - mean) / std

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        mean, std = self._constants(y)
        return y * std + mean

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        """Returns the same log-determinant for each sample."""
        _, std = self._constants(x)
        pixels = x.shape[2:].numel()
        return self(x), (-pixels * std.log().sum()).repeat(len(x))

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation in the input's dtype, shaped to fit its channels."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"{self}: expected a floating-point tensor, got {got}.")
        if x.ndim < 2 or x.shape[1] != len(self.mean):
            got = f"a tensor of shape {tuple(x.shape)}"
            raise ValueError(f"{self}: expected {len(self.mean)} channels, got {got}.")
        shape = (-1, *[1] * (x.ndim - 2))
        return self.mean.to(x.dtype).view(shape), self.std.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        return f"channels={len(self.mean)}"
