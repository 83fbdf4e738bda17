"""Bijections of single elements: activations that can be undone, and constants."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, logsigmoid, softplus

from . import _check
from ._channels import has_channels, per_channel, per_sample, repeated, wide
from ._noise import is_estimating
from ._tracing import unreadable
from ._value import Value
from .module import InvertibleModule

__all__ = ["ConstantAffine", "LeakyReLU", "Sigmoid", "Softplus", "Tanh"]


class LeakyReLU(InvertibleModule[Tensor, Tensor]):
    r"""Multiplies what is negative by a slope.

    .. math::
        y = \begin{cases} x & x \ge 0 \\ s\,x & x < 0 \end{cases} \qquad
        \log|\det J| = \log s \cdot \#\{i : x_i < 0\}

    The inverse multiplies errors of what is negative by 1/s. As with any kink, an input that is off by rounding may
    have the other slope where it is next to zero.

    Cost: a comparison and a product per element.

    Source: Maas et al., 2013, https://ai.stanford.edu/~amaas/papers/relu_hybrid_icml2013_final.pdf

    Args:
        negative_slope: s, positive.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point
        - Output: the same

    Raises:
        TypeError: if ``negative_slope`` is not a number, or the input not a floating-point tensor.
        ValueError: if ``negative_slope`` is not positive and finite.

    Example:
        >>> LeakyReLU(0.5)(torch.tensor([[-2., 3.]]))
        tensor([[-1.,  3.]])
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = negative_slope = _check.number("LeakyReLU", "negative_slope", negative_slope)
        if not 0 < negative_slope < math.inf:
            raise ValueError(f"LeakyReLU: negative_slope must be positive and finite, got {negative_slope}.")

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        return leaky_relu(has_channels(self, x, None), self.negative_slope)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        y = has_channels(self, y, None)
        return torch.where(y < 0, y / self.negative_slope, y)

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self(x), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return per_sample((x < 0).to(wide(x)) * math.log(self.negative_slope), x)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class _Squashing(InvertibleModule[Tensor, Tensor]):
    """Maps all numbers to an open interval. Bits are lost where it is flat, so that ``Reconstruct`` keeps the input."""

    low = -math.inf
    high = math.inf

    def _keeps_input(self, method: str) -> bool:
        return True

    def _log_slope(self, x: Tensor) -> Tensor:
        """The logarithm of the derivative at ``x``."""
        raise NotImplementedError

    def _log_slope_of_inverse(self, y: Tensor) -> Tensor:
        """The logarithm of the derivative of the inverse at ``y``."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self(x), per_sample(self._log_slope(x.to(wide(x))), x)

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), per_sample(self._log_slope_of_inverse(y.to(wide(y))), y)

    def _inside(self, y: Tensor) -> Tensor:
        """Refuses values that no input has, where there is anybody to hear of it; returns them in float32 at least.

        Autocast would return float32 for some functions on some devices, whatever comes in.
        """
        y = has_channels(self, y, None)
        if is_estimating():
            y = self._drawn_in(y)
        if is_estimating() or unreadable(y) or not y.numel():
            return y.to(wide(y))
        least, greatest = (float(t) for t in torch.aminmax(y.detach()))
        if not (least > self.low and greatest < self.high):
            got = greatest if least > self.low else least
            fix = " What saturates in forward can't be undone: keep its input small." if got in self._ends() else ""
            rule = f"inverse takes values in the open interval ({self.low:g}, {self.high:g})"
            raise ValueError(f"{_check.name(self)}: {rule}, got {got:.9g}.{fix}")
        return y.to(wide(y))

    def _drawn_in(self, y: Tensor) -> Tensor:
        """The nearest values inside: what an estimate of the error moves in the last bit must not leave the range."""
        info = torch.finfo(y.dtype)
        low = info.tiny * info.eps if self.low == 0 else self.low * (1 - info.eps / 2)
        return y.clamp(low, min(self.high * (1 - info.eps / 2), info.max))

    def _ends(self) -> tuple[float, float]:
        return self.low, self.high


class Sigmoid(_Squashing):
    r"""Maps all numbers to (0, 1); its :class:`Inverse` is the logit.

    .. math::
        y = \frac{1}{1 + e^{-x}} \qquad x = \log y - \log(1 - y) \qquad
        \log|\det J| = \sum_i \bigl(\log\sigma(x_i) + \log\sigma(-x_i)\bigr)

    It saturates: what comes back within 1e-3 in float32 is x from -87 to 9.6, measured on a CPU; what was rounded to 0
    or 1 is refused by ``inverse``. For that check ``inverse`` waits for the device; it is left out while compiling,
    exporting, tracing and under ``torch.func``. :class:`Reconstruct` keeps the layer's input.

    Cost: an elementary function per element; in the inverse another, and the check of its range.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point
        - Output: the same

    Raises:
        TypeError: if the input is not a floating-point tensor.
        ValueError: if a value that ``inverse`` is given is not in (0, 1).

    Example:
        >>> logit = Inverse(Sigmoid())
        >>> logit(torch.tensor([[0.5, 0.75]]))
        tensor([[0.0000, 1.0986]])
    """

    low, high = 0.0, 1.0

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        return torch.sigmoid(has_channels(self, x, None))

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        wider = self._inside(y)
        return (wider.log() - (-wider).log1p()).to(y.dtype)

    def _log_slope(self, x: Tensor) -> Tensor:
        return logsigmoid(x) + logsigmoid(-x)

    def _log_slope_of_inverse(self, y: Tensor) -> Tensor:
        return -(y.log() + (-y).log1p())


class Tanh(_Squashing):
    r"""Maps all numbers to (-1, 1).

    .. math::
        y = \tanh x \qquad x = \operatorname{artanh} y \qquad
        \log|\det J| = \sum_i 2\,\bigl(\log 2 - x_i - \operatorname{softplus}(-2 x_i)\bigr)

    It saturates: what comes back within 1e-3 in float32 is x from -5.9 to 5.9, measured on a CPU; what was rounded to
    -1 or 1 is refused by ``inverse``. For that check ``inverse`` waits for the device; it is left out while compiling,
    exporting, tracing and under ``torch.func``. :class:`Reconstruct` keeps the layer's input.

    Cost: an elementary function per element; in the inverse another, and the check of its range.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point
        - Output: the same

    Raises:
        TypeError: if the input is not a floating-point tensor.
        ValueError: if a value that ``inverse`` is given is not in (-1, 1).

    Example:
        >>> Tanh().inverse(torch.tensor([[0.0, 0.5]]))
        tensor([[0.0000, 0.5493]])
    """

    low, high = -1.0, 1.0

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        return torch.tanh(has_channels(self, x, None))

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        return torch.atanh(self._inside(y)).to(y.dtype)

    def _log_slope(self, x: Tensor) -> Tensor:
        return 2 * (math.log(2) - x + logsigmoid(2 * x))

    def _log_slope_of_inverse(self, y: Tensor) -> Tensor:
        return -(y.log1p() + (-y).log1p())


class Softplus(_Squashing):
    r"""Maps all numbers to the positive ones.

    .. math::
        y = \log(1 + e^x) \qquad x = y + \log(1 - e^{-y}) \qquad \log|\det J| = \sum_i \log\sigma(x_i)

    :class:`torch.nn.Softplus` is linear above 20, where that is off by 2e-9; this one is exact to rounding. What comes
    back within 1e-3 in float32 is x from -87 on, measured on a CPU; what was rounded to 0 is refused by ``inverse``.
    For that check ``inverse`` waits for the device; it is left out while compiling, exporting, tracing and under
    ``torch.func``. :class:`Reconstruct` keeps the layer's input, which small outputs carry in their relative size only.

    Cost: an elementary function per element; in the inverse another, and the check of its range.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point
        - Output: the same

    Raises:
        TypeError: if the input is not a floating-point tensor.
        ValueError: if a value that ``inverse`` is given is not positive, or not finite.

    Example:
        >>> Softplus()(torch.tensor([[-80., 0., 80.]]))
        tensor([[1.8049e-35, 6.9315e-01, 8.0000e+01]])
    """

    low = 0.0

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        x = has_channels(self, x, None)
        return softplus(x.to(wide(x)), threshold=40).to(x.dtype)  # from there on it is x in float64, too

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        wider = self._inside(y)
        return (wider + (-(-wider).expm1()).log()).to(y.dtype)

    def _log_slope(self, x: Tensor) -> Tensor:
        return logsigmoid(x)

    def _log_slope_of_inverse(self, y: Tensor) -> Tensor:
        return -(-(-y).expm1()).log()


class ConstantAffine(InvertibleModule[Tensor, Tensor]):
    r"""Multiplies by constants and adds constants, for all channels alike or for each its own.

    .. math::
        y_{:, c} = s_c\,x_{:, c} + t_c \qquad \log|\det J| = n \sum_c \log|s_c|

    for n pixels. The constants are buffers: a checkpoint carries them, and no optimizer sees them. Trained ones:
    :class:`ActNorm`.

    Cost: a product and a sum per element.

    Args:
        scale: s, one for all channels or one for each; not zero.
        shift: t, one for all channels or one for each.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point; the number of channels is that of the constants, if one
          of them has one for each
        - Output: the same

    Raises:
        TypeError: if a constant is not a number, or the input not a floating-point tensor.
        ValueError: if a scale is zero, a constant is not finite, here or in a checkpoint or in the dtype that the layer
            is moved to, ``scale`` and ``shift`` differ in length, or have more than one dimension, or the input has
            another number of channels.

    Example:
        >>> ConstantAffine(scale=[2., 4.], shift=-1.)(torch.tensor([[1., 1.]]))
        tensor([[1., 3.]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: float | Sequence[float] = 1.0, shift: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        constants = {"scale": _listed("scale", scale), "shift": _listed("shift", shift)}
        for option, values in constants.items():
            _check_constants(option, torch.tensor(values, device="cpu"), values)  # the default dtype may not hold them
        each = {len(v) for v, given in zip(constants.values(), (scale, shift), strict=True) if not _is_number(given)}
        if len(each) > 1:
            got = " and ".join(str(len(values)) for values in constants.values())
            raise ValueError(f"ConstantAffine: scale and shift must have one length, got {got}.")
        self.channels = next(iter(each), None)
        for option, values in constants.items():
            self.register_buffer(option, torch.tensor(values * (self.channels or 1) if len(values) == 1 else values))

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        x = has_channels(self, x, self.channels)
        dtype = wide(x, self.scale)
        scale, shift = per_channel(self.scale.to(dtype), x), per_channel(self.shift.to(dtype), x)
        return (x.to(dtype) * scale + shift).to(x.dtype)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        y = has_channels(self, y, self.channels)
        dtype = wide(y, self.scale)
        scale, shift = per_channel(self.scale.to(dtype), y), per_channel(self.shift.to(dtype), y)
        return ((y.to(dtype) - shift) / scale).to(y.dtype)

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self(x), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        total = self.scale.to(wide(x, self.scale)).abs().log().sum()
        return repeated(total if self.channels else total * x.shape[1], x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for option in ("scale", "shift"):
            tensor = state_dict.get(f"{prefix}{option}")
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                _check_constants(option, tensor, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for option, held in (("scale", self.scale), ("shift", self.shift)):
            moved = fn(held)
            if moved.dtype != held.dtype and not moved.is_meta:  # a narrower one may not hold them
                _check_constants(option, moved, held)
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]

    def extra_repr(self) -> str:
        return "" if self.channels is None else f"channels={self.channels}"


def _is_number(value: object) -> bool:
    """Whether a constant is one for all channels; arrays and tensors without dimensions are."""
    return getattr(value, "ndim", 1) == 0 or not isinstance(value, Iterable)


def _listed(option: str, value: Any) -> list[float]:
    """The numbers of a constant; what is not in order, as a set, or made of letters, is none."""
    if getattr(value, "ndim", 1) > 1:
        rule = f"{option} must be a number or a sequence of them, one per channel"
        raise ValueError(f"ConstantAffine: {rule}, got one of shape {tuple(value.shape)}.")
    plain: Any = value.tolist() if hasattr(value, "tolist") else value
    if _is_number(plain) or isinstance(plain, (str, bytes, Mapping, Set)):
        return [_check.number("ConstantAffine", option, cast("object", plain))]
    return [_check.number("ConstantAffine", option, each) for each in plain]


def _check_constants(option: str, tensor: Tensor, given: Any) -> None:
    """Refuses what a tensor makes of constants that were given."""
    infinite = not tensor.numel() or not bool(tensor.isfinite().all())
    if infinite or (option == "scale" and bool((tensor == 0).any())):
        rule = "be finite, one or one per channel" if infinite else "not be zero"
        got = [float(each) for each in given]
        raise ValueError(f"ConstantAffine: {option} must {rule}, got {got}.")
