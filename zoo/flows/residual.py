"""Flows of residual blocks, whose functions see all features."""

from itertools import pairwise
from typing import Any, Literal, cast

from torch import nn

from invertible import ActNorm, Flow, InvertibleModule, Residual, Sequential
from zoo._options import check_number
from zoo.registry import register

__all__ = ["iresnet"]


_SHARPNESS = 20.0  # of the activation: it bends within a twentieth of the unit


@register(kind="flow")
def iresnet(
    features: int = 2,
    *,
    blocks: int = 20,
    width: int = 16,
    depth: int = 2,
    lipschitz: float = 0.97,
    log_det: Literal["exact", "series", "roulette"] = "roulette",
) -> Flow:
    r"""An i-ResNet as a density of vectors: residual blocks that can be inverted.

    .. math::
        x \mapsto a_n \circ (1 + F_n) \circ \dots \circ a_1 \circ (1 + F_1) (a_0(x)), \qquad
        \mathrm{Lip}(F_i) \le \text{lipschitz}, \qquad z \sim \mathcal{N}(0, 1)

    with an :class:`~invertible.ActNorm` :math:`a` before, between and after the blocks. Unlike a coupling, a function
    changes all features at once and sees all of them. The price is an inverse by iteration, and a log-determinant that
    is estimated, but for ``"exact"``: see :class:`invertible.Residual`.

    Source: i-ResNet (Behrmann et al., 2019), https://arxiv.org/abs/1811.00995, and for the unbiased estimate
    (``"roulette"``) and activations that have a second derivative residual flows (Chen et al., 2019),
    https://arxiv.org/abs/1906.02735. There the weights are normalised by estimates of their norms, here by bounds.
    Theirs is the activation LipSwish, with a trained sharpness; here it is a softplus, sharp from the start, because
    weights that are bounded keep its input small, where a smooth function is nearly linear and cannot bend data; and
    weights start orthogonal, as large as they may be. Splitting images by scale is not in it.

    Args:
        features: of a vector.
        blocks: how many.
        width: units of a hidden layer of the functions.
        depth: hidden layers of the functions.
        lipschitz: of each function, between 0 and 1: nearer to 1 a block does more, and its inverse takes longer.
        log_det: how it is computed: ``"exact"`` is for few features; ``"series"`` is cut off and biased; ``"roulette"``
            is right on the average, and each likelihood random.

    Shape:
        - Value: ``(batch, features)``

    Raises:
        TypeError: if a number is none, or none of its kind.
        ValueError: if a number is below 1, or :class:`~invertible.Residual` refuses an option.

    Example:
        >>> flow = iresnet(3, blocks=2, log_det="exact")
        >>> flow(value=torch.zeros(5, 3)).shape
        torch.Size([5])
        >>> flow().sample((7,)).shape
        torch.Size([7, 3])
    """
    numbers = {"features": features, "blocks": blocks, "width": width, "depth": depth}
    for option, number in numbers.items():
        check_number("iresnet", option, number, least=1)
    if cast("object", lipschitz) is None:  # a promise of the caller's, for which these functions are not made
        raise TypeError("iresnet: lipschitz must be a number, got None.")
    layers: list[InvertibleModule[Any, Any]] = [ActNorm(features)]
    for _ in range(blocks):
        sizes = (features, *[width] * depth)
        hidden = [layer for a, b in pairwise(sizes) for layer in (_linear(a, b), nn.Softplus(_SHARPNESS))]
        function = nn.Sequential(*hidden, _linear(width, features))
        layers += [Residual(function, lipschitz=lipschitz, log_det=log_det), ActNorm(features)]
    return Flow.standard_normal(Sequential(*layers), (features,))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight)
    return layer
