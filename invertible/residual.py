"""A residual block that is invertible because its function is a contraction."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from . import _check
from ._channels import has_channels, wide, without_autocast
from ._fixed_point import ConvergenceError, Solved, differentiable, solve
from ._lipschitz import constant_of, dims_of, scaled_weights, walk, why_unbounded
from ._log_det import by_jacobian, by_series, roulette, truncated
from ._random import draws
from ._range import is_unread
from ._tracing import exporting, unreadable
from ._value import Value, describe, is_channels_last, laid_out
from .module import Exactness, InvertibleModule

__all__ = ["Residual"]

LogDet = Literal["series", "roulette", "exact"]

_TERMS: dict[str, int] = {"series": 10, "roulette": 2, "exact": 0}
"""How many there are unless the caller says so."""

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Of the inverse by the dtype of what it is given; for 16 bits :data:`_COARSE`."""

_COARSE = 1e-4

_GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Of its gradient, relative to its size, by the dtype in which it is computed."""


class Residual(InvertibleModule[Tensor, Tensor]):
    r"""Adds a contraction to its input: an invertible residual block.

    .. math::
        y = x + F(x) \qquad \log|\det J| = \log|\det(I + J_F)|

    F = ``function`` is made of layers whose Lipschitz constants multiply to at most ``lipschitz`` < 1: each Linear and
    each Conv1d, 2d or 3d is evaluated with its weight W scaled, :math:`W \min(1, c / \beta)`, where :math:`\beta` is an
    upper bound on its operator norm, at any size of image, and at most 7.1 % above it (above that of the convolution
    on an infinite image, without its stride). c is equal for all weights: with k weights and activations that multiply
    slopes by s, :math:`c^k s` = ``lipschitz``. The parameters stay the raw weights, so a small one is used as it is,
    and nothing has to be updated, or saved, beside them. F may be one layer or a ``torch.nn.Sequential``, nested too,
    of such weights, smooth and other activations of torch with a known slope, and Flatten, Unflatten, PixelShuffle,
    PixelUnshuffle, ChannelShuffle and Identity. Anything else is refused; with ``lipschitz=None`` any module is taken
    as it is, on the caller's promise that it is a contraction in the Euclidean norm of each sample. The bound holds up
    to rounding, and reads the parameters as they are stored: hooks that change what a layer returns are not in it.

    ``inverse`` iterates :math:`x \leftarrow y - F(x)`, for each sample until its error is proved to be below
    ``tolerance``, the root mean square over its elements, or below what rounding leaves. A sample is not iterated
    further for the others' sake. ``solved`` says what the last inverse took (:class:`Solved`). The derivatives of
    ``inverse`` are those of the solution: their cost in memory is one evaluation of F, and in time the same iteration
    again. They are first derivatives only.

    The log-determinant has gradients. ``log_det`` chooses how it is computed:

    ``"exact"``
        By the Jacobian: d evaluations of F for d elements per sample, at once, and d³. For few dimensions.
    ``"series"``
        :math:`\sum_{k=1}^n \frac{(-1)^{k+1}}{k} \operatorname{tr} J_F^k` with n = ``terms``. Its error is at most
        :math:`d\,L^{n+1} / ((n + 1)(1 - L))`, and of one sign for no n in general: a biased estimate.
    ``"roulette"``
        The same series, ended by chance after at least ``terms`` terms, with later terms weighted by the inverse of
        their probability: unbiased, with a larger variance, and a cost that varies.

    Both estimate traces by :math:`v^T J^k v` for ``probes`` vectors v of random signs, or compute them by all d unit
    vectors with ``probes="all"``. Gradients are those of :math:`v^T \sum_k (-J)^k\,\dot J v`, one product with a graph,
    so that memory does not grow with the terms. A log-determinant with random numbers makes the layer ``stochastic``;
    they come from torch's generator. With ReLU, J is constant in pieces, and its derivative by x zero: take a smooth
    activation.

    All is computed in the widest dtype of input and parameters, and at least in float32, under autocast too.
    ``inverse`` and the log-determinants break the graph of ``torch.compile`` and are refused by ``torch.export``,
    ``torch.jit.trace`` and ``torch.func``; ``forward`` is not. ``inverse`` waits for the device in each iteration. A
    condition is not handed to F.

    Cost: one evaluation of F forward, one per iteration in ``inverse`` (about log ``tolerance`` / log L), and one
    vector-Jacobian product per term of the log-determinant; per call the bounds, products of C³ for each sampled
    frequency of a kernel.

    Source: i-ResNet (Behrmann et al., 2019), Eqs. (1) to (3) and algorithms 1 and 2, https://arxiv.org/abs/1811.00995;
    residual flows (Chen et al., 2019), Eqs. (6) and (8), https://arxiv.org/abs/1906.02735. These estimate norms by
    power iteration, from below; here they are bounded from above, by Gram iteration (Delattre et al., 2023,
    https://arxiv.org/abs/2305.16173) on samples of the symbol, and a correction for what is between the samples by
    Bernstein's inequality, which for 3 taps is nearer to 1 than that of Pfister and Bresler,
    https://arxiv.org/abs/1802.09588. The roulette goes on with probability max(1/2, ``lipschitz``) and not 1/2, for
    which the variance would be unbounded in the worst case if L² > 1/2. The derivatives of the inverse are those of the
    implicit function theorem.

    Args:
        function: F, which keeps the shape.
        lipschitz: the largest Lipschitz constant of F, in (0, 1), or ``None`` if F is a contraction by itself.
        log_det: ``"series"``, ``"roulette"`` or ``"exact"``.
        terms: of the series, or the first ones of the roulette; ``None`` for 10 and 2.
        probes: the number of random vectors, or ``"all"``.
        tolerance: of ``inverse``, absolute, in the input's unit; ``None`` for 1e-12 in float64, 1e-6 in float32 and
            1e-4 for 16-bit input.
        max_iterations: of ``inverse`` and of its gradient.

    Shape:
        - Input: ``(batch, ...)`` of any shape that F keeps, floating point
        - Output: the same

    Raises:
        TypeError: if an option is of the wrong kind, or the input is not a floating-point tensor.
        ValueError: if an option has a value that is not allowed, F has a part that can't be bounded, F changes the
            shape, or a function of ``lipschitz=None`` draws random numbers or normalises by the batch.
        ConvergenceError: if ``inverse`` has not come to its tolerance, or met a value that is not finite.
        RuntimeError: if what has no one graph is exported, or the inverse is differentiated twice.

    Example:
        >>> step = Residual(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), log_det="exact")
        >>> x = torch.rand(2, 3)
        >>> y, log_det = step.forward_and_log_det(x)
        >>> torch.allclose(step.inverse(y), x, atol=1e-5)
        True
        >>> step.solved.error < 1e-5
        True
    """

    solved: Solved | None
    """What the last ``inverse`` took; ``None`` before the first one."""

    def __init__(
        self,
        function: nn.Module,
        *,
        lipschitz: float | None = 0.9,
        log_det: LogDet = "series",
        terms: int | None = None,
        probes: int | Literal["all"] = 1,
        tolerance: float | None = None,
        max_iterations: int = 5000,
    ) -> None:
        super().__init__()
        if not isinstance(function, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Residual: function must be of type Module, got {describe(function)}.")
        self.function = function
        self.lipschitz = None if lipschitz is None else _check.number("Residual", "lipschitz", lipschitz)
        if self.lipschitz is not None and not 0 < self.lipschitz < 1:
            fix = " It takes None for a function that is a contraction by itself."
            raise ValueError(f"Residual: lipschitz must be between 0 and 1, got {lipschitz!r}.{fix}")
        if not isinstance(cast("object", log_det), str) or log_det not in _TERMS:
            rule = "log_det must be one of " + ", ".join(map(repr, _TERMS))
            raise ValueError(f"Residual: {rule}, got {log_det!r}.")
        self.log_det: LogDet = log_det
        self.terms = _TERMS[log_det] if terms is None else _positive("terms", terms)
        self.probes: int | Literal["all"] = probes if probes == "all" else _positive("probes", probes)
        self.tolerance = None if tolerance is None else _check.number("Residual", "tolerance", tolerance)
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"Residual: tolerance must be positive, got {tolerance!r}.")
        self.max_iterations = _positive("max_iterations", max_iterations)
        self.solved = None
        if self.lipschitz is not None:
            self._refuse_unbounded(self.lipschitz)

    @property
    def exactness(self) -> Exactness:
        return Exactness.ITERATIVE

    @property
    def stochastic(self) -> bool:
        return self.log_det == "roulette" or (self.log_det == "series" and self.probes != "all")

    def lipschitz_bound(self) -> float | None:
        """The proved bound on the Lipschitz constant of F with the present weights; ``None`` if the caller promised.

        Example:
            >>> nn.init.zeros_((linear := nn.Linear(2, 2)).weight).sum().item()
            0.0
            >>> Residual(linear).lipschitz_bound()
            0.0
        """
        if self.lipschitz is None:
            return None
        with torch.no_grad(), self._without_autocast():
            return float(scaled_weights(self.function, self.lipschitz, self._dtype())[1])

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        x = self._checked(x)
        with without_autocast(x):
            given = x.to(self._dtype(x))
            return _like(given + self._prepared(given)[0](given), x)

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        y = self._checked(y)
        return cast("Tensor", self._run_eagerly("inverse", self._inverse, y))

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        x = self._checked(x)
        value, log_det = self._run_eagerly("the log-determinant", self._value_and_log_det, x)
        return _like(x.to(value.dtype) + value, x), log_det

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        x = self.inverse(y)
        return x, -self._run_eagerly("the log-determinant", self._value_and_log_det, x)[1]

    def _run_eagerly(self, what: str, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        if torch.compiler.is_dynamo_compiling() and not exporting():
            from ._eager import run_eagerly  # imports the compiler, which is slow

            return run_eagerly(function, x)
        if unreadable(x) and not (is_unread() or x.is_meta):
            raise RuntimeError(
                f"{_check.name(self)}: {what} is no one graph, and can't be exported, traced or run under torch.func."
            )
        return function(x)

    def _inverse(self, y: Tensor) -> Tensor:
        with without_autocast(y):
            given = y.to(self._dtype(y))
            function, bound = self._prepared(given)
            with torch.no_grad():
                if is_unread() or y.is_meta:  # nobody can say when to stop
                    solution = given - function(given)
                    lipschitz = None
                else:
                    lipschitz = None if bound is None else min(float(bound), 1 - 1e-6)
                    solution = self._solved(function, given, lipschitz, y.dtype)
            x = differentiable(
                function,
                given,
                solution,
                who=_check.name(self),
                lipschitz=lipschitz,
                tolerance=_GRADIENT.get(given.dtype, 1e-6),
                limit=self.max_iterations,
            )
            return _like(x, y)

    def _solved(
        self, function: Callable[[Tensor], Tensor], y: Tensor, lipschitz: float | None, dtype: torch.dtype
    ) -> Tensor:
        tolerance = _TOLERANCE.get(dtype, _COARSE) if self.tolerance is None else self.tolerance
        x, self.solved, left = solve(function, y, lipschitz=lipschitz, tolerance=tolerance, limit=self.max_iterations)
        if bool((left != 0).any()):
            count = self.solved.iterations
            count = f"{count} iteration" + ("" if count == 1 else "s")
            off, worst = int((left != 0).sum()), float(left.amax())
            if not bool(left.isfinite().all()):
                raise ConvergenceError(
                    f"{_check.name(self)}: inverse met values that are not finite after {count}, "
                    f"{off} of {len(y)} samples."
                )
            fix = "max_iterations or tolerance" + (", or lower lipschitz" if lipschitz is not None else "")
            raise ConvergenceError(
                f"{_check.name(self)}: inverse did not converge in {count}: {off} of {len(y)} samples may be off by "
                f"up to {worst:.1e}, and the tolerance is {tolerance:g}. Raise {fix}."
            )
        return x

    def _value_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and the log-determinant of each sample."""
        if torch.is_inference_mode_enabled():  # in which nothing can be differentiated
            with torch.inference_mode(False), torch.no_grad():
                return self._value_and_log_det(x.clone())
        with without_autocast(x):
            given = x.to(self._dtype(x), copy=x.is_inference())
            function, _ = self._prepared(given)
            if not given.numel():
                return function(given), given.new_zeros(len(given), dtype=x.dtype)
            if self.log_det == "exact":
                value, log_det = by_jacobian(function, given)
            else:
                go_on = max(0.5, self.lipschitz or 0.9)
                if self.log_det == "roulette":
                    weights = roulette(self.terms, go_on, on_average=is_unread() or x.is_meta)
                else:
                    weights = truncated(self.terms)
                value, log_det = by_series(
                    function, given, weights, probes=None if self.probes == "all" else self.probes
                )
            return value, log_det.to(x.dtype)

    def _prepared(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        """F in the dtype of ``x``, with its weights scaled; and a bound on its Lipschitz constant, if one is known."""
        weights: dict[str, Tensor] = {}
        bound = None
        if self.lipschitz is not None:
            self._refuse_unbounded(self.lipschitz, x)
            weights, bound = scaled_weights(self.function, self.lipschitz, x.dtype)
        for key, parameter in self.function.named_parameters(remove_duplicate=False):
            if key not in weights and parameter.is_floating_point() and parameter.dtype != x.dtype:
                weights[key] = parameter.to(x.dtype)
        inplace = any(getattr(part, "inplace", False) is True for part in self.function.modules())

        def function(x: Tensor) -> Tensor:
            given = x.clone() if inplace else x
            value = torch.func.functional_call(self.function, weights, (given,)) if weights else self.function(given)
            if not isinstance(value, Tensor):
                raise _check.type_error(self, "the function must return a tensor", value)
            if value.shape != x.shape:
                raise _check.value_error(self, f"the function must return a tensor of shape {tuple(x.shape)}", value)
            return value.to(x.dtype)

        return function, bound

    def _checked(self, x: object) -> Tensor:
        x = has_channels(self, x, None)
        if self.lipschitz is None:
            part = next((part for part in self.function.modules() if _mixes(part)), None)
            if part is not None:
                rule = "the function must be the same in every call and treat samples alone"
                fix = " Call eval(), or leave it out."
                raise ValueError(f"{_check.name(self)}: {rule}, got {_check.name(part)} in training mode.{fix}")
        return x

    def _refuse_unbounded(self, limit: float, x: Tensor | None = None) -> None:
        layers = list(walk(self.function))
        fix = " With lipschitz=None the function is taken as it is, if it is a contraction by itself."
        for key, layer in layers:
            rule = why_unbounded(layer)
            if rule is not None:
                where = f" as function.{key}" if key else " as function"
                raise ValueError(f"Residual: {rule}, got {_check.name(layer)}{where}.{fix}")
        slopes = [constant_of(layer) for _, layer in layers]
        total = math.prod([slope for slope in slopes if slope is not None])
        if None not in slopes and total > limit:
            rule = f"a function without weights must have a Lipschitz constant of at most {limit:g}"
            raise ValueError(f"Residual: {rule}, got one of {total:g}.")
        if x is not None:
            self._refuse_unbatched([layer for _, layer in layers], x)

    def _refuse_unbatched(self, layers: list[nn.Module], x: Tensor) -> None:
        """Refuses an input without a batch, or what becomes of one: torch would take the batch for channels."""
        ndim = x.ndim
        for layer in layers:
            dims = 2 if isinstance(layer, (nn.PixelShuffle, nn.PixelUnshuffle)) else dims_of(layer)
            if dims is not None and ndim != dims + 2:
                where = "" if ndim == x.ndim else f" before {_check.name(layer)}"
                rule = f"expected a batch with channels and {dims} spatial dimensions{where}"
                raise _check.value_error(self, rule, x)
            if isinstance(layer, nn.Flatten):
                ndim -= layer.end_dim % ndim - layer.start_dim
            elif isinstance(layer, nn.Unflatten):
                ndim += len(layer.unflattened_size) - 1

    def _dtype(self, x: Tensor | None = None) -> torch.dtype:
        parameters = [p for p in self.function.parameters() if p.is_floating_point()]
        start = parameters[0] if x is None and parameters else x
        return torch.float32 if start is None else wide(start, *parameters)

    def _without_autocast(self) -> AbstractContextManager[Any]:
        first = next(self.function.parameters(), None)
        return nullcontext() if first is None else without_autocast(first)

    def extra_repr(self) -> str:
        options = [f"lipschitz={self.lipschitz}", f"log_det={self.log_det!r}"]
        return ", ".join(options)


def _positive(option: str, value: object) -> int:
    number = _check.integer("Residual", option, value)
    if number < 1:
        raise ValueError(f"Residual: {option} must be at least 1, got {value!r}.")
    return number


def _mixes(part: nn.Module) -> bool:
    """Whether a module draws random numbers now, or normalises by the batch."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return draws(part) or (isinstance(part, norms) and (part.training or part.running_mean is None))


def _like(value: Tensor, x: Tensor) -> Tensor:
    return laid_out(value, dtype=x.dtype, channels_last=is_channels_last(x))
