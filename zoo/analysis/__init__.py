"""The analyses of the i-RevNet paper, each of any network: ``python -m zoo.analysis NAME --checkpoint RUN``."""

from zoo.analysis.classifiers import Scores, best_cost, class_scores, standardized
from zoo.analysis.contraction import (
    Contraction,
    class_distances,
    contraction_by_depth,
    draw_contraction,
    effective_dimension,
)
from zoo.analysis.depth import Features, averages_by_depth, blocks_of, features_by_depth
from zoo.analysis.dimensionality import Dimensionality, accuracy_by_components, draw_dimensionality
from zoo.analysis.interpolation import Interpolation, draw_interpolations, equal_steps, interpolate, write_animation
from zoo.analysis.jacobian import Jacobian, LargestValues, basis_size, largest_singular_values
from zoo.analysis.roundoff import RoundOff, draw_roundoff, noises, relative_inversion_errors
from zoo.analysis.separation import Separation, draw_separation, separation_by_depth
from zoo.analysis.spectrum import Spectrum, SpectrumCost, draw_spectra, singular_values, spectrum_cost
from zoo.analysis.study import Chosen, choose
from zoo.analysis.subject import Subject, open_subject, reversible

__all__ = [
    "Chosen",
    "Contraction",
    "Dimensionality",
    "Features",
    "Interpolation",
    "Jacobian",
    "LargestValues",
    "RoundOff",
    "Scores",
    "Separation",
    "Spectrum",
    "SpectrumCost",
    "Subject",
    "accuracy_by_components",
    "averages_by_depth",
    "basis_size",
    "best_cost",
    "blocks_of",
    "choose",
    "class_distances",
    "class_scores",
    "contraction_by_depth",
    "draw_contraction",
    "draw_dimensionality",
    "draw_interpolations",
    "draw_roundoff",
    "draw_separation",
    "draw_spectra",
    "effective_dimension",
    "equal_steps",
    "features_by_depth",
    "interpolate",
    "largest_singular_values",
    "noises",
    "open_subject",
    "relative_inversion_errors",
    "reversible",
    "separation_by_depth",
    "singular_values",
    "spectrum_cost",
    "standardized",
    "write_animation",
]
