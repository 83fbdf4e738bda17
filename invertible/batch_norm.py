"""Batch normalisation as a layer of the map."""

import math

import torch
from torch import Tensor, nn

from . import _check
from ._buffers import buffers_moving
from ._channels import channels_of, has_channels, per_channel, repeated, wide
from ._value import Value
from .module import InvertibleModule

__all__ = ["BatchNorm"]


class BatchNorm(InvertibleModule[Tensor, Tensor]):
    r"""Normalises each channel by the statistics of the batch in training, and by running ones in ``eval``.

    .. math::
        y_{:, c} = e^{a_c}\,\frac{x_{:, c} - \mu_c}{\sqrt{v_c + \epsilon}} + b_c \qquad
        \log|\det J| = n \sum_c \bigl(a_c - \tfrac12 \log(v_c + \epsilon)\bigr)

    for n pixels. It has an inverse in ``eval`` only. In training mode :math:`\mu` and v are those of the batch, which
    its output does not tell any more: ``inverse`` raises, rather than to undo another batch's map. Take ``eval()`` to
    go backwards; or :class:`ActNorm`, which has an inverse in both modes. So the layer can't be trained backwards
    either: ``Inverse(net)(x)`` raises in training mode.

    The log-determinant takes the statistics for constants, as is usual: it is that of each sample's map, and the sum
    over a batch is not that of the whole batch's. Its gradient, as that of ``y``, goes through the statistics.
    Running statistics move as in :class:`torch.nn.BatchNorm2d`: once per training step in the trained direction,
    under every strategy, with the unbiased variance, while the biased one normalises. In training mode
    :class:`Reconstruct` keeps the layer's input. With several processes each has the statistics of its own batch, as
    torch's layer under DDP; DDP hands out the running ones of the first process. ``torch.optim.swa_utils.update_bn``
    sees torch's own layers only and passes over this one: run some batches in training mode under ``torch.no_grad``.

    Cost: a product and a sum per element, and in training mode the statistics.

    Source: Real NVP (Dinh et al., 2017), section 3.7, https://arxiv.org/abs/1605.08803, which also normalises by an
    average over recent batches in training. The scale and shift are those of MAF (Papamakarios et al., 2017),
    https://arxiv.org/abs/1705.07057

    Args:
        channels: of the input.
        eps: is added to the variance, in the unit of the input's square.
        momentum: the weight of the new batch in the running statistics.
        affine: whether there are a (``log_scale``) and b (``shift``), which start at 0.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point; in training more than one value per channel, or none
        - Output: the same

    Raises:
        TypeError: if an option is of the wrong kind, or the input not a floating-point tensor.
        ValueError: if an option is out of range, the input has another number of channels, it has one value per
            channel in training mode, or ``inverse`` is called in training mode.

    Example:
        >>> norm = BatchNorm(1)
        >>> norm(torch.tensor([[4.], [6.]])).flatten()
        tensor([-1.0000,  1.0000], grad_fn=<ViewBackward0>)
        >>> norm.eval().inverse(torch.zeros(1, 1)).item()  # a tenth of the mean, 5
        0.5
    """

    log_scale: Tensor | None
    shift: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.channels = channels = channels_of("BatchNorm", channels)
        self.eps = _check.number("BatchNorm", "eps", eps)
        self.momentum = _check.number("BatchNorm", "momentum", momentum)
        self.affine = _check.boolean("BatchNorm", "affine", affine)
        if not 0 < self.eps < math.inf:
            raise ValueError(f"BatchNorm: eps must be positive and finite, got {eps}.")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"BatchNorm: momentum must be from 0 to 1, got {momentum}.")
        for name in ("log_scale", "shift"):
            self.register_parameter(name, nn.Parameter(torch.empty(channels)) if affine else None)
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the scale, shift and running statistics to those of a new layer."""
        with torch.no_grad():
            for zero in (self.log_scale, self.shift, self.running_mean):
                if zero is not None:
                    zero.zero_()
            self.running_var.fill_(1)

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        x = has_channels(self, x, self.channels)
        return self._normalized(x, *self._statistics(x))

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        y = self._invertible(y)
        dtype = wide(y, self.running_mean)
        mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
        x = y.to(dtype)
        if self.shift is not None:
            x = x - per_channel(self.shift.to(dtype), x)
        return (x * per_channel((-self._log_factor(var)).exp(), x) + per_channel(mean, x)).to(y.dtype)

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        x = has_channels(self, x, self.channels)
        mean, var = self._statistics(x)
        return self._normalized(x, mean, var), repeated(self._log_factor(var).sum(), x)

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        x = self.inverse(y)
        var = self.running_var.to(wide(y, self.running_var))
        return x, repeated(-self._log_factor(var).sum(), y)

    def _keeps_input(self, method: str) -> bool:
        return self.training

    def _invertible(self, y: Tensor) -> Tensor:
        y = has_channels(self, y, self.channels)
        if self.training:
            rule = "there is no inverse in training mode, whose statistics the output does not tell"
            raise _check.value_error(self, rule, y, " Call eval() to go backwards, or use ActNorm.")
        return y

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel; in training those of the batch, which are counted."""
        dtype = wide(x, self.running_mean)
        count = x.shape[0] * x.shape[2:].numel()
        if not self.training or count == 0:
            return self.running_mean.to(dtype), self.running_var.to(dtype)
        if count == 1:
            raise _check.value_error(self, "expected more than one value per channel in training mode", x)
        var, mean = torch.var_mean(x.to(dtype), [0, *range(2, x.ndim)], correction=0)
        if buffers_moving(default=True):
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        return mean, var

    def _log_factor(self, var: Tensor) -> Tensor:
        log_factor = -0.5 * (var + self.eps).log()
        return log_factor if self.log_scale is None else log_factor + self.log_scale.to(var.dtype)

    def _normalized(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = (x.to(mean.dtype) - per_channel(mean, x)) * per_channel(self._log_factor(var).exp(), x)
        return (y if self.shift is None else y + per_channel(self.shift.to(y.dtype), x)).to(x.dtype)

    def extra_repr(self) -> str:
        options = {"eps": 1e-5, "momentum": 0.1, "affine": True}
        given = [f"{name}={value}" for name, default in options.items() if (value := getattr(self, name)) != default]
        return ", ".join([f"channels={self.channels}", *given])
