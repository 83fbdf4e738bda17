"""The distributions that latent values of a flow have: torch's own, as modules."""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias, Union, cast

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Transform
from torch.distributions.transforms import _InverseTransform  # pyright: ignore[reportPrivateUsage]
from torch.distributions.utils import lazy_property

from ._tracing import unreadable
from ._value import Value, describe, leaves, map_value

__all__ = [
    "Base",
    "bases_of",
    "batch_of",
    "draw",
    "flat",
    "in_a_batch",
    "log_prob_of",
    "make_base",
    "repeated",
    "unvalidated",
    "wide",
]

Base = Distribution | nn.Module | tuple[Any, ...]
"""A distribution, a module that returns one for a condition, or a nested tuple of such."""

Bases: TypeAlias = Union[Distribution, tuple["Bases", ...]]  # noqa: UP007 (an alias that names itself)
"""The distributions of latent values, nested as these are."""


class _Place:
    """Stands in a distribution for a tensor that a module holds."""

    def __init__(self, key: str) -> None:
        self.key = key


class _Backwards:
    """Stands in a distribution for the inverse of a transform."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform


class FixedBase(nn.Module):
    """Holds the tensors of a distribution as buffers, so that they move with the flow and are in its state dict.

    Args:
        distribution: of torch, or made in its manner; what it holds is copied.

    Raises:
        ValueError: if a tensor of it needs gradients: it is another one after an optimiser's step.
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()

        def hold(t: Tensor, path: tuple[str, ...]) -> _Place:
            if t.requires_grad:
                rule = "a distribution whose parameters are trained must come from a module"
                fix = " Give a module whose forward(condition) builds it from its parameters."
                raise ValueError(f"Flow: {rule}, got a {type(distribution).__name__}.{fix}")
            key = "_".join(path)
            self.register_buffer(key, t.detach().clone(memory_format=torch.contiguous_format))
            return _Place(key)

        self._made = _replaced(distribution, Tensor, hold)

    def forward(self, condition: Any = None) -> Distribution:
        """Returns the distribution, on the device and in the dtype of the flow."""
        return _replaced(self._made, _Place, lambda place, _: getattr(self, place.key))

    def extra_repr(self) -> str:
        return repr(self())


class JointBase(nn.ModuleList):
    """Bases of several latent values, nested as these are."""


def make_base(base: object) -> nn.Module:
    """The module that holds a base.

    Raises:
        TypeError: if it is none of the kinds.
    """
    if isinstance(base, Distribution):
        return FixedBase(base)
    if isinstance(base, nn.Module):
        return base
    if isinstance(base, tuple) and base:
        return JointBase(make_base(part) for part in cast("tuple[object, ...]", base))
    rule = "base must be a distribution, a module that returns one, or a tuple of such"
    fix = " Make one: Normal(torch.zeros(2), torch.ones(2))." if isinstance(base, type) else ""
    got = f"the class {base.__name__}" if isinstance(base, type) else describe(cast("object", base))
    raise TypeError(f"Flow: {rule}, got {got}.{fix}")


def event_of(distribution: object, conditions: int | None) -> Distribution:
    """One whose events are all that it draws at once; with conditions, all that it draws for each.

    Args:
        distribution: what a base has returned.
        conditions: how many there are.

    Raises:
        TypeError: if it is no distribution.
        ValueError: if it is not one for each condition.
    """
    if not isinstance(distribution, Distribution):
        raise TypeError(f"Flow: base must return a distribution, got {describe(distribution)}.")
    kept = 0
    if conditions is not None:
        kept = 1
        if distribution.batch_shape[:1] != (conditions,):
            shape = tuple(distribution.batch_shape)
            rule = f"base must return a distribution of batch shape ({conditions}, ...) for as many conditions"
            raise ValueError(f"Flow: {rule}, got one of batch shape {shape}.")
    extra = len(distribution.batch_shape) - kept
    return Independent(distribution, extra, validate_args=False) if extra else distribution


def bases_of(base: nn.Module, condition: Value | None) -> Bases:
    if isinstance(base, JointBase):
        return tuple(bases_of(part, condition) for part in base)
    if isinstance(base, FixedBase):
        found = event_of(base(), None)
    else:
        found = event_of(base(condition), batch_of(condition).numel() if condition is not None else None)
    return found


def flat(bases: Bases) -> list[Distribution]:
    return [each for part in bases for each in flat(part)] if isinstance(bases, tuple) else [bases]


