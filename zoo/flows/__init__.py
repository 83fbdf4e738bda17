"""Flows of the zoo: densities by invertible networks."""

from zoo.flows.vectors import nice, spline_flow

__all__ = ["nice", "spline_flow"]
