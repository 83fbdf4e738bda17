"""Densities: an invertible map between data and a distribution that is known."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast, overload

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints

from . import _check
from ._base import Base, bases_of, batch_of, draw, flat, in_a_batch, log_prob_of, make_base, repeated, wide
from ._buffers import buffers_move, buffers_stay
from ._tracing import unreadable
from ._value import Value, describe, leaves, map_value
from .dequantize import Dequantize
from .module import InvertibleModule, check_layer

__all__ = ["Flow", "FlowDistribution"]


class Flow(nn.Module):
    r"""The density of data that an invertible map takes to a known distribution.

    With the map :math:`z = f(x)`, ``transform``, and the distribution :math:`p_z`, ``base``,

    .. math::
        \log p(x) = \log p_z(f(x)) + \log|\det J_f(x)|, \qquad x = f^{-1}(z), \quad z \sim p_z .

    There are three calls:

    - ``flow(condition)`` returns a :class:`FlowDistribution`, a ``torch.distributions.Distribution``.
    - ``flow(condition, value=x)`` returns :math:`\log p(x \mid \text{condition})` in nats, of shape ``(batch,)``: to
      train by likelihood.
    - ``flow(condition, samples=n)`` returns n samples for each condition and their log-densities, with gradients: to
      train by a divergence :math:`\mathrm{KL}(p \,\Vert\, q)`, the mean of :math:`\log p(x) - \log q(x)`.

    The last two return tensors from ``forward``, so they are the calls to train by under ``DistributedDataParallel``
    and FSDP, which synchronise nothing else. Both serve every strategy of backpropagation: set
    ``flow.transform.backprop``. (Under :class:`Reconstruct` a loss on log-densities of samples must use the samples,
    too, as a divergence does.) In training mode each moves the buffers of the map as the trained direction does; the
    methods of the distribution move none.

    Where ``transform`` is stochastic (:class:`Augment`, :class:`Dequantize`), ``value=`` gives, on the average over the
    noise, a lower bound of the log-density, or of the log-probability of whole numbers; see there. What ``samples=``
    gives is then, on the average, an upper bound of that of the samples, and so is the divergence.

    Log-densities are summed in float32 at least, whatever ``transform`` computes in.

    Source: Rezende and Mohamed, 2015, https://arxiv.org/abs/1505.05770. The call with a condition that returns a
    distribution is zuko's, https://github.com/probabilists/zuko

    Args:
        transform: the map from data to latent values: bijective, or stochastic.
        base: the distribution of one latent value. Its ``batch_shape`` and ``event_shape`` together are the shape of
            such a value without the batch, so that ``Normal(torch.zeros(2), torch.ones(2))`` is one of two features.
            Its tensors become buffers. Or a module that returns a distribution for ``base(condition)``, with a batch
            shape ``(batch, ...)`` where there is a condition: one that is trained, or conditional. If latent values are
            tuples, as those of a map on several scales, a tuple of such, nested likewise. See :meth:`standard_normal`.
        support: a constraint of ``torch.distributions`` that data meet, for those who ask; ``None``: real numbers.

    Raises:
        TypeError: if ``transform`` is not an :class:`InvertibleModule`, or ``base`` none of the above.
        ValueError: if ``transform`` maps into more dimensions, where it has no density; if the parameters of a
            distribution need gradients; in a call, if the base has another shape than the latent values.

    Example:
        >>> flow = Flow.standard_normal(Sequential(ActNorm(2), Split(), Coupling(nn.Tanh()), Merge()), (2,))
        >>> flow(value=torch.zeros(5, 2)).shape
        torch.Size([5])
        >>> flow().sample((3,)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        transform: InvertibleModule[Any, Any],
        base: Base,
        *,
        support: constraints.Constraint | None = None,
    ) -> None:
        super().__init__()
        check_layer("Flow", transform)
        if transform._is_tall:  # pyright: ignore[reportPrivateUsage]
            rule = "expected a transform that is bijective, or stochastic"
            fix = " What it returns fills no volume, so that a base has no density there; Augment fills it by noise."
            raise ValueError(f"Flow: {rule}, got {_check.name(transform)}.{fix}")
        self.transform = transform
        self.base = make_base(base)
        self.support = support
        self._event: tuple[tuple[Any, ...], Size] | None = None  # the shape of a datum, and of what it was found

    @classmethod
    def standard_normal(
        cls,
        transform: InvertibleModule[Any, Any],
        shape: tuple[int, ...],
        *,
        condition: Value | None = None,
        support: constraints.Constraint | None = None,
    ) -> "Flow":
        """A flow to independent standard normal values, in the shapes that latent values of such data have.

        Args:
            transform: the map from data to latent values. It is run on a batch of zero data: nothing is computed.
            shape: of a datum, without the batch.
            condition: one like those that it will be given, of any batch.
            support: as for the class.

        Raises:
            TypeError: if the shape is no tuple of integers.
            ValueError: if a size is negative.

        Example:
            >>> scales = Sequential(PixelUnshuffle(2), Split(channels=3), Parallel(PixelUnshuffle(2), Identity()))
            >>> flow = Flow.standard_normal(scales, (1, 8, 8))
            >>> [part().event_shape for part in flow.base]
            [torch.Size([12, 2, 2]), torch.Size([1, 4, 4])]
            >>> flow().sample().shape
            torch.Size([1, 8, 8])
        """
        check_layer("Flow", transform)
        _check_shape(shape)
        batch_of(condition)  # refuses what is none
        like = next((p for p in transform.parameters() if p.is_floating_point()), torch.empty(0))
        with torch.no_grad(), _in_eval(transform):
            none = map_value(lambda c: c[:0], condition) if condition is not None else None
            z = transform(like.new_empty(0, *shape), condition=none)

        def normal(part: Tensor) -> Any:
            mean = torch.zeros(part.shape[1:], dtype=part.dtype, device=part.device)
            # torch looks at what it is given, and of a flow on the device "meta" there is nothing to see
            made = Normal(mean, torch.ones_like(mean), validate_args=False if unreadable(mean) else None)
            return Independent(made, mean.ndim)

        return cls(transform, cast("Any", map_value(normal, z)), support=support)

    @overload
    def forward(self, condition: Value | None = None) -> "FlowDistribution": ...
    @overload
    def forward(self, condition: Value | None = None, *, value: Value) -> Tensor: ...
    @overload
    def forward(self, condition: Value | None = None, *, samples: int) -> tuple[Value, Tensor]: ...
    def forward(self, condition: Value | None = None, *, value: Value | None = None, samples: int | None = None) -> Any:
        """Returns a distribution, log-densities of values, or samples with theirs.

        Args:
            condition: what the functions inside see, of shape ``(batch, ...)``, or a tuple of such.
            value: data ``(batch, ...)``, each with the condition of its number.
            samples: how many for each condition.

        Returns:
            A :class:`FlowDistribution`; with ``value`` a tensor ``(batch,)``; with ``samples`` a tensor
            ``(samples, ...)`` and one ``(samples,)``, or ``(samples, batch, ...)`` and ``(samples, batch)``.

        Raises:
            ValueError: if both are given, ``samples`` is negative, or the base is trained and has no ``rsample``; if
                there are more conditions than values, or fewer.
        """
        if value is not None and samples is not None:
            raise ValueError("Flow: expected value or samples, got both.")
        if value is not None:
            return self._log_prob(value, condition)
        if samples is None:
            return FlowDistribution(self, condition)
        samples = _check.integer("Flow", "samples", samples)
        if samples < 0:
            raise ValueError(f"Flow: samples must be at least 0, got {samples}.")
        with buffers_move(self.transform, True):
            return self._drawn(condition, Size((samples, *batch_of(condition))))

    def _log_prob(self, value: Value, condition: Value | None) -> Tensor:
        _check.is_value(self, value)
        lead = next(leaves(value)).shape[:1]
        if condition is not None and batch_of(condition) != lead:
            count = batch_of(condition).numel()
            raise ValueError(f"Flow: expected a condition for each of {lead.numel()} values, got {count}.")
        bases = self._bases(condition)
        z, log_det = self.transform.forward_and_log_det(value, condition=condition)
        return log_prob_of(bases, z, lead) + wide(log_det)

    def _drawn(self, condition: Value | None, lead: Size) -> tuple[Any, Tensor]:
        """Samples in a batch shape that ends with that of the condition, and their log-densities."""
        bases = self._bases(condition)
        if any(p.requires_grad for p in self.base.parameters()) and not all(d.has_rsample for d in flat(bases)):
            rule = "samples of a base that is trained must have gradients"
            raise ValueError(f"Flow: {rule}, got a base without rsample. Train it by its likelihood: value=.")
        z = in_a_batch(draw(bases, lead), lead)
        x, log_det = self.transform.inverse_and_log_det(z, condition=repeated(condition, lead))
        log_prob = log_prob_of(bases, z, lead) - wide(log_det).reshape(lead)
        return map_value(lambda t: t.reshape(lead + t.shape[1:]), x), log_prob

    def _bases(self, condition: Value | None) -> Any:
        """The distributions of latent values, nested as these are."""
        return bases_of(self.base, condition)


