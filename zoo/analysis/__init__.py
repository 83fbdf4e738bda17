"""The analyses of the i-RevNet paper, each of any network: ``python -m zoo.analysis NAME --checkpoint RUN``."""

from zoo.analysis.blocks import block_names, features_at, inverse_from
from zoo.analysis.classifiers import Scores, best_cost, class_scores, standardized
from zoo.analysis.contraction import (
    Contraction,
    class_distances,
    contraction_by_depth,
    draw_contraction,
    effective_dimension,
)
from zoo.analysis.curves import Course, course_of, courses_of, draw_curves
from zoo.analysis.depth import Features, averages_by_depth, blocks_of, features_by_depth
from zoo.analysis.dimensionality import Dimensionality, accuracy_by_components, draw_dimensionality
from zoo.analysis.interpolation import Interpolation, draw_interpolations, equal_steps, interpolate, write_animation
from zoo.analysis.jacobian import Jacobian, LargestValues, basis_size, largest_singular_values
from zoo.analysis.metamers import Metamers, draw_metamers, find_metamers, head_sees
from zoo.analysis.parts import Parts, key_of
from zoo.analysis.perturbation import Perturbation, draw_perturbation, perturb
from zoo.analysis.projection import nearest_sums, rectified_projection
from zoo.analysis.roundoff import RoundOff, draw_roundoff, noises, relative_inversion_errors
from zoo.analysis.sensitivity import BlockSensitivity, Sensitivity, draw_sensitivity, sensitivity_at, sensitivity_cost
from zoo.analysis.separation import Separation, draw_separation, separation_by_depth
from zoo.analysis.spectrum import Spectrum, SpectrumCost, draw_spectra, parts_of, singular_values, spectrum_cost
from zoo.analysis.study import Chosen, choose
from zoo.analysis.subject import Subject, open_subject, reversible

__all__ = [
    "BlockSensitivity",
    "Chosen",
    "Contraction",
    "Course",
    "Dimensionality",
    "Features",
    "Interpolation",
    "Jacobian",
    "LargestValues",
    "Metamers",
    "Parts",
    "Perturbation",
    "RoundOff",
    "Scores",
    "Sensitivity",
    "Separation",
    "Spectrum",
    "SpectrumCost",
    "Subject",
    "accuracy_by_components",
    "averages_by_depth",
    "basis_size",
    "best_cost",
    "block_names",
    "blocks_of",
    "choose",
    "class_distances",
    "class_scores",
    "contraction_by_depth",
    "course_of",
    "courses_of",
    "draw_contraction",
    "draw_curves",
    "draw_dimensionality",
    "draw_interpolations",
    "draw_metamers",
    "draw_perturbation",
    "draw_roundoff",
    "draw_sensitivity",
    "draw_separation",
    "draw_spectra",
    "effective_dimension",
    "equal_steps",
    "features_at",
    "features_by_depth",
    "find_metamers",
    "head_sees",
    "interpolate",
    "inverse_from",
    "key_of",
    "largest_singular_values",
    "nearest_sums",
    "noises",
    "open_subject",
    "parts_of",
    "perturb",
    "rectified_projection",
    "relative_inversion_errors",
    "reversible",
    "sensitivity_at",
    "sensitivity_cost",
    "separation_by_depth",
    "singular_values",
    "spectrum_cost",
    "standardized",
    "write_animation",
]
