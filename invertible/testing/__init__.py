"""The laws of the contract, to be tried on any layer: this library's, or your own.

:func:`check` tries all of them; each law is a function of its own, too. :func:`check_backprop` compares what is kept
for the gradients, :func:`exactness_report` tries what the bits of a network on a grid depend on, and
:func:`measure_memory` counts bytes. ``invertible.testing.strategies`` holds Hypothesis
strategies for drawing inputs; it is imported apart, for it alone needs Hypothesis.
"""

from .backprop import BackpropReport, StrategyReport, check_backprop
from .exactness import ExactnessReport, ExactnessRow, exactness_report
from .laws import (
    LAWS,
    Law,
    check,
    derivatives_are_right,
    inverse_moves_no_buffer,
    is_deterministic,
    is_onto_if_bijective,
    keeps_distances_if_isometric,
    keeps_form,
    keeps_state_in_eval,
    leaves_its_argument_alone,
    log_det_matches_autograd,
    projects_if_injective,
    recovers_its_input,
    survives_copying,
    treats_samples_alone,
)
from .memory import Memory, measure_memory

__all__ = [
    "LAWS",
    "BackpropReport",
    "ExactnessReport",
    "ExactnessRow",
    "Law",
    "Memory",
    "StrategyReport",
    "check",
    "check_backprop",
    "derivatives_are_right",
    "exactness_report",
    "inverse_moves_no_buffer",
    "is_deterministic",
    "is_onto_if_bijective",
    "keeps_distances_if_isometric",
    "keeps_form",
    "keeps_state_in_eval",
    "leaves_its_argument_alone",
    "log_det_matches_autograd",
    "measure_memory",
    "projects_if_injective",
    "recovers_its_input",
    "survives_copying",
    "treats_samples_alone",
]
