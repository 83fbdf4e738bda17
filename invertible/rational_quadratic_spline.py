"""Bends a stream by monotonic splines."""

import math

import torch
from torch import Tensor

from . import _check
from .transform import CouplingTransform

__all__ = ["RationalQuadraticSpline"]

_Side = tuple[Tensor, Tensor]

_LEAST = 1e-5
"""Below it, the knots of a spline could coincide in single precision."""

_BOUNDS = 1e-30, 1e30
"""Beyond them, the widths of bins could be 0 or infinite in single precision."""


class RationalQuadraticSpline(CouplingTransform):
    r"""Maps each element by a monotonic rational-quadratic spline on ``[-bound, bound]``, and as it is outside.

    Between the knots :math:`(x_k, y_k)` and :math:`(x_{k+1}, y_{k+1})`, with width :math:`w`, height :math:`h`, slope
    :math:`s = h / w`, the derivatives :math:`d_k` at the knots, :math:`\theta = (x - x_k) / w` and
    :math:`\varphi = 1 - \theta`,

    .. math::
        y = y_k + h\, \frac{s \theta^2 + d_k \theta \varphi}{\beta}, \quad
        \frac{dy}{dx} = s^2\, \frac{d_{k+1} \theta^2 + 2 s \theta \varphi + d_k \varphi^2}{\beta^2}, \quad
        \beta = s (\theta^2 + \varphi^2) + (d_k + d_{k+1})\, \theta \varphi.

    The function says ``3 * bins - 1`` numbers of an element: ``bins`` for the widths and as many for the heights, of
    which softmax makes shares of the interval, and one for the derivative :math:`\exp(L \tanh(r / L))` at each inner
    knot, in :math:`(m, 1/m)` with :math:`L = -\log m` and :math:`m` = ``min_derivative``. At the ends it is 1. Where
    all numbers are 0 the spline is the identity.

    It has the log-determinant :math:`\sum \log (dy/dx)`. The inverse solves the quadratic equation of a bin. Written
    with :math:`\epsilon = (y - y_k) / h`, its discriminant is a sum of two squares, and its root a quotient of positive
    terms,

    .. math::
        D = d_k (1 - \epsilon) - d_{k+1}\, \epsilon, \quad R = \sqrt{D^2 + 4 s^2 \epsilon (1 - \epsilon)}, \quad
        \theta = \frac{2 s \epsilon}{2 s \epsilon + D + R},

    where for negative :math:`D` the sum :math:`D + R` is :math:`4 s^2 \epsilon (1 - \epsilon) / (R - D)`. So no
    rounding makes it negative, and finite parameters and elements never give NaN.

    It is computed in single precision at least, and keeps some ``3 * bins`` numbers for each element while it runs. The
    inverse amplifies rounding by up to :math:`1 / (dy/dx)`: flat bins cost digits.

    Cost: ``3 * bins - 1`` numbers of the function for each element, and the search for its bin.

    Source: Neural Spline Flows (Durkan et al., 2019), section 3.1, Eqs. (4) to (8), https://arxiv.org/abs/1906.04032,
    with its linear tails; the inverse is its Eqs. (6) to (8), the same root rearranged. Its derivatives are softplus of
    the function's output and have no upper limit; with a limit on both sides, as in Zuko,
    https://github.com/probabilists/zuko, the least derivative inside a bin has one, too.

    Args:
        bins: the number of bins, at least 1.
        bound: half the width of the interval, in the unit of the stream; from 1e-30 to 1e30.
        min_width: the least width of a bin, as a share of the interval.
        min_height: the least height of a bin, as a share of the interval.
        min_derivative: the least derivative at an inner knot; its inverse is the greatest.

    Shape:
        - Input: the stream ``(batch, channels, ...)`` and parameters ``(batch, (3 * bins - 1) * channels, ...)``
        - Output: as the stream

    Raises:
        TypeError: if ``bins`` is not an integer, or another option is not a number.
        ValueError: if ``bins`` is not positive, ``bound`` is not from 1e-30 to 1e30, ``min_width`` or ``min_height``
            is not from 1e-5 to below ``1 / bins``, or ``min_derivative`` is not from 1e-5 to below 1.

    Example:
        >>> spline = RationalQuadraticSpline(bins=2, bound=1)
        >>> x = torch.tensor([[-0.5, 0.25, 7.]])
        >>> spline(x, torch.zeros(1, 15))
        tensor([[-0.5000,  0.2500,  7.0000]])
        >>> parameters = torch.linspace(-2, 2, 15)[None]
        >>> y, log_det = spline.forward_and_log_det(x, parameters)
        >>> torch.allclose(spline.inverse(y, parameters), x, atol=1e-6)
        True
    """

    def __init__(
        self,
        *,
        bins: int = 8,
        bound: float = 3.0,
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.bins = _check.integer(who, "bins", bins)
        if self.bins < 1:
            raise ValueError(f"{who}: bins must be at least 1, got {bins}.")
        self.bound = _check.number(who, "bound", bound)
        if not _BOUNDS[0] <= self.bound <= _BOUNDS[1]:
            raise ValueError(f"{who}: bound must be from {_BOUNDS[0]:g} to {_BOUNDS[1]:g}, got {bound!r}.")
        self.min_width = _share(who, "min_width", min_width, 1 / self.bins)
        self.min_height = _share(who, "min_height", min_height, 1 / self.bins)
        self.min_derivative = _share(who, "min_derivative", min_derivative, 1)
        self.parameters_per_element = 3 * self.bins - 1

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        return self._forward(x, parameters)[0]

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        return self._inverse(y, parameters)[0]

    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, log_derivative = self._forward(x, parameters)
        return y, log_derivative.flatten(1).sum(1).to(x.dtype)

    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        x, log_derivative = self._inverse(y, parameters)
        return x, -log_derivative.flatten(1).sum(1).to(y.dtype)

    def extra_repr(self) -> str:
        return f"bins={self.bins}, bound={self.bound:g}"

    def _forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The values, and the logarithms of their derivatives."""
        inside, wide, (left, width), (low, height), ends = self._bin(x, parameters, inverse=False)
        theta = ((wide - left) / width).clamp(0, 1)
        phi = ((left + width - wide) / width).clamp(0, 1)
        slope, between = height / width, theta * phi
        beta = slope * (theta * theta + phi * phi) + (ends[0] + ends[1]) * between
        y = low + height * (slope * theta * theta + ends[0] * between) / beta
        log_derivative = _log_derivative(slope, ends, theta, phi)
        return torch.where(inside, y.to(x.dtype), x), torch.where(inside, log_derivative, 0.0)

    def _inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The values, and the logarithms of the derivatives of :meth:`_forward` there."""
        inside, wide, (left, width), (low, height), ends = self._bin(y, parameters, inverse=True)
        up = ((wide - low) / height).clamp(0, 1)
        down = ((low + height - wide) / height).clamp(0, 1)
        slope = height / width
        near, far = 2 * slope * up, 2 * slope * down
        difference = ends[0] * down - ends[1] * up  # D
        root = (difference * difference + near * far).sqrt()  # R
        larger = torch.where(difference >= 0, root + difference, root - difference)
        other = torch.where(difference >= 0, larger, near * far / larger)  # D + R, without a difference
        theta, phi = near / (near + other), other / (near + other)
        log_derivative = _log_derivative(slope, ends, theta, phi)
        x = left + width * theta
        return torch.where(inside, x.to(y.dtype), y), torch.where(inside, log_derivative, 0.0)

    def _bin(self, x: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor, _Side, _Side, _Side]:
        """Which elements are inside, all of them in the precision of the work, and the bin of each.

        Of a bin: where it begins and how large it is, in x and in y, and the derivatives at its ends.
        """
        work = torch.promote_types(torch.promote_types(x.dtype, parameters.dtype), torch.float32)
        numbers = parameters.to(work).reshape(x.shape[0], self.parameters_per_element, *x.shape[1:])
        widths, heights, derivatives = torch.split(numbers, [self.bins, self.bins, self.bins - 1], dim=1)
        across, along = self._knots(widths, self.min_width), self._knots(heights, self.min_height)
        limit = -math.log(self.min_derivative)
        one = torch.ones_like(widths[:, :1])
        derivatives = torch.cat((one, (limit * torch.tanh(derivatives / limit)).exp(), one), 1)
        inside = (x >= -self.bound) & (x <= self.bound)
        wide = x.to(work).clamp(-self.bound, self.bound)
        inner = (along if inverse else across)[:, 1:-1]
        index = (wide.unsqueeze(1) >= inner).sum(1, keepdim=True)

        def at(values: Tensor, offset: int) -> Tensor:
            return values.gather(1, index + offset).squeeze(1)

        def side(knots: Tensor) -> _Side:
            start = at(knots, 0)
            return start, at(knots, 1) - start

        return inside, wide, side(across), side(along), (at(derivatives, 0), at(derivatives, 1))

    def _knots(self, logits: Tensor, least: float) -> Tensor:
        """From -bound to bound, which are met exactly."""
        shares = least + (1 - least * self.bins) * torch.softmax(logits, 1)
        inner = 2 * self.bound * shares[:, :-1].cumsum(1) - self.bound
        end = torch.full_like(logits[:, :1], self.bound)
        return torch.cat((-end, inner, end), 1)


def _log_derivative(slope: Tensor, ends: _Side, theta: Tensor, phi: Tensor) -> Tensor:
    between = theta * phi
    beta = slope * (theta * theta + phi * phi) + (ends[0] + ends[1]) * between
    above = ends[1] * theta * theta + 2 * slope * between + ends[0] * phi * phi
    return 2 * slope.log() + above.log() - 2 * beta.log()


def _share(who: str, option: str, value: float, limit: float) -> float:
    number = _check.number(who, option, value)
    if not _LEAST <= number < limit:
        raise ValueError(f"{who}: {option} must be from {_LEAST:g} to below {limit:g}, got {value!r}.")
    return number