class FlowDistribution(Distribution):
    """What ``flow(condition)`` returns: the distribution of data, for each condition.

    Its ``batch_shape`` is that of the condition, ``(batch,)``, or empty; its ``event_shape`` that of a datum, which is
    found by inverting a batch of zero. No method moves a buffer of the map.

    Args:
        flow: whose.
        condition: as there.
        batch_shape: that ends with the condition's; ``None`` for that.

    Example:
        >>> net = Sequential(Split(), Coupling(Conditional(nn.Linear(4, 1))), Merge())
        >>> posterior = Flow.standard_normal(net, (2,), condition=torch.zeros(1, 3))(torch.zeros(5, 3))
        >>> posterior.batch_shape, posterior.event_shape
        (torch.Size([5]), torch.Size([2]))
        >>> posterior.log_prob(posterior.sample((7,))).shape
        torch.Size([7, 5])
    """

    arg_constraints = {}  # noqa: RUF012 (torch's own name, and never written to)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, flow: Flow, condition: Value | None = None, batch_shape: Size | None = None) -> None:
        self.flow, self.condition = flow, condition
        self._bases = flow._bases(condition)  # pyright: ignore[reportPrivateUsage]
        self._event: Size | None = None
        super().__init__(batch_of(condition) if batch_shape is None else batch_shape, validate_args=False)

    @property
    def event_shape(self) -> Size:
        """The shape of a datum.

        Raises:
            TypeError: if data are tuples, which no distribution of torch has.
        """
        flow = self.flow
        if self._event is None:
            of = (*map(id, flow.modules()), *(each.event_shape for each in flat(self._bases)))
            if flow._event is None or flow._event[0] != of:  # pyright: ignore[reportPrivateUsage]
                flow._event = of, self._found_event()  # pyright: ignore[reportPrivateUsage]
            self._event = flow._event[1]  # pyright: ignore[reportPrivateUsage]
        return self._event

    def _found_event(self) -> Size:
        transform = self.flow.transform
        none = Size((0, *batch_of(self.condition)))
        z = in_a_batch(draw(self._bases, none, grad=False), none)
        with torch.no_grad(), _in_eval(transform):  # in which every layer has an inverse
            return _shape_of(transform.inverse(z, condition=repeated(self.condition, none)))

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether samples have gradients: those of the base have, and they are not rounded to whole numbers."""
        rounds = any(isinstance(part, Dequantize) for part in self.flow.transform.modules())
        return not rounds and all(each.has_rsample for each in flat(self._bases))

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What data meet, as the flow was told: real numbers, if it was told nothing."""
        if self.flow.support is not None:
            return self.flow.support
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowDistribution":
        """The same for a larger batch shape, which ends with the one that there is."""
        shape = Size(batch_shape)
        own = self.batch_shape
        if shape[max(len(shape) - len(own), 0) :] != own:
            rule = f"expected a batch shape that ends with {tuple(own)}"
            raise ValueError(f"FlowDistribution: {rule}, got {tuple(shape)}.")
        return FlowDistribution(self.flow, self.condition, shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log-densities in nats, in the value's shape without that of a datum, or the batch shape.

        Raises:
            ValueError: if the value does not end with the shape of a datum, or does not fit the batch shape.
        """
        event = self.event_shape
        if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"FlowDistribution: expected a tensor, got {describe(value)}.")
        before = value.ndim - len(event)
        lead = _broadcast(value.shape[: max(before, 0)], self.batch_shape)
        if before < 0 or value.shape[before:] != event or lead is None:
            whole = ", ".join(map(str, ("...", *self.batch_shape, *event)))
            raise ValueError(f"FlowDistribution: expected a value of shape ({whole}), got {tuple(value.shape)}.")
        x = value.expand(lead + event).reshape(lead.numel(), *event)
        transform, condition = self.flow.transform, repeated(self.condition, lead)
        with buffers_stay(transform):
            z, log_det = transform.forward_and_log_det(x, condition=condition)
        return log_prob_of(self._bases, z, lead) + wide(log_det).reshape(lead)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws samples with gradients.

        Raises:
            NotImplementedError: if there are none: see :attr:`has_rsample`.
        """
        self._check_rsample("rsample")
        return self._inverted(sample_shape, grad=True)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws samples, in the sample shape before the batch shape before that of a datum."""
        return self._inverted(sample_shape, grad=False)

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draws samples with gradients, and returns their log-densities, which cost no second pass.

        Raises:
            NotImplementedError: if there are none: see :attr:`has_rsample`.
        """
        self._check_rsample("rsample_and_log_prob")
        with buffers_stay(self.flow.transform):
            return self.flow._drawn(self.condition, self._extended_shape_of(sample_shape))  # pyright: ignore[reportPrivateUsage]

    def _inverted(self, sample_shape: Any, *, grad: bool) -> Tensor:
        lead = self._extended_shape_of(sample_shape)
        z = in_a_batch(draw(self._bases, lead, grad=grad), lead)
        transform = self.flow.transform
        with buffers_stay(transform):
            x = transform.inverse(z, condition=repeated(self.condition, lead))
        self._event = _shape_of(x)
        return x.reshape(lead + x.shape[1:])

    def _extended_shape_of(self, sample_shape: Any) -> Size:
        return Size(sample_shape) + self.batch_shape

    def _check_rsample(self, method: str) -> None:
        if not self.has_rsample:
            rule = "expected a base with rsample, and no Dequantize, whose inverse rounds"
            raise NotImplementedError(f"FlowDistribution.{method}: {rule}. Call sample, or flow(samples=...).")


def _shape_of(x: Value) -> Size:
    if isinstance(x, tuple):
        fix = " Call flow(value=...) or flow(samples=...)."
        raise TypeError(f"FlowDistribution: data must be tensors, got {describe(x)}.{fix}")
    return x.shape[1:]


def _check_shape(shape: object) -> None:
    sizes = cast("Sequence[object]", shape) if isinstance(shape, (tuple, list)) else None
    if sizes is None:
        raise TypeError(f"Flow: shape must be that of a datum, a tuple, got {shape!r}.")
    if any(_check.integer("Flow", "shape", size) < 0 for size in sizes):
        raise ValueError(f"Flow: shape must have no negative size, got {shape!r}.")


@contextmanager
def _in_eval(module: nn.Module) -> Generator[None]:
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True


def _broadcast(*shapes: Size) -> Size | None:
    """The shape that all fit into, if there is one."""
    try:
        return cast("Size", torch.broadcast_shapes(*shapes))  # pyright: ignore[reportUnknownMemberType]
    except RuntimeError:
        return None
