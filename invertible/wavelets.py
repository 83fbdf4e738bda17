"""Downsampling by wavelets: into low and high frequencies, without loss."""

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check
from ._lifting import Lift, Pair, analysed, lifted, synthesised, unlifted
from ._space import check_divisible, each, fitted, parts_of, per_dimension
from ._value import Value, is_channels_last
from .module import InvertibleModule, zero_log_det

__all__ = ["Haar", "LeGall53"]


class _Wavelet(InvertibleModule[Tensor, Tensor]):
    """What wavelets share: a factor of 1 or 2 in each dimension, bands in the channels, log-determinant 0."""

    def __init__(self, downscale_factor: int | Sequence[int]) -> None:
        super().__init__()
        who = type(self).__name__
        self.downscale_factor = per_dimension(who, "downscale_factor", downscale_factor)
        factors = each(self.downscale_factor)
        if not 1 <= len(factors) <= 3 or not set(factors) <= {1, 2} or self.downscale_factor == 1:
            rule = "downscale_factor must be 2, or 1 or 2 for each of one to three dimensions"
            raise ValueError(f"{who}: {rule}, got {downscale_factor}.")

    @abc.abstractmethod
    def _split(self, pair: Pair, dim: int) -> Pair:
        """Low and high frequencies from even and odd samples."""

    @abc.abstractmethod
    def _join(self, pair: Pair, dim: int) -> Pair:
        """Undoes :meth:`_split`."""

    def _scaled(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        return x

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        factors = self._factors(x)
        check_divisible(self, x, factors, self.downscale_factor)
        # In its own layout, so that it keeps it: channels last or first.
        x, axis = (x.movedim(1, -1), -1) if is_channels_last(x) else (x, 1)
        dims = _halved(factors, axis)
        y = torch.cat(analysed(self._scaled(x, dims), dims, self._split), axis)
        return y.movedim(axis, 1)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        factors = self._factors(y)
        y, axis = (y.movedim(1, -1), -1) if is_channels_last(y) else (y, 1)
        dims = _halved(factors, axis)
        bands = 2 ** len(dims)
        if y.shape[axis] % bands:
            raise _check.value_error(self, f"channels must be divisible by {bands}", y.movedim(axis, 1))
        parts = parts_of(self._scaled(y, dims), axis, (bands, y.shape[axis] // bands), -2 if axis < 0 else 1)
        return synthesised(parts, dims, self._join).movedim(axis, 1)

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self(x), zero_log_det(x)

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), zero_log_det(y)

    def _factors(self, x: Tensor) -> tuple[int, ...]:
        x = _check.is_tensor(self, x)
        _check.is_floating(self, x)
        if self.grid is not None:
            _check.is_on_grid(self, self.grid.dtype, x)
        return fitted(self, self.downscale_factor, x)

    def extra_repr(self) -> str:
        return "" if self.downscale_factor == 2 else f"downscale_factor={self.downscale_factor}"


class _LiftedWavelet(_Wavelet):
    """A wavelet made of lifting steps, which keep a grid."""

    _lifts: tuple[Lift, ...]
    _low: int
    """Which samples become the low frequencies: 0 for the even ones, 1 for the odd ones."""

    @property
    def keeps_grid(self) -> bool:
        return True

    def _split(self, pair: Pair, dim: int) -> Pair:
        samples = lifted(pair, self._lifts, dim, self.grid)
        return samples[self._low], samples[1 - self._low]

    def _join(self, pair: Pair, dim: int) -> Pair:
        return unlifted((pair[self._low], pair[1 - self._low]), self._lifts, dim, self.grid)


class Haar(_LiftedWavelet):
    r"""Haar's wavelet: averages and differences of neighbours, half as large in space, twice the channels each.

    In one dimension, with low frequencies :math:`l` and high ones :math:`h`,

    .. math::
        l_n = \frac{x_{2n} + x_{2n+1}}{\sqrt 2}, \quad h_n = \frac{x_{2n} - x_{2n+1}}{\sqrt 2}
        \qquad\text{or, with lifting,}\qquad
        h_n = x_{2n} - x_{2n+1}, \quad l_n = x_{2n+1} + \tfrac12 h_n.

    The first is orthogonal: it keeps lengths, and rounds. The second is a pair of lifting steps: the low frequencies
    are the averages :math:`(x_{2n} + x_{2n+1}) / 2`, smaller by :math:`\sqrt 2` than the orthogonal ones, and the high
    ones are larger by as much. On a :class:`Grid` it is exact, bit for bit: what is added is rounded down to the grid,
    so that on ``Grid(0)``, for whole numbers, it is the S-transform :math:`l_n = \lfloor (x_{2n} + x_{2n+1}) / 2
    \rfloor`. (So it is on any other grid in multiples of its step, for values below a 32nd of the limit.) The
    gradient passes as if nothing were rounded. Without a grid nothing is rounded to one, and the orthogonal kind is
    refused on a grid.

    More dimensions are transformed one after another, the first one first. The log-determinant is 0 for both kinds.

    The output is band-major, low before high, with the first dimension varying slowest: for images low-low, low-high,
    high-low, high-high, each with all channels, where the first word is that of the height. So the first
    :math:`C` channels are a smaller image, and :class:`Split` puts low frequencies (of the first dimension that is
    halved) into one stream and high ones into the other.

    Cost: an addition and at most a multiplication per pixel and dimension; the same backwards.

    Source: Haar, 1910; the lifting steps are those of the S-transform, Said and Pearlman, 1996,
    https://doi.org/10.1109/83.535842. FrEIA's ``HaarDownsampling`` of images differs in the order of the bands.

    Args:
        downscale_factor: 2 for all spatial dimensions; or 1 or 2 for each.
        lifting: use lifting steps, which keep a grid.

    Shape:
        - Input: ``(batch, channels, *size)`` with one to three spatial dimensions, each divisible by its factor
        - Output: ``(batch, channels * product of factors, *(size / factor))``

    Raises:
        TypeError: if a factor is not an integer, ``lifting`` is neither ``True`` nor ``False``, or the input is not a
            floating-point tensor.
        ValueError: if a factor is not 1 or 2, or the input's size is not divisible.

    Example:
        >>> Haar(lifting=True)(torch.tensor([[[3., 1., 4., 4.]]]))
        tensor([[[2., 4.],
                 [2., 0.]]])
    """

    # What is rounded is a half at most: a quarter less, and ties go down.
    _lifts = (Lift(0, -1, 1.0), Lift(1, 1, 0.5, tie=-0.25))
    _low = 1

    def __init__(self, downscale_factor: int | Sequence[int] = 2, *, lifting: bool = False) -> None:
        super().__init__(downscale_factor)
        self.lifting = _check.boolean("Haar", "lifting", lifting)

    @property
    def keeps_grid(self) -> bool:
        return self.lifting

    def _scaled(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        # Before the sums, so that they don't overflow where their result does not.
        return x if self.lifting or not dims else x * 0.5 ** (len(dims) / 2)

    def _split(self, pair: Pair, dim: int) -> Pair:
        return super()._split(pair, dim) if self.lifting else (pair[0] + pair[1], pair[0] - pair[1])

    def _join(self, pair: Pair, dim: int) -> Pair:
        return super()._join(pair, dim) if self.lifting else (pair[0] + pair[1], pair[0] - pair[1])

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "lifting=True" * self.lifting)))


