"""The analyses of the i-RevNet paper, each of any network: ``python -m zoo.analysis NAME --checkpoint RUN``."""

from zoo.analysis.jacobian import Jacobian, LargestValues, basis_size, largest_singular_values
from zoo.analysis.spectrum import Cost, Spectrum, draw_spectra, singular_values, spectrum_cost
from zoo.analysis.subject import Subject, open_subject, reversible

__all__ = [
    "Cost",
    "Jacobian",
    "LargestValues",
    "Spectrum",
    "Subject",
    "basis_size",
    "draw_spectra",
    "largest_singular_values",
    "open_subject",
    "reversible",
    "singular_values",
    "spectrum_cost",
]
