"""Flows of the zoo: densities of images and of vectors, and what they are used for."""

from zoo.flows.images import glow, realnvp
from zoo.flows.residual import iresnet
from zoo.flows.sampling import bits_per_dimension, samples
from zoo.flows.vectors import nice, spline_flow

__all__ = ["bits_per_dimension", "glow", "iresnet", "nice", "realnvp", "samples", "spline_flow"]
