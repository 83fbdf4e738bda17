"""Normalisation by the statistics of the first batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _check
from ._buffers import buffers_moving, on_copies
from ._channels import channels_of, has_channels, per_channel, repeated, wide
from ._range import is_unread
from ._tracing import exporting, transformed, unreadable
from ._value import Value
from .module import InvertibleModule

__all__ = ["ActNorm"]


class ActNorm(InvertibleModule[Tensor, Tensor]):
    r"""Scales and shifts each channel, from the start such that the first batch has mean 0 and variance 1.

    .. math::
        y_{:, c} = e^{a_c}\,\frac{x_{:, c} - m_c}{s_c} + b_c \qquad
        \log|\det J| = n \sum_c (a_c - \log s_c)

    for n pixels. The parameters a (``log_scale``) and b (``shift``) start at 0. The mean m and the standard deviation
    s are buffers, taken once from the first batch in training mode, and constants for the gradients. Before that, and
    in ``eval``, they are 0 and 1: an untrained layer in ``eval`` is the identity and stays untrained. A channel that
    does not vary in the first batch gets s = 1, as one whose deviation is next to 0: below the rounding of its mean in
    float32 (in float64 for such input), or below the normal numbers of the buffers, 6e-5 in float16. A batch of zero
    is no first batch; one with a value that is not finite is refused, and so are statistics that the buffers can't
    hold.

    The first batch is that of the direction which is trained: ``forward``, or ``Inverse(net)(x)``, which makes the
    outputs of ``inverse`` have mean 0 and variance 1. Where ``torch.distributed`` has several processes, the
    statistics are those of all their batches together, so the first batch must go through on all of them.

    ``initialized``, a buffer, says whether there was one: it is 0, or not. A number, so that models can be averaged
    with their buffers. It is read, and waited for, in training mode until it was found true once; and again when it
    was written in place since, or when another tensor is in its place, as in ``torch.func.functional_call``. Once it
    was found true, and in ``eval``, the layer is compiled without a break in the graph, in which it is not read again.
    Uninitialised in training mode it breaks the graph under ``torch.compile`` (with ``fullgraph=True``, the compiler
    refuses), and under ``torch.export`` and ``torch.func`` it raises.

    Cost: a product and a sum per element.

    Source: Glow (Kingma and Dhariwal, 2018), section 3.1, https://arxiv.org/abs/1807.03039. There the statistics are
    written into the parameters; as buffers they survive FSDP, which owns the parameters, and weight decay pulls
    towards normalised outputs, not towards the identity.

    Args:
        channels: of the input.

    Shape:
        - Input: ``(batch, channels, ...)``, floating point
        - Output: the same

    Raises:
        TypeError: if ``channels`` is not an integer, or the input not a floating-point tensor.
        ValueError: if the input has another number of channels, the first batch or its statistics are not finite in
            the dtype of the buffers, or cannot be read, or a checkpoint has deviations that are not positive.

    Example:
        >>> norm = ActNorm(1)
        >>> norm(torch.tensor([[4.], [6.]])).flatten()
        tensor([-1.,  1.], grad_fn=<ViewBackward0>)
        >>> norm(torch.tensor([[8.]])).item()
        3.0
    """

    mean: Tensor
    std: Tensor
    initialized: Tensor

    _written_before_use = frozenset({"mean", "std", "initialized"})
    """In a run that sets these buffers they are set first: a replay must find them set."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels = channels_of("ActNorm", channels)
        self.log_scale = nn.Parameter(torch.empty(channels))
        self.shift = nn.Parameter(torch.empty(channels))
        self.register_buffer("mean", torch.empty(channels))
        self.register_buffer("std", torch.empty(channels))
        # One element, not none: torch 2.11 compiles a float64 scalar as a number, and loses what is written to it.
        self.register_buffer("initialized", torch.zeros(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the layer the identity, which takes the statistics of the next batch in training mode."""
        with torch.no_grad():
            for zero in (self.log_scale, self.shift, self.mean, self.initialized):
                zero.zero_()
            self.std.fill_(1)
        self._known_initialized = False  # once true, the device is not asked any more,
        self._found_in = (0, 0)  # if the buffer is in the state in which it was found true

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        x = self._entering(x, forwards=True)
        mean, scale, shift, dtype = self._constants(x)
        return ((x.to(dtype) - mean) * scale + shift).to(x.dtype)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        y = self._entering(y, forwards=False)
        mean, scale, shift, dtype = self._constants(y)
        return ((y.to(dtype) - shift) / scale + mean).to(y.dtype)

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        y = self.forward(x)  # which may initialise; no call: FSDP would shard the parameters behind it
        return y, self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        x = self.inverse(y)
        return x, -self._log_det(y)

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
        dtype = wide(x, self.log_scale)
        # A copy for the graph: the buffer may be written before backward, by a first batch or by DDP.
        scale = self.log_scale.to(dtype).exp() / self.std.to(dtype, copy=True)
        mean, shift = self.mean.to(dtype), self.shift.to(dtype)
        return per_channel(mean, x), per_channel(scale, x), per_channel(shift, x), dtype

    def _log_det(self, x: Tensor) -> Tensor:
        dtype = wide(x, self.log_scale)
        return repeated((self.log_scale.to(dtype) - self.std.to(dtype, copy=True).log()).sum(), x)

    def _entering(self, x: Tensor, *, forwards: bool) -> Tensor:
        x = has_channels(self, x, self.channels)
        if self.training and buffers_moving(default=forwards) and not self._is_known(x):
            self._initialize(x, forwards=forwards)
        return x

    def _is_known(self, x: Tensor) -> bool:
        """Whether the buffer was found true, and is still what it was, as far as that can be told."""
        if not self._known_initialized:
            return False
        if unreadable(x) or on_copies():
            return True
        return self._found_in == _state_of(self.initialized)

    def _remember(self) -> None:
        self._known_initialized = True  # apart, or a graph would be compiled for each state
        self._found_in = _state_of(self.initialized)

    def _initialize(self, x: Tensor, *, forwards: bool) -> None:
        if is_unread() or x.is_meta:
            return  # there are no values
        if exporting() or (transformed() and not torch.compiler.is_dynamo_compiling()):
            fix = " Run one batch in training mode first, or eval()."
            raise _check.value_error(self, "can't be initialised while exporting or under torch.func", x, fix)
        if not self.initialized:
            with torch.no_grad():
                found = _statistics(x)
                if found is None:
                    return
                mean, std = found
                if not (mean.isfinite().all() and std.isfinite().all()):
                    raise _check.value_error(self, "the first batch must be finite", x)
                rounding, least = torch.finfo(wide(x)).eps, torch.finfo(self.std.dtype).tiny
                std = torch.where(std <= rounding * mean.abs() + least, 1.0, std)
                if not forwards:  # x = s y + m gives the outputs of inverse mean 0 and variance 1
                    mean, std = -mean / std, 1 / std
                mean, std = mean.to(self.mean.dtype), std.to(self.std.dtype)
                if not (mean.isfinite().all() and std.isfinite().all() and (std >= least).all()):
                    rule = f"the first batch must have a mean and a deviation that {self.std.dtype} holds"
                    raise _check.value_error(self, rule, x)
                self.mean.copy_(mean)
                self.std.copy_(std)
                self.initialized.fill_(1)
        if not on_copies():
            self._remember()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        std = state_dict.get(f"{prefix}std")
        if isinstance(std, Tensor) and not std.is_meta and not bool(((std > 0) & std.isfinite()).all()):
            got = [float(each) for each in std]
            raise ValueError(f"{_check.name(self)}: {prefix}std must be positive and finite, got {got}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]
        self._known_initialized = not self.initialized.is_meta and bool(self.initialized)
        self._found_in = _state_of(self.initialized)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def _statistics(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each channel over the batches of all processes; ``None`` if these are empty."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    dims = [0, *range(2, x.ndim)]
    x = x.detach().to(dtype)
    count = x.new_full((1,), x.shape[0] * x.shape[2:].numel())
    total = _over_processes(torch.cat((x.sum(dims), count)))
    if not total[-1]:
        return None
    mean = total[:-1] / total[-1]
    squares = _over_processes((x - per_channel(mean, x)).square().sum(dims))
    return mean, (squares / total[-1]).sqrt()


def _over_processes(total: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)  # pyright: ignore[reportUnknownMemberType]
    return total


def _state_of(t: Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often it was written to; of one that is traced, what no tensor has.

    Not the tensor itself: a layer holds none but parameters and buffers.
    """
    if torch.compiler.is_dynamo_compiling():
        return 0, 0
    return id(t), 0 if t.is_inference() else t._version
