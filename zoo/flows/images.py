"""Densities of images: RealNVP and Glow, of several scales, assembled from invertible layers."""

from typing import Any

import torch
from torch import Tensor, nn

from invertible import (
    ActNorm,
    Affine,
    Conditional,
    ConstantAffine,
    Coupling,
    Dequantize,
    Elementwise,
    Flow,
    Identity,
    Inverse,
    InvertibleLinear,
    InvertibleModule,
    Merge,
    Parallel,
    PixelUnshuffle,
    Reshape,
    Sequential,
    Sigmoid,
    Split,
    Swap,
)
from zoo._options import check_number
from zoo.registry import register

__all__ = ["glow", "realnvp"]

Layer = InvertibleModule[Any, Any]

_CLASS = 16  # channels that a class is to the function of a coupling


@register(kind="flow")
def glow(
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    levels: int = 3,
    steps: int = 32,
    width: int = 512,
    values: int = 256,
    num_classes: int | None = None,
) -> Flow:
    r"""Glow: a flow of images on several scales, each a chain of steps that mix the channels by trained matrices.

    Images are whole numbers x, as floating-point ones. With noise u, the centring, and :math:`f_1` for the scales,

    .. math::
        z = f_1\bigl((x + u) / \text{values} - \tfrac12\bigr), \qquad
        f_l = \mathrm{leave}_l \circ \mathrm{step}^{K} \circ \mathrm{PixelUnshuffle}(2), \qquad
        \mathrm{leave}_l (a, b) = \bigl(f_{l+1}(b), \; T(a; F b)\bigr).

    A step is :class:`~invertible.ActNorm`, :class:`~invertible.InvertibleLinear` and an affine
    :class:`~invertible.Coupling` of the halves of the channels; its function is a 3×3, a 1×1 and a 3×3 convolution, the
    last of which begins as zeros. Half of the channels leaves each level but the last, scaled and shifted by a function
    of the half that stays: so their distribution is learnt, given what stays. What leaves the last level is scaled and
    shifted by trained numbers of its channel, or of the class. The base is standard normal. So latent values of
    three levels are nested tuples, ``((z3, z2), z1)``.

    With ``num_classes`` the flow is that of images of a class, and all functions see the class:
    ``flow(labels, value=x)``, ``flow(labels).sample()``, with ``labels`` of shape ``(batch,)``.

    ``flow.transform.backprop = Reconstruct()`` trains it without stored activations.

    Deviations from the paper and its code: the coupling transforms the first half and swaps the two; its scale is
    :math:`\tfrac12 + \tfrac12 \sigma(a + 2)` in place of :math:`\sigma(a + 2)`, whose inverse is lost in single
    precision in deep chains (see :class:`~invertible.Affine`), and shifts come after scales; matrices are PLU from the
    start; convolutions begin as torch's do, which the :class:`~invertible.ActNorm` behind them levels out, and are
    padded with zeros, without the code's channel that marks the border; the prior of the last level's channels takes
    its first mean and deviation from the first batch; classes enter every function by an
    embedding, where the code has them in the last level's prior, and there is no loss of a classifier.

    Source: Kingma and Dhariwal, 2018, section 3 and Table 4, https://arxiv.org/abs/1807.03039;
    https://github.com/openai/glow. The defaults are theirs for CIFAR-10.

    Args:
        shape: of an image: channels, height and width, which 2^levels must divide.
        levels: the number of scales.
        steps: of each level.
        width: channels inside of the functions.
        values: how many a pixel's channel may have: images hold the whole numbers ``0 ... values - 1``.
        num_classes: ``None`` for images of any class.

    Shape:
        - Input: ``(batch, *shape)``, floating point, whole numbers
        - Output: latent values, a nested tuple of tensors, as many as levels

    Raises:
        TypeError: if an option is no integer, or the shape not of three of them.
        ValueError: if an option is out of range, or height or width are not divisible by 2 for each level.

    Example:
        >>> flow = glow(shape=(1, 8, 8), levels=2, steps=2, width=8, values=17)
        >>> digits = torch.randint(17, (4, 1, 8, 8)).float()
        >>> flow(value=digits).shape
        torch.Size([4])
        >>> [tuple(part.shape) for part in flow.transform(digits)]
        [(4, 8, 2, 2), (4, 2, 4, 4)]
    """
    _check("glow", shape, levels, steps, width, values, num_classes)
    channels = shape[0]
    net = Sequential(
        Reshape(shape, shape),  # refuses images of another shape before a layer has changed its state
        Dequantize(values),
        ConstantAffine(shift=-0.5),
        *_glow_level(4 * channels, levels, steps, width, num_classes),
    )
    return _flow(net, shape, num_classes)


