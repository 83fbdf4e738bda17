"""Densities in the plane that are known, to see what a flow makes of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Generator, Tensor

__all__ = ["DENSITIES", "Checkerboard", "Density", "Smeared"]


class Density(ABC):
    """A density of two features, with samples, that is known.

    Example:
        >>> density = DENSITIES["mixture"]()
        >>> x = density.sample(1000, Generator().manual_seed(0))
        >>> x.shape, bool((x.abs() <= density.extent).all())
        (torch.Size([1000, 2]), True)
        >>> round(-float(density.log_prob(x).mean()), 1)  # its entropy in nats: no flow has a better mean log-density
        1.7
    """

    extent: float
    """Nearly all of it is in ``[-extent, extent]``, in both features."""

    @abstractmethod
    def sample(self, count: int, generator: Generator) -> Tensor:
        """Draws points ``(count, 2)``."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density in nats of points ``(count, 2)``."""


class Smeared(Density):
    r"""Points spread evenly over places, each with normal noise: :math:`x = c_k + \sigma\,\epsilon`.

    A curve is a chain of places that are closer than the noise is wide; for the log-density it is just these.

    Args:
        places: ``(count, 2)``.
        noise: the standard deviation, in the unit of the places.
        extent: as for :class:`Density`.

    Example:
        >>> one = Smeared(torch.zeros(1, 2), noise=1.0, extent=3.0)
        >>> one.log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    def __init__(self, places: Tensor, *, noise: float, extent: float) -> None:
        self.places, self.noise, self.extent = places, noise, extent

    def sample(self, count: int, generator: Generator) -> Tensor:
        chosen = torch.randint(len(self.places), (count,), generator=generator)
        return self.places[chosen] + self.noise * torch.randn(count, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        scaled = torch.cdist(x.double(), self.places.double()) / self.noise
        norm = math.log(2 * math.pi * self.noise**2 * len(self.places))
        return (torch.logsumexp(-0.5 * scaled.square(), 1) - norm).to(x.dtype)


class Checkerboard(Density):
    r"""Uniform on the dark squares of a board of 4 × 4 squares of side 1, :math:`\log p = -\log 8` there.

    Example:
        >>> Checkerboard().log_prob(torch.tensor([[-1.5, -1.5], [-0.5, -1.5]]))
        tensor([-2.0794,    -inf])
    """

    extent = 2.2

    def sample(self, count: int, generator: Generator) -> Tensor:
        column = torch.randint(4, (count,), generator=generator)
        row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
        return torch.stack((column, row), 1) - 2 + torch.rand(count, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        square = x.floor()
        inside = (x.abs() <= 2).all(1) & (square.sum(1) % 2 == 0)
        return torch.where(inside, -math.log(8.0), -math.inf)


def _moons() -> Density:
    angle = math.pi * (torch.arange(1024) + 0.5) / 1024
    upper = torch.stack((angle.cos() - 0.5, angle.sin() - 0.25), 1)
    return Smeared(1.4 * torch.cat((upper, -upper)), noise=0.1, extent=2.6)


def _spirals() -> Density:
    turn = 3 * math.pi * ((torch.arange(1024) + 0.5) / 1024).sqrt()
    arm = torch.stack((-turn.cos(), turn.sin()), 1) * turn[:, None] / 4.5
    return Smeared(torch.cat((arm, -arm)), noise=0.08, extent=2.6)


def _mixture() -> Density:
    angle = 2 * math.pi * torch.arange(8) / 8
    return Smeared(1.6 * torch.stack((angle.cos(), angle.sin()), 1), noise=0.2, extent=2.6)


DENSITIES: dict[str, Callable[[], Density]] = {
    "moons": _moons,
    "checkerboard": Checkerboard,
    "spirals": _spirals,
    "mixture": _mixture,
}
"""By name; mixture: of eight normal distributions on a circle."""
