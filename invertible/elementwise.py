"""Transforms whose parameters are trained themselves, or come from the condition alone."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from . import _check
from ._buffers import buffers_moving, in_training, kept_buffers
from ._channels import channels_of, has_channels, without_autocast
from ._random import draws
from ._value import Value, describe
from .module import InvertibleModule
from .transform import CouplingTransform

__all__ = ["Elementwise"]


class Elementwise(InvertibleModule[Tensor, Tensor]):
    r"""Transforms each element by trained parameters of its channel, or by those that a function makes of a condition.

    With T = ``transform``, trained parameters :math:`\theta`, and F = ``function``,

    .. math::
        y = T(x; \theta) \qquad\text{or}\qquad y = T(x; F(c)).

    No element sees another, so that it mixes nothing: a trained spline of each channel, or a scale and a shift that
    depend on a label only. What depends on other channels is a :class:`Coupling`.

    F sees the condition alone, and makes of it a tensor ``(batch, parameters)``, the same at every pixel, or one with
    the input's space. The trained parameters start at 0. They, and what F makes, are in the order of the transform:
    parameter-major. The log-determinant is that of T. A pair of channels that a transform ties together, as
    :class:`VolumePreserving` does, stays tied.

    Cost: that of the transform, and an evaluation of F in each direction.

    Source: an elementwise flow; with a function, the conditional affine transform of FrEIA and of SurVAE Flows
    (Nielsen et al., 2020), https://arxiv.org/abs/2007.02731

    Args:
        transform: what is done to an element.
        channels: of the input, if the parameters are trained ones.
        function: makes the parameters of the condition, otherwise.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point
        - Output: the same

    Raises:
        TypeError: if an option is of a wrong type, the input is not a floating-point tensor, or the function's output
            is not one whose dtype the input's can hold, or there is no condition for the function.
        ValueError: if not exactly one of ``channels`` and ``function`` is given, the input has another number of
            channels, or the function's output has a wrong shape.

    Example:
        >>> scaled = Elementwise(Affine(), function=nn.Embedding(10, 2 * 3))
        >>> x, label = torch.rand(4, 3, 8, 8), torch.tensor([1, 7, 0, 7])
        >>> y = scaled(x, condition=label)
        >>> torch.allclose(scaled.inverse(y, condition=label), x, atol=1e-6)
        True
        >>> Elementwise(RationalQuadraticSpline(bins=4), channels=3)(x).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self, transform: CouplingTransform, *, channels: int | None = None, function: nn.Module | None = None
    ) -> None:
        super().__init__()
        for option, value, kind in (("transform", transform, CouplingTransform), ("function", function, nn.Module)):
            if not isinstance(value, kind) and (value is not None or option == "transform"):
                raise TypeError(f"Elementwise: {option} must be of type {kind.__name__}, got {describe(value)}.")
        if (channels is None) == (function is None):
            got = "none" if channels is None else "both"
            raise ValueError(f"Elementwise: either channels or function must be given, got {got}.")
        self.transform = transform
        self.function = function
        self.channels = None if channels is None else channels_of("Elementwise", channels)
        count = 0 if self.channels is None else self.channels * transform.parameters_per_element
        self.register_parameter("parameters_of_channels", nn.Parameter(torch.zeros(count)) if count else None)

    @property
    def stochastic(self) -> bool:
        inside = list(self.modules())[1:]
        return any(draws(part) or getattr(part, "stochastic", False) is True for part in inside)

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        return self.transform(x, self._parameters_for(x, condition, moving=True))

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        return self.transform.inverse(y, self._parameters_for(y, condition, moving=False))

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        """Maps ``x`` to ``y`` and returns the transform's log-determinant."""
        return self.transform.forward_and_log_det(x, self._parameters_for(x, condition, moving=True))

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        """Maps ``y`` to ``x`` and returns the transform's log-determinant of the inverse."""
        return self.transform.inverse_and_log_det(y, self._parameters_for(y, condition, moving=False))

    def _parameters_for(self, x: Tensor, condition: Value | None, *, moving: bool) -> Tensor:
        """The transform's parameters for each element of ``x``, which is checked."""
        x = has_channels(self, x, self.channels)
        self.transform.check(x)
        values = self._trained(x) if self.function is None else self._of_condition(self.function, x, condition, moving)
        if values.ndim < x.ndim:
            values = values.reshape(*values.shape, *[1] * (x.ndim - 2))
        return values.expand(-1, -1, *x.shape[2:])

    def _trained(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            own: Tensor = self.get_parameter("parameters_of_channels")
            return own.to(torch.promote_types(own.dtype, x.dtype)).to(x.dtype).expand(x.shape[0], -1)

    def _of_condition(self, function: nn.Module, x: Tensor, condition: Value | None, moving: bool) -> Tensor:
        if condition is None:
            raise TypeError(
                f"{_check.name(self)}: the function needs a condition, got None. "
                "Pass it to the network: net(x, condition=...)."
            )
        keep = in_training(function) and not buffers_moving(default=moving)
        with kept_buffers(function) if keep else nullcontext():
            values: object = function(condition)
        if not isinstance(values, Tensor):
            raise _check.type_error(self, "the function must return a tensor", values)
        count = x.shape[1] * self.transform.parameters_per_element
        fits = values.ndim >= 2 and values.shape[0] == x.shape[0] and values.shape[1] == count
        if not fits or values.shape[2:] not in (torch.Size(), x.shape[2:]):
            shapes = f"({x.shape[0]}, {count})" + (f" or one with the space {tuple(x.shape[2:])}" if x.ndim > 2 else "")
            raise _check.value_error(self, f"the function must return a tensor of shape {shapes}", values)
        if not values.is_floating_point() or torch.promote_types(values.dtype, x.dtype) != x.dtype:
            raise TypeError(
                f"{_check.name(self)}: the function's output must fit into the input's dtype {x.dtype}, "
                f"got {values.dtype}."
            )
        return values
