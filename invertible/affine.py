"""Scales and shifts a stream."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import _check
from .transform import CouplingTransform

__all__ = ["Affine"]

_SCALES = ("half-to-one", "sigmoid", "exp-clamped")


class Affine(CouplingTransform):
    r"""Scales and shifts: :math:`(x; a, t) \mapsto s(a)\, x + t`, with the log-determinant :math:`\sum \log s(a)`.

    What the function says of an element are two numbers, first all :math:`a` and then all :math:`t`. The scale is

    .. math::
        \text{"half-to-one":}\quad s = \tfrac12 + \tfrac12 \sigma(a + 2), \qquad
        \text{"sigmoid":}\quad s = \sigma(a + 2), \qquad
        \text{"exp-clamped":}\quad s = \exp(c \tanh(a / c)),

    with :math:`\sigma` the logistic function and :math:`c` = ``clamp``.

    An affine coupling is invertible on paper; in floating point a deep stack of them need not be. With :math:`s` near 0
    the inverse divides by next to nothing; with :math:`s > 1` values grow from coupling to coupling, and feed the next
    function. In single precision, with untrained functions, 32 and 100 couplings deep, with functions three times too
    strong and inputs ten times too large, "half-to-one" was the only scale whose inverse stayed within 1e-4 in every
    case: the relative error was 2e-5 at most, against 8e-6 for :class:`Additive`. Glow's sigmoid reached 0.02, since it
    shrinks by 0.88 each time; :math:`\exp(2 \tanh(a/2))` was at 5e-5 where half-to-one was at 9e-7, and infinite
    where that was at 5e-7; a plain exponential is not offered. "half-to-one" shrinks, too, at half the sigmoid's rate:
    a stack loses volume, which other layers must restore. Stronger functions are too much for every transform. The
    figures are those of ``python -m benchmarks.stability``; the page "Couplings and conditions" has them all.

    Scale and logarithm are computed in single precision at least, whatever the function's precision.

    Cost: the scale, a product and a sum per element; the function has twice the channels.

    Source: RealNVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803; "sigmoid" is that of Glow's released code
    (Kingma & Dhariwal, 2018), https://arxiv.org/abs/1807.03039; the clamp with tanh is RealNVP's, without its learned
    factor, in the form of FrEIA, https://github.com/vislearn/FrEIA, whose default of 2 it has.

    Args:
        scale: which of the three.
        clamp: the limit of :math:`|\log s|` of "exp-clamped"; ``None`` for 2.

    Shape:
        - Input: the stream ``(batch, channels, ...)`` and parameters ``(batch, 2 * channels, ...)``
        - Output: as the stream

    Raises:
        TypeError: if ``clamp`` is not a number.
        ValueError: if ``scale`` is another word, ``clamp`` is not positive, or there is a clamp for another scale.

    Example:
        >>> Affine()(torch.ones(1, 1), torch.tensor([[0., 3.]]))
        tensor([[3.9404]])
    """

    parameters_per_element = 2

    def __init__(
        self,
        *,
        scale: Literal["half-to-one", "sigmoid", "exp-clamped"] = "half-to-one",
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        if scale not in _SCALES:
            raise ValueError(f"Affine: scale must be 'half-to-one', 'sigmoid' or 'exp-clamped', got {scale!r}.")
        if clamp is not None and scale != "exp-clamped":
            raise ValueError(f"Affine: only the scale 'exp-clamped' has a clamp, got clamp={clamp!r} for {scale!r}.")
        self.scale = scale
        self.clamp = 2.0 if clamp is None else _check.number("Affine", "clamp", clamp)
        if not 0 < self.clamp < math.inf:
            raise ValueError(f"Affine: clamp must be positive and finite, got {clamp!r}.")

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        a, shift = _split(x, parameters)
        return (x * self._scale(a) + shift).to(x.dtype)

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        a, shift = _split(y, parameters)
        return ((y - shift) / self._scale(a)).to(y.dtype)

    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, parameters), self._log_det(x, parameters)

    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y, parameters), -self._log_det(y, parameters)

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}" + (f", clamp={self.clamp}" if self.scale == "exp-clamped" else "")

    def _log_det(self, x: Tensor, parameters: Tensor) -> Tensor:
        return self._log_scale(_split(x, parameters)[0]).flatten(1).sum(1).to(x.dtype)

    def _scale(self, a: Tensor) -> Tensor:
        if self.scale == "half-to-one":
            return 0.5 + 0.5 * torch.sigmoid(a + 2)
        return torch.sigmoid(a + 2) if self.scale == "sigmoid" else self._log_scale(a).exp()

    def _log_scale(self, a: Tensor) -> Tensor:
        if self.scale == "half-to-one":
            return torch.log1p(
                -0.5 * torch.sigmoid(-2 - a)
            )  # s is 1 - ½σ(-a-2): near 1, its logarithm keeps its digits
        return logsigmoid(a + 2) if self.scale == "sigmoid" else self.clamp * torch.tanh(a / self.clamp)


def _split(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """What the scales are made of, and the shifts, in single precision at least."""
    wide = parameters.to(torch.promote_types(torch.promote_types(x.dtype, parameters.dtype), torch.float32))
    return wide[:, : x.shape[1]], wide[:, x.shape[1] :]
