"""What a row of the catalogue is, and what rows share: drawn weights, smooth functions, images and streams."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible._value import map_value
from invertible.module import zero_log_det
from invertible.testing import Law
from invertible.testing.strategies import pairs, tensors

Draw = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    layer: type[inv.InvertibleModule]
    build: Callable[[Draw], inv.InvertibleModule]
    """Draws a module, with non-trivial parameters where it has any."""
    input: Callable[[Draw, Any], inv.Value]
    """Draws a valid input of it."""
    condition: Callable[[inv.Value], inv.Value] | None = None
    """Makes a condition that fits an input."""
    exempt: Collection[Law] = ()
    single: float = 1e-4
    """How close values come in single precision: the absolute tolerance."""
    rejects: dict[str, Callable[[], object]] = field(default_factory=dict)
    """Words of the message -> a call that must raise it."""


class ConditionalTanh(nn.Module):
    """A function of a stream and a condition; it has a parameter named ``condition``."""

    def forward(self, x, condition):
        return torch.tanh(x * condition.mean(dim=1).view(-1, *[1] * (x.ndim - 1)))


class Scale(inv.InvertibleModule):
    """A bijection that is not isometric: it has a log-determinant to get wrong."""

    def __init__(self, factor=1.5):
        super().__init__()
        self.factor = factor

    def forward(self, x, *, condition=None):
        return x * self.factor

    def inverse(self, y, *, condition=None):
        return y / self.factor

    def forward_and_log_det(self, x, *, condition=None):
        return self(x), x.new_full((len(x),), self.factor).log() * x[0].numel()


class Same(inv.InvertibleModule):
    """Computes, and changes nothing, whatever the value: a layer after it has its input reconstructed."""

    def forward(self, x, *, condition=None):
        return map_value(lambda t: t * 1.0, x)

    def inverse(self, y, *, condition=None):
        return map_value(lambda t: t / 1.0, y)

    def forward_and_log_det(self, x, *, condition=None):
        return self(x), zero_log_det(x)


def disturbed(module, size=0.2):
    """Moves all parameters away from where they start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape))
    return module


def seeded(draw, make):
    """Makes a module whose initial weights depend on a drawn seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**31 - 1), label="weights"))
        return make().double()


def smooth(channels, out=None, *, norm=False, stride=1):
    """A smooth function of two-dimensional streams, so that finite differences work."""
    layers = [nn.BatchNorm2d(channels)] if norm else []
    layers += [nn.Conv2d(channels, out or channels, 3, padding=1, stride=stride), nn.Tanh()]
    return nn.Sequential(*layers)


def image(draw, channels=3, multiple_of=2):
    return draw(tensors(channels=st.just(channels), dims=st.just(2), multiple_of=multiple_of))


def streams(channels):
    return pairs(channels=st.just(channels), dims=st.just(2), multiple_of=2)


def with_mode(draw, module):
    return module.train(draw(st.booleans(), label="train"))
