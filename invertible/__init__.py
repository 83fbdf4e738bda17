"""Deep networks that run backwards: composable invertible layers for PyTorch."""

from ._estimate import ErrorEstimate
from ._fixed_point import ConvergenceError, Solved
from .act_norm import ActNorm
from .activations import ConstantAffine, LeakyReLU, Sigmoid, Softplus, Tanh
from .affine import Affine
from .augment import Augment
from .backprop._drift import DriftError, DriftWarning, InexactInverseError, NondeterministicBlockError
from .backprop.strategies import Budget, Recompute, Reconstruct, Store
from .batch_norm import BatchNorm
from .conditional import Conditional
from .coupling import Coupling
from .dequantize import Dequantize
from .elementwise import Elementwise
from .flow import Flow, FlowDistribution
from .grid import Grid, StreamRangeError
from .identity import Identity
from .inverse import Inverse
from .invertible_linear import InvertibleLinear
from .latent import EnvironmentMismatch, Latent
from .module import Exactness, InvertibleModule, Value
from .pad import Pad
from .pad_split import PadSplit
from .parallel import Parallel
from .permute import Permute
from .pixel_unshuffle import PixelUnshuffle
from .rational_quadratic_spline import RationalQuadraticSpline
from .reshape import Reshape
from .residual import Residual
from .sequential import Sequential
from .split import Merge, Split
from .swap import Swap
from .transform import Additive, CouplingTransform
from .volume_preserving import VolumePreserving
from .wavelets import Haar, LeGall53

__version__ = "0.1.0"

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "Augment",
    "BatchNorm",
    "Budget",
    "Conditional",
    "ConstantAffine",
    "ConvergenceError",
    "Coupling",
    "CouplingTransform",
    "Dequantize",
    "DriftError",
    "DriftWarning",
    "Elementwise",
    "EnvironmentMismatch",
    "ErrorEstimate",
    "Exactness",
    "Flow",
    "FlowDistribution",
    "Grid",
    "Haar",
    "Identity",
    "InexactInverseError",
    "Inverse",
    "InvertibleLinear",
    "InvertibleModule",
    "Latent",
    "LeGall53",
    "LeakyReLU",
    "Merge",
    "NondeterministicBlockError",
    "Pad",
    "PadSplit",
    "Parallel",
    "Permute",
    "PixelUnshuffle",
    "RationalQuadraticSpline",
    "Recompute",
    "Reconstruct",
    "Reshape",
    "Residual",
    "Sequential",
    "Sigmoid",
    "Softplus",
    "Solved",
    "Split",
    "Store",
    "StreamRangeError",
    "Swap",
    "Tanh",
    "Value",
    "VolumePreserving",
]
