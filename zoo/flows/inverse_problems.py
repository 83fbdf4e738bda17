"""Inverse problems in the plane of which the posterior is known."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor
from torch.distributions import MultivariateNormal

__all__ = ["LinearGaussian", "Problem", "TwoMoons"]


class Problem(ABC):
    """Two unknowns with a prior, and two measurements of them.

    Example:
        >>> problem = LinearGaussian()
        >>> x = problem.posterior(torch.tensor([2.0, 1.5]), 10_000, Generator().manual_seed(0))
        >>> [round(each, 1) for each in x.mean(0).tolist()]
        [0.9, 1.0]
        >>> problem.log_posterior(x[:3], torch.tensor([2.0, 1.5])).shape
        torch.Size([3])
    """

    shown: Tensor
    """Measurements for a picture, ``(count, 2)``."""
    extent: float
    """The unknowns are nearly all in ``[-extent, extent]``."""

    @abstractmethod
    def sample(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draws unknowns and their measurements, both ``(count, 2)``."""

    @abstractmethod
    def log_posterior(self, unknowns: Tensor, measured: Tensor) -> Tensor:
        """The exact log-density in nats of unknowns, each given its measurement, or all the same one ``(2,)``."""

    @abstractmethod
    def posterior(self, measured: Tensor, count: int, generator: Generator) -> Tensor:
        """Draws from the exact posterior of one measurement ``(2,)``."""


class LinearGaussian(Problem):
    r"""Noisy linear measurements of normal unknowns: the posterior is normal.

    .. math::
        x \sim \mathcal{N}(0, I), \quad y = A x + \sigma \epsilon, \qquad
        x \mid y \sim \mathcal{N}(\Sigma A^T y / \sigma^2,\; \Sigma), \quad \Sigma = (I + A^T A / \sigma^2)^{-1}

    with a first row of A that measures both unknowns well and a second one nearly along it.

    Example:
        >>> problem = LinearGaussian()
        >>> x, y = problem.sample(5, Generator().manual_seed(0))
        >>> problem.log_posterior(x, y).shape
        torch.Size([5])
    """

    extent = 3.0

    def __init__(self) -> None:
        self.matrix, self.noise = torch.tensor([[1.0, 1.0], [0.6, 0.9]]), 0.3
        self.shown = torch.tensor([[0.0, 0.0], [2.0, 1.5], [-1.0, 0.0]])
        self.covariance = torch.linalg.inv(torch.eye(2) + self.matrix.T @ self.matrix / self.noise**2)

    def sample(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 2, generator=generator)
        return x, x @ self.matrix.T + self.noise * torch.randn(count, 2, generator=generator)

    def _mean(self, measured: Tensor) -> Tensor:
        return measured @ self.matrix @ self.covariance / self.noise**2

    def log_posterior(self, unknowns: Tensor, measured: Tensor) -> Tensor:
        return MultivariateNormal(self._mean(measured), self.covariance).log_prob(unknowns)

    def posterior(self, measured: Tensor, count: int, generator: Generator) -> Tensor:
        factor = torch.linalg.cholesky(self.covariance)
        return self._mean(measured) + torch.randn(count, 2, generator=generator) @ factor.T


class TwoMoons(Problem):
    r"""Unknowns in a square of which a point on a crescent is measured, shifted: the posterior is two thin crescents.

    .. math::
        \theta \sim \mathcal{U}[-1, 1]^2, \quad
        x = (r \cos a + \tfrac14,\; r \sin a) + \tfrac{1}{\sqrt 2} (-|\theta_1 + \theta_2|,\; \theta_2 - \theta_1)

    with :math:`a \sim \mathcal{U}(-\pi/2, \pi/2)` and :math:`r \sim \mathcal{N}(0.1, 0.01^2)`. A shift has
    two unknowns, and given a point on the crescent both are as likely: samples are drawn by going backwards, and the
    evidence is the share of the crescent from where they stay in the square.

    Source: Greenberg et al., 2019, https://arxiv.org/abs/1905.07488, as in the benchmark of Lueckmann et al., 2021,
    https://arxiv.org/abs/2101.04653, section T.8.

    Example:
        >>> problem = TwoMoons()
        >>> theta = problem.posterior(torch.zeros(2), 100, Generator().manual_seed(0))
        >>> bool(problem.log_posterior(theta, torch.zeros(100, 2)).isfinite().all())
        True
    """

    extent = 1.0

    def __init__(self) -> None:
        self.shown = torch.tensor([[0.0, 0.0], [-0.5, 0.3], [0.3, -0.6]])

    def sample(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        theta = 2 * torch.rand(count, 2, generator=generator) - 1
        return theta, _crescent(count, generator) + _shift(theta)

    def log_posterior(self, unknowns: Tensor, measured: Tensor) -> Tensor:
        point = measured - _shift(unknowns) - torch.tensor([0.25, 0.0])
        radius = point.norm(dim=1)
        log_radius = -0.5 * ((radius - 0.1) / 0.01).square() - math.log(0.01 * math.sqrt(2 * math.pi))
        likely = log_radius - radius.log() - math.log(math.pi)  # of a point, for which r da dr is the area
        inside = (unknowns.abs() <= 1).all(1) & (point[:, 0] >= 0)
        return torch.where(inside, likely - self._evidence(torch.atleast_2d(measured)).log(), -math.inf)

    def posterior(self, measured: Tensor, count: int, generator: Generator) -> Tensor:
        found: list[Tensor] = []
        while sum(map(len, found)) < count:
            theta = _back(_crescent(4 * count, generator), measured)
            found.append(theta[(theta.abs() <= 1).all(1)])
            if not len(found[-1]):
                raise ValueError(f"TwoMoons: expected a measurement that may be, got {measured.tolist()}.")
        drawn = torch.cat(found)
        return drawn[torch.randperm(len(drawn), generator=generator)[:count]]

    def _evidence(self, measured: Tensor) -> Tensor:
        """The integral of the likelihood over the square, by 200 angles and 11 radii within 2.5 deviations."""
        angle = math.pi * ((torch.arange(200) + 0.5) / 200 - 0.5)
        steps = torch.linspace(-2.5, 2.5, 11)
        weight = torch.softmax(-0.5 * steps.square(), 0)
        total = torch.zeros(len(measured))
        for step, share in zip(steps, weight, strict=True):
            theta = _back(_on_crescent(angle, 0.1 + 0.01 * step)[None], measured[:, None])
            total += share * 2 * (theta.abs() <= 1).all(-1).float().mean(-1)
        return total


def _on_crescent(angle: Tensor, radius: Tensor) -> Tensor:
    return torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), -1)


def _crescent(count: int, generator: Generator) -> Tensor:
    angle = math.pi * (torch.rand(count, generator=generator) - 0.5)
    return _on_crescent(angle, 0.1 + 0.01 * torch.randn(count, generator=generator))


def _shift(theta: Tensor) -> Tensor:
    first, second = theta[..., 0], theta[..., 1]
    return torch.stack((-(first + second).abs(), second - first), -1) / math.sqrt(2)


def _back(point: Tensor, measured: Tensor) -> Tensor:
    """For each point both unknowns that shift it to what is measured; infinite ones if none do."""
    shift = measured - point
    sides = torch.stack((shift[..., 0], -shift[..., 0]), -1)
    across = shift[..., 1:]
    theta = torch.stack((sides - across, sides + across), -1) / math.sqrt(2)
    return torch.where((shift[..., :1] <= 0).unsqueeze(-1), theta, math.inf).flatten(-3, -2)
