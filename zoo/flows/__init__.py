"""Flows of the zoo: densities of images, and what they are used for."""

from zoo.flows.images import glow, realnvp
from zoo.flows.sampling import bits_per_dimension, samples

__all__ = ["bits_per_dimension", "glow", "realnvp", "samples"]
