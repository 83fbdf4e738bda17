"""Mixes the channels by a trained matrix."""

import abc
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from . import _check
from ._channels import channels_of, has_channels, repeated, wide, without_autocast
from ._tracing import unreadable
from ._value import Value, is_channels_last
from .module import InvertibleModule

__all__ = ["InvertibleLinear"]

_linalg = cast("Any", torch.linalg)

Parametrization = Literal["plu", "householder", "matrix-exponential", "free"]


class InvertibleLinear(InvertibleModule[Tensor, Tensor]):
    r"""Multiplies the channels of each pixel by a trained matrix: an invertible 1×1 convolution.

    .. math::
        y_{:, c} = \sum_d W_{cd}\,x_{:, d} \qquad \log|\det J| = n \log|\det W|

    for n pixels. With C channels, a parametrization costs per call, apart from the C² per pixel of every product:

    ========================  ======================================  =====================  ======================
    parametrization           W                                       log-determinant        inverse
    ========================  ======================================  =====================  ======================
    ``"plu"``                 :math:`P L (U + \mathrm{diag}\,d)`; C³  n Σ log \|d\|; C       triangular solves; C²
                                                                                             per pixel
    ``"householder"``         C reflections, orthogonal; C³           0                      :math:`W^T`; C³
    ``"matrix-exponential"``  :math:`e^A`; several products of C³     n tr A; C              :math:`e^{-A}`; as W
    ``"free"``                any matrix; nothing                     ``slogdet``; C³        LU and solves; C³, and
                                                                                             C² per pixel
    ========================  ======================================  =====================  ======================

    The inverse multiplies errors by up to the condition number of W. That is 1 for ``"householder"``, so that nothing
    but rounding is added whatever is trained; at most :math:`e^{2\lVert A\rVert}` for ``"matrix-exponential"``, which
    reaches the matrices with a positive determinant that have a real logarithm; unbounded for ``"plu"``, whose
    permutation P and signs of d are drawn once and stay (buffers), and for ``"free"``, which may be trained into a
    singular matrix. ``inverse`` of ``"free"`` then raises; for that it waits for the device, except while compiling,
    exporting and under ``torch.func``.

    Each starts as a random rotation, drawn from torch's generator, possibly with a reflection. All is computed in the
    widest dtype of input and parameters, and at least in float32, under autocast too: what must be undone can't be
    computed in 16 bits.

    Cost: C² per pixel, and per call up to C³, by the parametrization; the inverse of two is by solving.

    Source: Glow (Kingma and Dhariwal, 2018), section 3.2, https://arxiv.org/abs/1807.03039, for PLU, here with L
    below, log \|d\| on, and U above the diagonal of one matrix of parameters; Tomczak and Welling, 2016, Eq. (9),
    https://arxiv.org/abs/1611.09630, for reflections, here as one product by the UT transform of Joffrain et al.,
    2006, https://doi.org/10.1145/1141885.1141886; Hoogeboom et al., 2020, https://arxiv.org/abs/2006.01910, for the
    exponential.

    Args:
        channels: of the input.
        parametrization: ``"plu"``, ``"householder"``, ``"matrix-exponential"`` or ``"free"``.

    Shape:
        - Input: ``(batch, channels, ...)`` with any number of spatial dimensions, floating point
        - Output: the same

    Raises:
        TypeError: if ``channels`` is not an integer, or the input not a floating-point tensor.
        ValueError: if the parametrization is unknown, the input has another number of channels, or ``inverse`` finds
            a singular matrix.

    Example:
        >>> mix = InvertibleLinear(3)
        >>> x = torch.rand(2, 3, 4, 4)
        >>> torch.allclose(mix.inverse(mix(x)), x, atol=1e-5)
        True
    """

    def __init__(self, channels: int, *, parametrization: Parametrization = "plu") -> None:
        super().__init__()
        self.channels = channels = channels_of("InvertibleLinear", channels)
        self.parametrization = parametrization
        if not isinstance(cast("object", parametrization), str) or parametrization not in _KINDS:
            rule = "parametrization must be one of " + ", ".join(map(repr, _KINDS))
            raise ValueError(f"InvertibleLinear: {rule}, got {parametrization!r}.")
        self.matrix = _KINDS[parametrization](channels)

    def reset_parameters(self) -> None:
        """Draws another random rotation."""
        self.matrix.reset_parameters()

    def dense(self) -> Tensor:
        """Returns the matrix W, with its graph."""
        with without_autocast(self.matrix.values):
            return self.matrix.dense(wide(*self.parameters()))

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        x = has_channels(self, x, self.channels)
        with without_autocast(x):
            return _multiplied(x, self.matrix.dense(wide(x, *self.parameters())))

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        y = has_channels(self, y, self.channels)
        with without_autocast(y):
            return self.matrix.undo(self, y, wide(y, *self.parameters()))

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self.forward(x), self._log_det(x)  # no call: FSDP would shard in between

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return repeated(self.matrix.log_det(wide(x, *self.parameters())), x)

    def extra_repr(self) -> str:
        kind = "" if self.parametrization == "plu" else f", parametrization={self.parametrization!r}"
        return f"channels={self.channels}{kind}"


class _Matrix(nn.Module, abc.ABC):
    """A trained matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(channels, channels))

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Draws it."""

    @abc.abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix."""

    @abc.abstractmethod
    def undo(self, layer: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiplies the channels by its inverse."""

    @abc.abstractmethod
    def log_det(self, dtype: torch.dtype) -> Tensor:
        """Of the matrix."""

    def _set(self, values: Tensor) -> None:
        with torch.no_grad():
            self.values.copy_(values)


