"""Flows of vectors: NICE, and the neural spline flow of couplings."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, SigmoidTransform, TransformedDistribution, Uniform

from invertible import (
    ActNorm,
    Additive,
    Conditional,
    Coupling,
    CouplingTransform,
    Flow,
    InvertibleLinear,
    InvertibleModule,
    Merge,
    Permute,
    RationalQuadraticSpline,
    Reshape,
    Sequential,
    Split,
)
from zoo._options import check_number
from zoo.registry import register

__all__ = ["nice", "spline_flow"]


@register(kind="flow")
def nice(
    features: int = 2,
    *,
    condition_features: int = 0,
    couplings: int = 4,
    width: int = 64,
    depth: int = 2,
    base: Literal["logistic", "normal"] = "logistic",
) -> Flow:
    r"""NICE: additive couplings, and one trained scale of each feature at the end.

    .. math::
        x \mapsto e^{a} (h_n \circ \dots \circ h_1(x) - m) / s + b, \qquad h(x_1, x_2) = (x_2,\; x_1 + F(x_2)), \qquad
        \log p(x) = \sum_i \left(\log p_z(z_i) + a_i - \log s_i\right).

    All couplings keep volumes: what the flow can say of how dense data are is in the last scale and in the base.

    Source: Dinh et al., 2014, section 5.1 and Eqs. (6) to (9), https://arxiv.org/abs/1410.8516. The paper has 4
    couplings of 1000 units in 5 layers for images. The halves are the first and the last features, not the odd and the
    even ones; the scale is an :class:`~invertible.ActNorm`, which has a shift, too, and starts from the first batch.

    Args:
        features: of a vector, at least 2.
        condition_features: of a condition, which the functions see beside their half; 0 for none.
        couplings: how many; with fewer than 3, not every feature depends on every other.
        width: units of a hidden layer of the functions.
        depth: hidden layers of the functions.
        base: the distribution of each latent value.

    Shape:
        - Value: ``(batch, features)``
        - Condition: ``(batch, condition_features)``

    Raises:
        TypeError: if a number is no integer.
        ValueError: if a number is below its least, or ``base`` another word.

    Example:
        >>> flow = nice(3)
        >>> flow(value=torch.zeros(5, 3)).shape
        torch.Size([5])
        >>> flow().sample((7,)).shape
        torch.Size([7, 3])
    """
    _check("nice", features, condition_features, couplings=couplings, width=width, depth=depth)
    if base not in tuple(_BASES):
        raise ValueError(f"nice: base must be one of {', '.join(map(repr, _BASES))}, got {base!r}.")
    # A coupling swaps the streams, and with them their widths.
    first, second = (features + 1) // 2, features // 2
    layers: list[InvertibleModule[Any, Any]] = []
    for i in range(couplings):
        own, other = (first, second) if i % 2 == 0 else (second, first)
        layers.append(_coupling(own, other, condition_features, Additive(), _mlp, width, depth))
    end = first if couplings % 2 == 0 else second
    body = Sequential(_only(features), Split(channels=first), *layers, Merge(channels=end), ActNorm(features))
    return Flow(body, _BASES[base](features))


@register(kind="flow")
def spline_flow(
    features: int = 2,
    *,
    condition_features: int = 0,
    couplings: int = 6,
    width: int = 64,
    depth: int = 2,
    bins: int = 8,
    bound: float = 5.0,
    conditioner: Literal["mlp", "residual"] = "mlp",
    mixing: Literal["permutation", "linear"] = "permutation",
) -> Flow:
    r"""The neural spline flow of couplings, RQ-NSF (C): a monotonic spline of one half by a function of the other.

    .. math::
        x \mapsto h_n \circ W_n \circ \dots \circ h_1 \circ W_1 (a(x)), \qquad
        h(x_1, x_2) = (x_2,\; \mathrm{spline}(x_1; F(x_2))), \qquad z \sim \mathcal{N}(0, 1)

    with a permutation or a trained matrix :math:`W` between couplings, and an :class:`~invertible.ActNorm` :math:`a`
    at the beginning, which brings data to the interval of the splines: it starts from the first batch in training. All
    splines start as the identity.

    Source: Durkan et al., 2019, section 3, https://arxiv.org/abs/1906.04032, with its linear tails. The paper has a
    matrix before each coupling, here ``mixing="linear"``, that starts as the identity behind a permutation, and not as
    a rotation. Its couplings bend the half that F reads by splines, too, with trained numbers; that half is the next
    one's here. The residual functions are those of its code, https://github.com/bayesiains/nsf, without batch norm and
    dropout, and with the condition joined to the input. It has no ActNorm: it standardises data
    beforehand.

    Args:
        features: of a vector, at least 2.
        condition_features: of a condition, which the functions see beside their half; 0 for none.
        couplings: how many.
        width: units of a hidden layer of the functions.
        depth: hidden layers of the functions, or residual blocks of two each.
        bins: of a spline.
        bound: splines are on ``[-bound, bound]``, in standard deviations of the first batch.
        conditioner: the functions: ``"mlp"``, or ``"residual"``, which is for many features or a deep function.
        mixing: ``"permutation"``, a random one after every two couplings, which transform both halves (of two features
            none is needed); or ``"linear"``, an :class:`~invertible.InvertibleLinear` before each coupling.

    Shape:
        - Value: ``(batch, features)``
        - Condition: ``(batch, condition_features)``

    Raises:
        TypeError: if a number is no integer.
        ValueError: if a number is below its least, or ``conditioner`` or ``mixing`` another word.

    Example:
        >>> flow = spline_flow(2, condition_features=3, couplings=2)
        >>> condition = torch.randn(5, 3)
        >>> flow(condition, value=torch.randn(5, 2)).shape
        torch.Size([5])
        >>> flow(condition).sample((7,)).shape
        torch.Size([7, 5, 2])
    """
    who = "spline_flow"
    _check(who, features, condition_features, couplings=couplings, width=width, depth=depth)
    for option, value, known in (("conditioner", conditioner, _CONDITIONERS), ("mixing", mixing, _MIXINGS)):
        if value not in tuple(known):
            raise ValueError(f"{who}: {option} must be one of {', '.join(map(repr, known))}, got {value!r}.")
    first, second = (features + 1) // 2, features // 2
    layers: list[InvertibleModule[Any, Any]] = [_only(features), ActNorm(features)]
    for i in range(couplings):
        if mixing == "linear":
            layers.append(InvertibleLinear(features))
        elif features > 2 and i > 0 and i % 2 == 0:  # two couplings transform both halves
            layers.append(Permute.random(features, seed=i))
        own, other = (first, second) if i % 2 == 0 else (second, first)  # a coupling swaps them
        spline = RationalQuadraticSpline(bins=bins, bound=bound)
        coupling = _coupling(own, other, condition_features, spline, _CONDITIONERS[conditioner], width, depth)
        layers.extend((Split(channels=own), coupling, Merge(channels=other)))
    return Flow(Sequential(*layers), _normal(features))


def _only(features: int) -> InvertibleModule[Any, Any]:
    """Refuses what are no vectors of so many features, before a layer has changed its state."""
    return Reshape((features,), (features,))


def _coupling(
    own: int,
    other: int,
    conditions: int,
    transform: CouplingTransform,
    function: Callable[[int, int, int, int], nn.Module],
    width: int,
    depth: int,
) -> Coupling:
    net = function(other + conditions, own * transform.parameters_per_element, width, depth)
    return Coupling(Conditional(net) if conditions else net, transform)


def _mlp(inputs: int, outputs: int, width: int, depth: int) -> nn.Module:
    sizes = [inputs, *[width] * depth]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, _zeros(nn.Linear(width, outputs)))


class _Residual(nn.Module):
    """Two hidden layers beside the identity, which they start as."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = _zeros(nn.Linear(width, width))
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _residual(inputs: int, outputs: int, width: int, depth: int) -> nn.Module:
    blocks = (_Residual(width) for _ in range(depth))
    return nn.Sequential(nn.Linear(inputs, width), *blocks, _zeros(nn.Linear(width, outputs)))