def _glow_level(channels: int, levels: int, steps: int, width: int, num_classes: int | None) -> list[Layer]:
    """The layers of a level and of those below, for so many channels after its unshuffling."""
    half = channels // 2
    layers: list[Layer] = [PixelUnshuffle(2)]
    for _ in range(steps):
        coupling = Coupling(_glow_function(half, width, num_classes), Affine())
        layers += [ActNorm(channels), InvertibleLinear(channels), Split(), coupling, Merge()]
    if levels == 1:
        layers.append(ActNorm(channels))
        if num_classes is not None:
            of_class = nn.Embedding(num_classes, 2 * channels)
            nn.init.zeros_(of_class.weight)
            layers.append(Elementwise(Affine(scale="exp-clamped"), function=of_class))
        return layers
    prior = Coupling(_function(_Zeros(half + _extra(num_classes), 2 * half), num_classes), Affine(scale="exp-clamped"))
    below = Sequential(*_glow_level(4 * half, levels - 1, steps, width, num_classes))
    return [*layers, Split(), prior, Parallel(below, Identity())]


class _Zeros(nn.Conv2d):
    """A 3×3 convolution that begins as zeros, with trained scales of its channels, which quicken it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.log_scale = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (3 * self.log_scale).exp()


def _glow_function(half: int, width: int, num_classes: int | None) -> nn.Module:
    first = nn.Conv2d(half + _extra(num_classes), width, 3, padding=1, bias=False)
    second = nn.Conv2d(width, width, 1, bias=False)
    layers = (first, ActNorm(width), nn.ReLU(), second, ActNorm(width), nn.ReLU(), _Zeros(width, 2 * half))
    return _function(nn.Sequential(*layers), num_classes)


@register(kind="flow")
def realnvp(
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    levels: int = 2,
    blocks: int = 8,
    width: int = 64,
    values: int = 256,
    num_classes: int | None = None,
) -> Flow:
    r"""RealNVP: a flow of images on several scales, by couplings of the colours of a checkerboard and of channels.

    Images are whole numbers x, as floating-point ones. With noise u and :math:`f_1` for the scales,

    .. math::
        z = f_1\bigl(\operatorname{logit}(0.05 + 0.9\, (x + u) / \text{values})\bigr), \qquad
        f_l(x) = \bigl(f_{l+1}(a), \; b\bigr), \quad (a, b) = (\text{channels} \circ \text{checkerboard})(x).

    Each level but the last has three affine couplings of the two colours of a checkerboard, then three of the upper and
    lower rows of 2×2 blocks, one after the other transformed by the other; then one colour of the pixels leaves. The
    last has four of the checkerboard. Between couplings is an :class:`~invertible.ActNorm`. The function of
    a coupling is a residual network of ``blocks`` blocks, with twice the channels wherever height and width are halved.
    The base is standard normal. Latent values of three levels are nested tuples, ``((z3, z2), z1)``.

    With ``num_classes`` all functions see the class: ``flow(labels, value=x)``, ``flow(labels).sample()``.

    ``flow.transform.backprop = Reconstruct()`` trains it without stored activations.

    Deviations from the paper and its code: functions see the pixels of one colour side by side, as channels of half the
    resolution, where the paper has the masked image at full resolution; batch norm between couplings is
    :class:`~invertible.ActNorm`, and inside of functions layer norm over channels and space, so that a density does
    not depend on the other images of a batch, and convolutions have no weight norm; there are no skip connections from
    all blocks to the end; the scale is clamped by :math:`2 \tanh(a / 2)` in place of a tanh with a trained factor; the
    last convolution begins as zeros; no penalty is on scales.

    Source: Dinh et al., 2017, section 3, Figures 3 and 4, https://arxiv.org/abs/1605.08803. The defaults are section
    4.1's for CIFAR-10.

    Args:
        shape: of an image: channels, height and width, which 2^levels must divide.
        levels: the number of scales.
        blocks: of two convolutions, in each function.
        width: channels inside of the functions of the first level.
        values: how many a pixel's channel may have: images hold the whole numbers ``0 ... values - 1``.
        num_classes: ``None`` for images of any class.

    Shape:
        - Input: ``(batch, *shape)``, floating point, whole numbers
        - Output: latent values, a nested tuple of tensors, as many as levels

    Raises:
        TypeError: if an option is no integer, or the shape not of three of them.
        ValueError: if an option is out of range, or height or width are not divisible by 2 for each level.

    Example:
        >>> flow = realnvp(shape=(1, 8, 8), levels=2, blocks=1, width=8, values=17)
        >>> digits = torch.randint(17, (4, 1, 8, 8)).float()
        >>> flow(value=digits).shape
        torch.Size([4])
        >>> [tuple(part.shape) for part in flow.transform(digits)]
        [(4, 2, 4, 4), (4, 2, 4, 4)]
    """
    _check("realnvp", shape, levels, blocks, width, values, num_classes)
    net = Sequential(
        Reshape(shape, shape),  # refuses images of another shape before a layer has changed its state
        Dequantize(values),
        ConstantAffine(scale=0.9, shift=0.05),
        Inverse(Sigmoid()),
        *_realnvp_level(shape[0], levels, blocks, width, num_classes),
    )
    return _flow(net, shape, num_classes)


def _realnvp_level(channels: int, levels: int, blocks: int, width: int, num_classes: int | None) -> list[Layer]:
    """The layers of a level and of those below, for so many channels."""
    options = (2 * channels, blocks, width, num_classes)
    colours = PixelUnshuffle(2, order="checkerboard")
    if levels == 1:
        return [colours, *_couplings(4, *options), Inverse(PixelUnshuffle(2, order="checkerboard"))]
    rows = PixelUnshuffle(2, order="pixel_major")
    below = Sequential(*_realnvp_level(2 * channels, levels - 1, blocks, 2 * width, num_classes))
    return [
        colours,
        *_couplings(3, *options),
        Inverse(PixelUnshuffle(2, order="checkerboard")),
        rows,
        *_couplings(3, 2 * channels, blocks, 2 * width, num_classes),
        Inverse(PixelUnshuffle(2, order="pixel_major")),
        PixelUnshuffle(2, order="checkerboard"),
        Split(),
        Parallel(below, Identity()),
    ]


def _couplings(count: int, channels: int, blocks: int, width: int, num_classes: int | None) -> list[Layer]:
    """Couplings of two halves of so many channels, one after the other; the halves end where they were."""
    layers: list[Layer] = [Split()]
    for _ in range(count):
        function = _residual_network(channels, blocks, width, num_classes)
        layers += [Coupling(function, Affine(scale="exp-clamped")), Parallel(Identity(), ActNorm(channels))]
    return [*layers, *([Swap()] if count % 2 else []), Merge()]


def _residual_network(channels: int, blocks: int, width: int, num_classes: int | None) -> nn.Module:
    first = nn.Conv2d(channels + _extra(num_classes), width, 3, padding=1)
    last = nn.Sequential(nn.GroupNorm(1, width), nn.ReLU(), _Zeros(width, 2 * channels))
    return _function(nn.Sequential(first, *(_Block(width) for _ in range(blocks)), last), num_classes)


class _Block(nn.Module):
    """Adds what two convolutions make of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(1, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _extra(num_classes: int | None) -> int:
    """Channels that a function sees beside those of its stream."""
    return 0 if num_classes is None else _CLASS


def _function(net: nn.Module, num_classes: int | None) -> nn.Module:
    """The function of a coupling, which sees the class if there are some."""
    return net if num_classes is None else Conditional(net, encoder=nn.Embedding(num_classes, _CLASS))


def _flow(net: Sequential, shape: tuple[int, int, int], num_classes: int | None) -> Flow:
    labels = None if num_classes is None else torch.zeros(0, dtype=torch.long)
    return Flow.standard_normal(net, shape, condition=labels)


def _check(who: str, shape: Any, levels: int, depth: int, width: int, values: int, num_classes: int | None) -> None:
    rule = "shape must be channels, height and width, each at least 1"
    if not isinstance(shape, (tuple, list)) or not all(type(size) is int for size in shape):
        raise TypeError(f"{who}: {rule}, got {shape!r}.")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{who}: {rule}, got {tuple(shape)}.")
    names = ("levels", "steps" if who == "glow" else "blocks", "width")
    for name, value in zip(names, (levels, depth, width), strict=True):
        check_number(who, name, value, least=1)
    check_number(who, "values", values, least=2)
    if num_classes is not None:
        check_number(who, "num_classes", num_classes, least=1)
    if levels > 63 or any(size % 2**levels for size in shape[1:]):
        divisor = f"2^levels, {2**levels}" if levels < 64 else "2^levels"
        raise ValueError(f"{who}: height and width must be divisible by {divisor}, got shape={tuple(shape)}.")