class LeGall53(_LiftedWavelet):
    r"""Le Gall's 5/3 wavelet, the lossless one of JPEG 2000: half as large in space, twice the channels each.

    In one dimension, with low frequencies :math:`l` and high ones :math:`h`,

    .. math::
        h_n = x_{2n+1} - \tfrac12 (x_{2n} + x_{2n+2}), \qquad l_n = x_{2n} + \tfrac14 (h_{n-1} + h_n),

    where the signal is mirrored at its borders (:math:`x_{-1} = x_1`, and :math:`x_{N} = x_{N-2}`): the high
    frequencies are what a straight line through the neighbours does not predict, and vanish where the image is
    linear. More dimensions are transformed one after another, the first one first, as in the standard, where columns
    precede rows. The log-determinant is 0. The map is not orthogonal: in each dimension it changes lengths by factors
    from 0.64 to 1.55 (singular values, found numerically for 8 to 256 pixels).

    On a :class:`Grid` it is exact, bit for bit. The first step is rounded down to the grid, and the second to the
    nearest, ties up, so that on ``Grid(0)``, for whole numbers, it is the standard's reversible transform,

    .. math::
        h_n = x_{2n+1} - \lfloor \tfrac12 (x_{2n} + x_{2n+2}) \rfloor, \qquad
        l_n = x_{2n} + \lfloor \tfrac14 (h_{n-1} + h_n + 2) \rfloor.

    (So it is on any other grid in multiples of its step, for values below a 32nd of the limit.) The gradient passes as
    if nothing were rounded. Without a grid nothing is.

    The order of the output's channels is that of :class:`Haar`: bands, low before high, and in each all channels.

    Cost: four additions and two multiplications for each two pixels and dimension; the same backwards.

    Source: Le Gall and Tabatabai, 1988, https://doi.org/10.1109/ICASSP.1988.196696; ITU-T T.800 (JPEG 2000), Annex F,
    the reversible 5-3 filter, https://www.itu.int/rec/T-REC-T.800. The standard takes odd sizes, too; here they are
    refused, for the bands would differ in size: see :class:`Pad`.

    Args:
        downscale_factor: 2 for all spatial dimensions; or 1 or 2 for each.

    Shape:
        - Input: ``(batch, channels, *size)`` with one to three spatial dimensions, each divisible by its factor
        - Output: ``(batch, channels * product of factors, *(size / factor))``

    Raises:
        TypeError: if a factor is not an integer, or the input is not a floating-point tensor.
        ValueError: if a factor is not 1 or 2, or the input's size is not divisible.

    Example:
        >>> image = torch.randint(0, 256, (1, 3, 8, 8))
        >>> net = Sequential(LeGall53(), grid=Grid(0))
        >>> coefficients = net(image.double())
        >>> torch.equal(coefficients, coefficients.round()), torch.equal(net.inverse(coefficients), image.double())
        (True, True)
    """

    # Halves less a quarter, and quarters plus an eighth: the nearest whole number is the standard's.
    _lifts = (Lift(1, -1, 0.5, reach=1, tie=-0.25), Lift(0, 1, 0.25, reach=-1, tie=0.125))
    _low = 0

    def __init__(self, downscale_factor: int | Sequence[int] = 2) -> None:
        super().__init__(downscale_factor)


def _halved(factors: tuple[int, ...], channels: int) -> list[int]:
    """The dimensions of a tensor to be halved, where the channels come first or last."""
    return [dim + (channels if channels > 0 else 0) + 1 for dim, factor in enumerate(factors) if factor == 2]
