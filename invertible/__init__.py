"""Deep networks that run backwards: composable invertible layers for PyTorch."""

from ._estimate import ErrorEstimate
from .affine import Affine
from .backprop._drift import DriftError, DriftWarning, InexactInverseError, NondeterministicBlockError
from .backprop.strategies import Budget, Recompute, Reconstruct, Store
from .conditional import Conditional
from .coupling import Coupling
from .grid import Grid, StreamRangeError
from .identity import Identity
from .inverse import Inverse
from .latent import EnvironmentMismatch, Latent
from .module import Exactness, InvertibleModule, Value
from .pad_split import PadSplit
from .parallel import Parallel
from .permute import Permute
from .pixel_unshuffle import PixelUnshuffle
from .rational_quadratic_spline import RationalQuadraticSpline
from .sequential import Sequential
from .split import Merge, Split
from .swap import Swap
from .transform import Additive, CouplingTransform
from .volume_preserving import VolumePreserving

__version__ = "0.1.0"

__all__ = [
    "Additive",
    "Affine",
    "Budget",
    "Conditional",
    "Coupling",
    "CouplingTransform",
    "DriftError",
    "DriftWarning",
    "EnvironmentMismatch",
    "ErrorEstimate",
    "Exactness",
    "Grid",
    "Identity",
    "InexactInverseError",
    "Inverse",
    "InvertibleModule",
    "Latent",
    "Merge",
    "NondeterministicBlockError",
    "PadSplit",
    "Parallel",
    "Permute",
    "PixelUnshuffle",
    "RationalQuadraticSpline",
    "Recompute",
    "Reconstruct",
    "Sequential",
    "Split",
    "Store",
    "StreamRangeError",
    "Swap",
    "Value",
    "VolumePreserving",
]
