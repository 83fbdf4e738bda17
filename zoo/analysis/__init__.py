"""The analyses of the i-RevNet paper, each of any network: ``python -m zoo.analysis NAME --checkpoint RUN``."""

from zoo.analysis.curves import Course, course_of, courses_of, draw_curves
from zoo.analysis.interpolation import Interpolation, draw_interpolations, equal_steps, interpolate, write_animation
from zoo.analysis.jacobian import Jacobian, LargestValues, basis_size, largest_singular_values
from zoo.analysis.parts import Parts, key_of
from zoo.analysis.roundoff import RoundOff, draw_roundoff, noises, relative_inversion_errors
from zoo.analysis.spectrum import Spectrum, SpectrumCost, draw_spectra, parts_of, singular_values, spectrum_cost
from zoo.analysis.subject import Subject, open_subject, reversible

__all__ = [
    "Course",
    "Interpolation",
    "Jacobian",
    "LargestValues",
    "Parts",
    "RoundOff",
    "Spectrum",
    "SpectrumCost",
    "Subject",
    "basis_size",
    "course_of",
    "courses_of",
    "draw_curves",
    "draw_interpolations",
    "draw_roundoff",
    "draw_spectra",
    "equal_steps",
    "interpolate",
    "key_of",
    "largest_singular_values",
    "noises",
    "open_subject",
    "parts_of",
    "relative_inversion_errors",
    "reversible",
    "singular_values",
    "spectrum_cost",
    "write_animation",
]