class _PLU(_Matrix):
    """L strictly below the diagonal, the logarithms of |d| on it, U strictly above."""

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("order", torch.arange(channels))
        self.register_buffer("sign", torch.ones(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        permutation, lower, upper = _linalg.lu(_rotation(len(self.sign)))
        diagonal = upper.diagonal()
        self._set(lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag())
        with torch.no_grad():
            self.order.copy_(permutation.argmax(1))
            self.sign.copy_(diagonal.sign())

    def dense(self, dtype: torch.dtype) -> Tensor:
        lower, upper = self._factors(dtype)
        return (lower @ upper).index_select(0, self.order)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values = self.values.to(dtype)
        one = torch.ones_like(self.sign, dtype=dtype)
        diagonal = self.sign.to(dtype) * values.diagonal().exp()
        return values.tril(-1) + one.diag(), values.triu(1) + diagonal.diag()

    def undo(self, layer: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor:
        lower, upper = self._factors(dtype)

        def solved(rows: Tensor) -> Tensor:
            rows = rows.index_select(1, self.order.argsort())
            rows = _linalg.solve_triangular(lower.mT, rows, upper=True, left=False, unitriangular=True)
            return _linalg.solve_triangular(upper.mT, rows, upper=False, left=False)

        return _by_rows(solved, y, dtype)

    def log_det(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype).diagonal().sum()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A corrupt order or sign would give a matrix of another determinant, and no error.
        order, sign = state_dict.get(f"{prefix}order"), state_dict.get(f"{prefix}sign")
        if isinstance(order, Tensor) and not order.is_meta:
            rows = [int(row) for row in order]
            if sorted(rows) != list(range(len(self.order))):
                raise ValueError(f"InvertibleLinear: {prefix}order must be a permutation, got {rows}.")
        if isinstance(sign, Tensor) and not sign.is_meta and not bool((sign.abs() == 1).all()):
            raise ValueError(f"InvertibleLinear: {prefix}sign must be of 1 and -1, got {[float(s) for s in sign]}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]


class _Householder(_Matrix):
    """Reflections at what is orthogonal to the columns; that at a column of zeros is the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._set(_noise(len(self.values)))

    def dense(self, dtype: torch.dtype) -> Tensor:
        values = self.values.to(dtype)
        largest = values.detach().abs().amax(0)  # or squares of what is large or small would not be there
        values = values / torch.where(largest == 0, 1, largest)
        norm = _linalg.vector_norm(values, dim=0)
        v = values / torch.where(norm == 0, 1, norm)
        one = torch.ones_like(norm).diag()
        half = (v.mT @ v).triu(1) + 0.5 * one  # of I - v half⁻¹ vᵀ, which is the product of the reflections
        return one - v @ _linalg.solve_triangular(half, v.mT, upper=True)

    def undo(self, layer: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor:
        return _multiplied(y, self.dense(dtype).mT)

    def log_det(self, dtype: torch.dtype) -> Tensor:
        return self.values.new_zeros((), dtype=dtype)


class _Exponential(_Matrix):
    """The exponential of a matrix that starts skew-symmetric: then it is a rotation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        noise = _noise(len(self.values)) / len(self.values) ** 0.5
        self._set(noise - noise.mT)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return _linalg.matrix_exp(self.values.to(dtype))

    def undo(self, layer: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor:
        return _multiplied(y, _linalg.matrix_exp(-self.values.to(dtype)))

    def log_det(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype).diagonal().sum()


class _Free(_Matrix):
    """Any matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._set(_rotation(len(self.values)))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype)

    def undo(self, layer: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.values.to(dtype)

        def solved(rows: Tensor) -> Tensor:
            result, fault = _linalg.solve_ex(weight.mT, rows, left=False)
            if not unreadable(fault) and fault:
                raise ValueError(f"{_check.name(layer)}: the matrix must not be singular, got one of determinant 0.")
            return result

        return _by_rows(solved, y, dtype)

    def log_det(self, dtype: torch.dtype) -> Tensor:
        return _linalg.slogdet(self.values.to(dtype)).logabsdet


_KINDS: dict[str, type[_Matrix]] = {
    "plu": _PLU,
    "householder": _Householder,
    "matrix-exponential": _Exponential,
    "free": _Free,
}


def _noise(channels: int) -> Tensor:
    return torch.randn(channels, channels, dtype=torch.float64, device="cpu")


def _rotation(channels: int) -> Tensor:
    """An orthogonal matrix; in float64 and on the CPU, where there are factorisations whatever the default dtype is."""
    return _linalg.qr(_noise(channels)).Q


def _multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies the channels by a matrix, and keeps dtype and layout.

    By one kernel, with gradients and without: ``matmul`` chooses between two, which round differently.
    """
    wide = x.to(weight.dtype)
    if x.ndim > 2 and not is_channels_last(x):
        return torch.bmm(weight.expand(x.shape[0], -1, -1), wide.flatten(2)).view(x.shape).to(x.dtype)
    last = wide.movedim(1, -1)
    return (last.reshape(-1, x.shape[1]) @ weight.mT).view(last.shape).movedim(-1, 1).to(x.dtype)


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Applies a function to a matrix with a row for each pixel, and keeps dtype and layout."""
    last = x.to(dtype).movedim(1, -1)
    rows = function(last.reshape(-1, x.shape[1])).contiguous()  # solvers return columns
    y = rows.view(last.shape).movedim(-1, 1).to(x.dtype)
    return y if is_channels_last(x) else y.contiguous()
