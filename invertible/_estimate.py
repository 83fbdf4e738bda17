"""How far off an inverse in floating point is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from ._buffers import buffers_stay
from ._noise import estimating, shaken, shaking
from ._random import against_draws
from ._value import leaves, map_value
from .backprop._replay import Survey
from .module import Exactness

__all__ = ["ErrorEstimate", "with_error"]


@dataclass(frozen=True)
class ErrorEstimate:
    r"""How far off an inverse is: :math:`\lVert \hat x - x \rVert_2 / \lVert x \rVert_2`, the largest of the streams.

    ``"exact"``: on a grid, where it is 0; but of a latent for which something has changed nobody knows, and it is no
    number. ``"estimate"``: in floating point, where nobody knows the true input. It is
    the larger of two figures, both from runs of the network itself: how far the result moves if what the layers
    return is moved here and there in its last bit, and how far off the result's own way forth and back is.
    The second alone can be zero although the first result is off. What these runs move out of the range of a layer
    that saturates, as :class:`Sigmoid` does, is taken for the nearest value inside. Under autocast in bfloat16 the
    error is next to nothing or large, by the luck of single roundings, and so is the estimate: there it is a warning,
    not a figure.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge())
        >>> x, error = net.inverse(net(torch.rand(3, 4)), estimate=True)
        >>> error.kind, error.relative < 1e-6
        ('estimate', True)
    """

    kind: Literal["exact", "estimate"]
    relative: float


def with_error(
    net: Any, inverse: Callable[[Any], Any], y: Any, condition: Any, *, known: bool
) -> tuple[Any, ErrorEstimate]:
    """Returns ``inverse(y)`` and how far off it is; on a grid, if ``y`` is known to come back exactly."""
    if net.exactness is Exactness.EXACT:
        return inverse(y), ErrorEstimate("exact", 0.0) if known else ErrorEstimate("estimate", math.nan)
    if Survey([net]).random:
        raise ValueError(
            f"{type(net).__name__}: a network that draws random numbers has no one inverse to estimate the error of."
            + against_draws(net)
        )
    x = inverse(y)
    true = map_value(torch.Tensor.detach, x)
    with torch.no_grad(), buffers_stay(net), cast("Any", torch.random).fork_rng(), estimating():
        again = inverse(net(true, condition=condition))
        with shaking(next(leaves(true)).device):
            moved = inverse(shaken(map_value(torch.Tensor.detach, y)))
    return x, ErrorEstimate("estimate", max(_distance(again, true), _distance(moved, true)))


def _distance(found: Any, expected: Any) -> float:
    errors: list[float] = []
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        wide = torch.promote_types(b.dtype, torch.float64)
        difference = cast("Any", torch.linalg).vector_norm(a.to(wide) - b.to(wide))
        errors.append(float(difference / cast("Any", torch.linalg).vector_norm(b.to(wide))) if difference else 0.0)
    return max(errors, default=0.0)
