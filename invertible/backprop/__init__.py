"""Gradients without stored activations: what is kept is a strategy, apart from the map."""

from ._drift import DriftError, DriftWarning
from ._replay import is_replaying
from .strategies import Recompute, Reconstruct, Store, Strategy

__all__ = ["DriftError", "DriftWarning", "Recompute", "Reconstruct", "Store", "Strategy", "is_replaying"]