def batch_of(condition: Value | None) -> Size:
    """How many conditions there are, as a shape; of none it is empty.

    Raises:
        TypeError: if it is no tensor with a batch, nor a tuple of such.
        ValueError: if it is a tuple of different batches.
    """
    if condition is None:
        return Size()
    parts = cast("list[object]", list(leaves(condition)))
    if not parts or not all(isinstance(part, Tensor) and part.ndim for part in parts):
        rule = "condition must be a tensor of shape (batch, ...), or a tuple of such"
        raise TypeError(f"Flow: {rule}, got {describe(condition)}.")
    first, *others = (cast("Tensor", part).shape[:1] for part in parts)
    if any(other != first for other in others):
        raise ValueError(f"Flow: all tensors of a condition must have the same batch, got {describe(condition)}.")
    return first


def repeated(condition: Value | None, lead: Size) -> Value | None:
    """The conditions once for each sample, in a batch; a single one may stand for many."""
    if condition is None:
        return None
    return map_value(lambda c: c.expand(lead + c.shape[1:]).reshape(lead.numel(), *c.shape[1:]), condition)


def draw(bases: Bases, lead: Size, *, grad: bool = True) -> Value:
    """Latent values in a batch shape, with gradients where a base has them."""
    if isinstance(bases, tuple):
        return tuple(draw(each, lead, grad=grad) for each in bases)
    shape = lead[: len(lead) - len(bases.batch_shape)]
    return bases.rsample(shape) if grad and bases.has_rsample else bases.sample(shape)


def in_a_batch(z: Value, lead: Size) -> Value:
    return map_value(lambda t: t.reshape(lead.numel(), *t.shape[len(lead) :]), z)


def log_prob_of(bases: Bases, z: object, lead: Size) -> Tensor:
    """The sum over latent values that are in a batch, in the batch shape.

    Raises:
        TypeError: if they are not nested as the bases are.
        ValueError: if one has another shape than its base.
    """
    if isinstance(bases, tuple):
        if not isinstance(z, tuple) or len(bases) != len(cast("tuple[object, ...]", z)):
            rule, got = "a tuple of bases is for tuples of as many latent values", describe(cast("object", z))
            raise TypeError(f"Flow: {rule}, got {got} for {len(bases)} bases.")
        parts = [log_prob_of(base, part, lead) for base, part in zip(bases, cast("tuple[object, ...]", z), strict=True)]
        return torch.stack(parts).sum(0)
    if not isinstance(z, Tensor):
        rule = "a tuple of bases is for tuples of latent values, and one base for tensors"
        raise TypeError(f"Flow: {rule}, got {describe(z)} for one base.")
    event = z.shape[1:]
    if event != bases.event_shape:
        rule = f"base must have the shape {tuple(event)} of a latent value"
        raise ValueError(f"Flow: {rule}, got {tuple(bases.event_shape)}.")
    if not lead.numel():  # which torch cannot sum
        return wide(z).reshape(*lead, event.numel()).sum(-1)
    base = unvalidated(bases) if unreadable(z) else bases
    return base.log_prob(wide(z).reshape(lead + event))


def wide(t: Tensor) -> Tensor:
    """In float32 at least: sums over many dimensions lose too much in less."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def unvalidated(distribution: Any) -> Any:
    """The same without torch's look at what it is given, which may have no data."""
    if not isinstance(distribution, Distribution):
        return distribution
    other = copy.copy(distribution)
    for key, part in vars(distribution).items():
        setattr(other, key, unvalidated(part))
    setattr(other, "_validate_args", False)  # noqa: B010 (torch has no public name for it)
    return other


def _was_found(part: object, key: str) -> bool:
    """Whether a distribution has not been given this, but has computed and kept it since, and will again."""
    if not isinstance(getattr(type(part), key, None), lazy_property):
        return False
    held = vars(part)
    given = held.get("_param")  # probabilities or logits, whichever were given
    return key.startswith("_") or (given is not None and held[key] is not given)


def _replaced(
    part: Any, kind: type, function: Callable[[Any, tuple[str, ...]], Any], path: tuple[str, ...] = ()
) -> Any:
    """A copy of a distribution in which what is of a kind is another thing, however deep in it."""
    if isinstance(part, kind):
        return function(part, path)
    if isinstance(part, (list, tuple)) and not isinstance(part, Size):
        parts = cast("list[Any]", part)
        return type(parts)(_replaced(each, kind, function, (*path, str(i))) for i, each in enumerate(parts))
    if isinstance(part, _InverseTransform):  # a copy of one loses what it inverts
        return _Backwards(_replaced(part.inv, kind, function, path))
    if isinstance(part, _Backwards):
        return _replaced(part.transform, kind, function, path).inv
    if isinstance(part, (Distribution, Transform)):
        other = copy.copy(part)
        for key, each in vars(part).items():
            if kind is Tensor and _was_found(part, key):
                del other.__dict__[key]
            elif key != "_inv":  # what a transform remembers as its inverse
                other.__dict__[key] = _replaced(each, kind, function, (*path, key.strip("_")))
        return other
    return part
