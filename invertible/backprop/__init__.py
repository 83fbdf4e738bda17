"""Gradients without stored activations: what is kept is a strategy, apart from the map.

The strategies themselves, and what they raise, are in :mod:`invertible`.
"""

from ._chain import strategies_apply
from ._replay import is_replaying
from .in_backward import StepInBackward
from .plan import Choice, Plan, PlanRow, plans
from .strategies import Strategy

__all__ = ["Choice", "Plan", "PlanRow", "StepInBackward", "Strategy", "is_replaying", "plans", "strategies_apply"]