def _zeros(layer: nn.Linear) -> nn.Linear:
    """So that the function is 0 at the start."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _normal(features: int) -> Distribution:
    mean = torch.zeros(features)
    return Independent(Normal(mean, torch.ones_like(mean), validate_args=_validated(mean)), 1)


def _logistic(features: int) -> Distribution:
    low = torch.zeros(features)
    uniform = Uniform(low, torch.ones_like(low), validate_args=_validated(low))
    return Independent(TransformedDistribution(uniform, [SigmoidTransform().inv]), 1)


def _validated(like: Tensor) -> bool | None:
    """Torch looks at what it is given, and on the device ``"meta"`` there is nothing to see."""
    return False if like.is_meta else None


_BASES: dict[str, Callable[[int], Distribution]] = {"logistic": _logistic, "normal": _normal}
_CONDITIONERS: dict[str, Callable[[int, int, int, int], nn.Module]] = {"mlp": _mlp, "residual": _residual}
_MIXINGS = ("permutation", "linear")


def _check(who: str, features: int, condition_features: int, **others: int) -> None:
    check_number(who, "features", features)
    if features < 2:
        fix = " One feature has no other half; Elementwise transforms it, by a condition or not."
        raise ValueError(f"{who}: features must be at least 2, got {features}.{fix}")
    check_number(who, "condition_features", condition_features, least=0)
    for option, value in others.items():
        check_number(who, option, value, least=1)
