"""From whole numbers to real ones, by noise."""

import math

import torch
from torch import Tensor, nn

from . import _check
from ._range import is_unread
from ._tracing import transformed
from ._value import Value
from .module import Exactness, InvertibleModule

__all__ = ["Dequantize"]


class Dequantize(InvertibleModule[Tensor, Tensor]):
    r"""Spreads whole numbers, as those of 8-bit images, over the unit interval by noise: a stochastic map.

    With :math:`L` levels and :math:`d` elements per sample,

    .. math::
        y = (x + u) / L, \quad u \sim \mathcal{U}[0, 1)^d, \qquad x = \lfloor L y \rfloor, \qquad
        \text{log-determinant: } -d \log L

    A density of numbers that are whole can be made as high as one likes. With the noise, a density :math:`p` on the
    unit cube gives a probability of the numbers: :math:`\log P(x) \ge \mathrm{E}_u [\log p(y) - d \log L]`. The
    log-determinant of ``forward`` is the second term, per sample, and that of ``inverse`` is its negative. They are no
    Jacobian's, and add up in a :class:`Sequential` whatever follows. An image in [0, 1] goes in as
    ``(255 * image).round()``.

    The inverse is exact, bit for bit: noise that would round up to the next number is held back, which in float32
    moves it by at most 6e-7 of :math:`x + 1`. So the dtype must tell numbers between two levels apart: float32 up to
    524288 levels, float16 up to 64. What lies outside the unit interval goes to the nearest level; ``off_range`` is
    how far outside it lies. The inverse is constant between jumps, and its gradient is 0.

    ``forward`` refuses what is not on the levels, and to see that it waits for a GPU; while ``torch.compile``,
    ``torch.export`` or ``torch.func`` trace it, it does not look. In ``eval``, too, noise is drawn, from torch's global
    generator, and it is the same in the replay of every strategy of backpropagation. Of the laws of the contract,
    those that compare two outputs of one input are not claimed, as the noise is another one each time:
    ``projects_if_injective``, ``treats_samples_alone`` and ``log_det_matches_autograd``; nor is
    ``derivatives_are_right``, as whole numbers have no neighbours. ``forward(inverse(y))`` is another point of the same
    cell, so the layer is not bijective.

    Cost: a draw for each element.

    Source: RNADE (Uria et al., 2013), https://arxiv.org/abs/1306.0186; the bound is that of Theis et al.,
    2016, https://arxiv.org/abs/1511.01844; in the vocabulary of SurVAE Flows (Nielsen et al., 2020),
    https://arxiv.org/abs/2007.02731, it is the stochastic right inverse of rounding, a generative surjection. Their
    implementation lets numbers round up to the next level (by reading).

    Args:
        levels: how many there are, at least 2: inputs are ``0 ... levels - 1``.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point
        - Output: the same

    Raises:
        TypeError: if ``levels`` is not an integer, or the input is not a floating-point tensor, or of a dtype too
            narrow for the levels.
        ValueError: if there are fewer than 2 levels, or a value is not one of ``0 ... levels - 1``.

    Example:
        >>> x = torch.tensor([[0., 100., 255.]])
        >>> y, log_det = Dequantize().forward_and_log_det(x)
        >>> log_det, Dequantize().inverse(y)
        (tensor([-16.6355]), tensor([[  0., 100., 255.]]))
    """

    stochastic = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride] (always; for _random)

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = _check.integer("Dequantize", "levels", levels)
        if self.levels < 2:
            raise ValueError(f"{_check.name(self)}: there must be at least 2 levels, got {levels}.")

    @property
    def bijective(self) -> bool:
        return False

    @property
    def exactness(self) -> Exactness:
        return Exactness.EXACT

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        x = self._checked(x)
        _check_levels(self, x, self.levels)
        with torch.no_grad():
            # Away from the next number by more than sum, quotient and product can be off together, in a kernel that
            # divides by a reciprocal, too.
            margin = 4 * torch.finfo(x.dtype).eps
            spread = x + torch.rand_like(x, memory_format=torch.preserve_format)
            spread = torch.clamp(spread, x * (1 + margin), (x + 1) * (1 - margin))
            noise = spread - x
        return (x + noise) / self.levels

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        return (self._checked(y) * self.levels).floor().clamp(0, self.levels - 1)

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self(x), self._log_det(x, -1)

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), self._log_det(y, 1)

    def off_range(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        """Returns how far each sample lies outside the unit cube, all of which the noise fills."""
        outside = self._checked(y) - y.clamp(0, 1)
        return torch.linalg.vector_norm(outside.flatten(1), dim=1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def _log_det(self, x: Tensor, sign: int) -> Tensor:
        return x.new_full((x.shape[0],), sign * math.prod(x.shape[1:]) * math.log(self.levels))

    def _checked(self, x: Tensor) -> Tensor:
        x = _check.is_tensor(self, x)
        _check.is_floating(self, x)
        if 16 * self.levels * torch.finfo(x.dtype).eps > 1:
            rule = f"{self.levels} levels need a dtype that tells numbers between them apart"
            raise TypeError(f"{_check.name(self)}: {rule}, got {x.dtype}.")
        return x

    def extra_repr(self) -> str:
        return "" if self.levels == 256 else f"levels={self.levels}"


def _check_levels(module: nn.Module, x: Tensor, levels: int) -> None:
    """Refuses values that are not on the levels, where there is something to read."""
    if transformed() or is_unread() or x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    with torch.no_grad():
        wrong = (x != x.floor()) | (x < 0) | (x >= levels)
        if wrong.any():
            rule = f"expected whole numbers from 0 to {levels - 1}"
            fix = " An image in [0, 1] goes in as (255 * image).round()." if bool(((x >= 0) & (x <= 1)).all()) else ""
            raise ValueError(f"{_check.name(module)}: {rule}, got {x[wrong][0].item():g}.{fix}")
