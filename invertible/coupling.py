"""Couplings: invertible whatever the function inside."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _check
from ._buffers import buffers_moving, buffers_stay, in_training, kept_buffers
from ._compiled import is_compiled
from ._function import evaluate, readable
from ._fused import fused_sum
from ._products import around_functions
from ._random import draws
from ._running import call
from ._tracing import transformed
from ._value import Value, describe, detached_leaf, is_channels_last, laid_out, zero_log_det
from .module import Exactness, InvertibleModule
from .transform import Additive, CouplingTransform, TransformOnGrid

__all__ = ["Coupling"]


class Coupling(InvertibleModule[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]):
    r"""Transforms one stream by a function of the other, and swaps the two (unlike FrEIA, nflows and RealNVP).

    With S = ``downsample``, F = ``function`` and T = ``transform``,

    .. math::
        (x, \tilde x) \mapsto (S \tilde x, \; T(S x;\, F \tilde x)),
        \qquad\text{additive:}\quad (S \tilde x, \; S x + F \tilde x).

    F is never inverted: it may be any module that maps :math:`\tilde x` to the shape of :math:`S x`. It is evaluated
    once per direction. If its ``forward`` has a parameter named ``condition`` and there is one, it is called
    ``function(x̃, condition=condition)``. Without ``downsample``, the first output is :math:`\tilde x` itself.

    In ``inverse`` the function's buffers stay as they are, in training mode too (see :class:`InvertibleModule`).
    Dropout inside the function makes the layer ``stochastic``: in training mode, each direction draws its own masks.
    Torch's own dropout is found; any other random part says so by an attribute ``stochastic = True``. A function that
    writes to its input is found except under ``inference_mode`` and ``torch.compile``, where writes are not counted;
    there it gets a copy, if one of its modules has ``inplace=True``. Compiled by itself, it fails in the compiler.
    The log-determinant is that of S, on both streams, plus that of T.

    Cost: one evaluation of the function in each direction, and that of the transform and of S.

    Source: i-RevNet (Jacobsen et al., 2018), Eq. (1), https://arxiv.org/abs/1802.07088, with S applied to both
    streams as in its released code; the equation prints :math:`x_j` without S.

    Args:
        function: the free part F of the coupling.
        transform: what its output does to a stream; ``None`` stands for :class:`Additive`.
        downsample: the map S, of a tensor to a tensor, usually ``PixelUnshuffle(2)``; ``None`` for the identity.

    Shape:
        - Input: a pair of ``(batch, channels, ...)``; the two may differ in channels where F allows it
        - Output: a pair; without ``downsample``, of the shapes of ``(x̃, x)``

    Raises:
        TypeError: if the input is not a pair of floating-point tensors of one dtype, or the function's output is
            not a tensor whose dtype the stream can hold.
        ValueError: if the streams differ in batch, spatial size or device, if the function's output has a wrong
            shape, or if the function wrote to its input.

    Example:
        >>> coupling = Coupling(nn.Tanh())
        >>> x, x_tilde = torch.ones(1, 2), torch.zeros(1, 2)
        >>> coupling((x, x_tilde))
        (tensor([[0., 0.]]), tensor([[1., 1.]]))
        >>> coupling.inverse(coupling((x, x_tilde)))
        (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    def __init__(
        self,
        function: nn.Module,
        transform: CouplingTransform | None = None,
        *,
        downsample: InvertibleModule[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        transform = Additive() if transform is None else transform
        _check_option("function", function, nn.Module)
        _check_option("transform", transform, CouplingTransform)
        if downsample is not None:
            _check_option("downsample", downsample, InvertibleModule)
        self.function = function
        self.transform = transform
        self.downsample = downsample

    @property
    def bijective(self) -> bool:
        return self.downsample is None or self.downsample.bijective

    @property
    def exactness(self) -> Exactness:
        own = Exactness.ROUNDING if self.grid is None else Exactness.EXACT
        return own if self.downsample is None else max(own, self.downsample.exactness)

    @property
    def keeps_grid(self) -> bool:
        return self.transform.keeps_grid and (self.downsample is None or self.downsample.keeps_grid)

    @property
    def stochastic(self) -> bool:
        inside = list(self.modules())[1:]
        return any(draws(part) or getattr(part, "stochastic", False) is True for part in inside)

    def forward(self, x: tuple[Tensor, Tensor], *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = self._streams(x)
        y1, base = self._down(x2, condition), self._down(x1, condition)
        return y1, self._map(base, self._evaluate(x2, base, condition, moving=True))

    def inverse(self, y: tuple[Tensor, Tensor], *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        y1, y2 = self._streams(y)
        x2 = self._up(y1, condition)
        base = self._map.inverse(y2, self._evaluate(x2, y2, condition, moving=False))
        return self._up(base, condition), x2

    def forward_and_log_det(
        self, x: tuple[Tensor, Tensor], *, condition: Value | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Maps ``x`` to ``y`` and returns the log-determinant per sample."""
        x1, x2 = self._streams(x)
        (y1, log_det_2), (base, log_det_1) = (
            self._down_and_log_det(x2, condition),
            self._down_and_log_det(x1, condition),
        )
        y2, log_det = self._map.forward_and_log_det(base, self._evaluate(x2, base, condition, moving=True))
        return (y1, y2), log_det_1 + log_det_2 + log_det

    def inverse_and_log_det(
        self, y: tuple[Tensor, Tensor], *, condition: Value | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Maps ``y`` to ``x`` and returns the log-determinant of the inverse per sample."""
        y1, y2 = self._streams(y)
        x2, log_det_2 = self._up_and_log_det(y1, condition)
        base, log_det = self._map.inverse_and_log_det(y2, self._evaluate(x2, y2, condition, moving=False))
        x1, log_det_1 = self._up_and_log_det(base, condition)
        return (x1, x2), log_det_1 + log_det_2 + log_det

    def fused_rule(
        self, method: str, y: Any, grad: Any, grad_log_det: Tensor | None, *, condition: Value | None
    ) -> tuple[Any, Sequence[Tensor], Sequence[Tensor | None]]:
        forwards = method.startswith("forward")
        if self.downsample is None and type(self.transform) is Additive:
            return self._fused_additive(y, grad, condition, forwards=forwards)
        log_det = method.endswith("log_det")
        x, tensors = (self._replay_forward if forwards else self._replay_inverse)(y, condition, log_det=log_det)
        return x, tensors, [*grad, grad_log_det] if log_det else grad

    def _fused_additive(
        self,
        y: tuple[Tensor, Tensor],
        grad: tuple[Tensor | None, Tensor | None],
        condition: Value | None,
        *,
        forwards: bool,
    ) -> tuple[Any, Sequence[Tensor], Sequence[Tensor | None]]:
        """The sum itself need not be repeated: its derivatives are 1, or -1 for the function in the inverse."""
        kept = detached_leaf(y[0] if forwards else y[1])  # the stream that F reads
        other = y[1] if forwards else y[0]
        shift = self._evaluate(kept, other, condition, moving=forwards)
        plain = shift.detach()
        own = grad[1] if forwards else grad[0]
        if own is not None and self.grid is not None:  # straight through the rounding, in the function's dtype
            own = laid_out(own, dtype=shift.dtype, channels_last=is_channels_last(shift))
        if forwards:
            base = detached_leaf(self._map.inverse(other, plain))
            return (base, kept), (kept, base, shift), (*grad, own)
        base = detached_leaf(self._map(other, plain))
        return (kept, base), (base, kept, shift), (*grad, None if own is None else -own)

    def _replay_forward(self, y: tuple[Tensor, Tensor], condition: Value | None, *, log_det: bool) -> tuple[Any, Any]:
        with torch.no_grad():
            x2 = detached_leaf(self._up(y[0], condition))
        parameters = self._evaluate(x2, y[1], condition, moving=True)
        with torch.no_grad():
            x1 = detached_leaf(self._up(self._map.inverse(y[1], parameters), condition))
        if not log_det:
            return (x1, x2), [self._down(x2, condition), self._map(self._down(x1, condition), parameters)]
        (y1, log_det_2), (base, log_det_1) = (self._down_and_log_det(x, condition) for x in (x2, x1))
        y2, log_det_y = self._map.forward_and_log_det(base, parameters)
        return (x1, x2), [y1, y2, log_det_1 + log_det_2 + log_det_y]

    def _replay_inverse(self, x: tuple[Tensor, Tensor], condition: Value | None, *, log_det: bool) -> tuple[Any, Any]:
        with torch.no_grad(), nullcontext() if self.downsample is None else buffers_stay(self.downsample):
            y1, base = detached_leaf(self._down(x[1], condition)), self._down(x[0], condition)
        x2, log_det_2 = self._up_and_log_det(y1, condition) if log_det else (self._up(y1, condition), None)
        parameters = self._evaluate(x2, base, condition, moving=False)
        with torch.no_grad():
            y2 = detached_leaf(self._map(base, parameters))
        if log_det_2 is None:
            return (y1, y2), [self._up(self._map.inverse(y2, parameters), condition), x2]
        back, log_det_x = self._map.inverse_and_log_det(y2, parameters)
        x1, log_det_1 = self._up_and_log_det(back, condition)
        return (y1, y2), [x1, x2, log_det_1 + log_det_2 + log_det_x]

    @property
    def _map(self) -> CouplingTransform | TransformOnGrid:
        """What is done to a stream: by the transform, or as it does, on the grid."""
        if self.grid is None:
            return self.transform
        return cast("Any", self.transform)._on_grid(self.grid, None if transformed() else fused_sum(self.function))

    def _streams(self, value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x1, x2 = _check.are_streams(self, value)
        _check.is_floating(self, x1)
        if self.grid is not None:
            _check.is_on_grid(self, self.grid.dtype, value)
        return x1, x2

    def _down(self, x: Tensor, condition: Value | None) -> Tensor:
        return x if self.downsample is None else call(self, self.downsample, "forward", x, condition)

    def _up(self, y: Tensor, condition: Value | None) -> Tensor:
        return y if self.downsample is None else call(self, self.downsample, "inverse", y, condition)

    def _down_and_log_det(self, x: Tensor, condition: Value | None) -> tuple[Tensor, Tensor]:
        if self.downsample is None:
            return x, zero_log_det(x)
        self._refuse_injective()
        return call(self, self.downsample, "forward_and_log_det", x, condition)

    def _up_and_log_det(self, y: Tensor, condition: Value | None) -> tuple[Tensor, Tensor]:
        if self.downsample is None:
            return y, zero_log_det(y)
        self._refuse_injective()
        return call(self, self.downsample, "inverse_and_log_det", y, condition)

    def _refuse_injective(self) -> None:
        # With a tall S, F's part outside the range of S enters det JᵀJ: it is no sum of the layers' any more.
        if not self.bijective:
            raise ValueError(f"{_check.name(self)}: has no log-determinant, because downsample is not bijective.")

    def _evaluate(self, x2: Tensor, base: Tensor, condition: Value | None, *, moving: bool) -> Tensor:
        """Evaluates F on ``x2``; its output must fit ``base``, the stream that it transforms."""
        self.transform.check(base)
        keep = in_training(self.function) and not buffers_moving(default=moving)
        if self.grid is not None:
            x2 = readable(self.function, x2)
        version = _version(x2)
        if version is None and any(getattr(part, "inplace", False) for part in self.function.modules()):
            x2 = x2.clone()  # its writes are not counted, so that they can't be refused
        with kept_buffers(self.function) if keep else nullcontext():
            taken = condition if condition is not None and self._takes_condition() else None
            parameters = self._call_function(x2, taken)
        if None not in (version, now := _version(x2)) and now != version:
            raise ValueError(
                f"{_check.name(self)}: the function must not write to its input, but it did, and the stream is lost. "
                "Is its first layer in-place, such as ReLU(inplace=True)?"
            )
        fault = self._fault(parameters, base)
        if fault is not None:  # the one check that comes late: only its output shows what a function does
            moved = not keep and self.function.training and any(True for _ in self.function.buffers())
            raise type(fault)(f"{fault} The function's buffers have moved already.") if moved else fault
        return parameters

    def _call_function(self, x2: Tensor, condition: Value | None) -> Any:
        try:
            with around_functions():
                return evaluate(self.function, x2, condition, exactly=self.grid is not None)
        except Exception as error:
            if condition is None and isinstance(error, TypeError):
                self._refuse_missing_condition(error)
            as_leaf = self.grid is not None or is_compiled(self.function)
            if as_leaf and any(getattr(part, "inplace", False) for part in self.function.modules()):
                error.add_note(
                    f"{_check.name(self)}: the function must not write to its input. Is its first layer in-place, such "
                    "as ReLU(inplace=True)?"
                )
            raise

    def _refuse_missing_condition(self, error: TypeError) -> None:
        """A better message, if that is what was wrong: no such function has begun to run."""
        try:
            parameter = self._condition_parameter()
        except ValueError:  # no Python code
            return
        if parameter is not None and parameter.default is parameter.empty:
            fix = "Pass it to the network: net(x, condition=...)."
            raise TypeError(f"{_check.name(self)}: the function needs a condition, got None. {fix}") from error

    def _on_grid(self) -> Iterator[tuple[str, InvertibleModule[Any, Any]]]:
        if self.downsample is not None:  # the function computes in its own precision
            yield "downsample", self.downsample

    def _functions(self) -> Sequence[nn.Module]:
        return (self.function,)

    def _takes_condition(self) -> bool:
        return self._condition_parameter() is not None

    def _condition_parameter(self) -> inspect.Parameter | None:
        """How the function declares its condition, if it takes one."""
        function = getattr(self.function, "_orig_mod", self.function)  # look through torch.compile
        return inspect.signature(function.forward).parameters.get("condition")

    def _fault(self, parameters: object, base: Tensor) -> TypeError | ValueError | None:
        """The error that the function's output deserves, if any."""
        if not isinstance(parameters, Tensor):
            return _check.type_error(self, "the function must return a tensor", parameters)
        channels = base.shape[1] * self.transform.parameters_per_element
        expected = (base.shape[0], channels, *base.shape[2:])
        if parameters.shape != expected:
            return _check.value_error(self, f"the function must return a tensor of shape {expected}", parameters)
        fits = self.grid is not None or torch.promote_types(parameters.dtype, base.dtype) == base.dtype
        if not parameters.is_floating_point() or not fits:
            rule = f"the function's output must fit into the stream's dtype {base.dtype}"
            return TypeError(f"{_check.name(self)}: {rule}, got {parameters.dtype}.")
        if parameters.device != base.device:
            rule = f"the function's output must be on the stream's device {base.device}"
            return ValueError(f"{_check.name(self)}: {rule}, got {parameters.device}.")
        return None


def _version(x: Tensor) -> int | None:
    """Counts the writes to a tensor; inference tensors and traced ones don't count theirs."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _check_option(option: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"Coupling: {option} must be of type {kind.__name__}, got {describe(value)}.")
