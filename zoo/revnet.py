"""The RevNets of Gomez et al.: stages of invertible layers, and between them units that lose information."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from invertible import Coupling, Sequential
from zoo._options import check_number
from zoo.irevnet import Bottleneck
from zoo.network import ReversibleNetwork, pooling_head
from zoo.registry import register
from zoo.resnet import Residual, Shortcut

__all__ = [
    "RevNet",
    "Stage",
    "Transition",
    "revnet38",
    "revnet56",
    "revnet104",
    "revnet110",
    "revnet164",
]

Pair = tuple[Tensor, Tensor]


class Transition(nn.Module):
    r"""The first unit of a stage that changes the shape: no map with an inverse, so that it is stored.

    With projections :math:`P_1, P_2` in the place of the identity,

    .. math::
        y_1 = P_1 x_1 + F(x_2), \qquad y_2 = P_2 x_2 + G(y_1).

    Source: RevNet (Gomez et al., 2017), section 3.1, https://arxiv.org/abs/1707.04585, and ``_bottleneck_residual`` and
    ``_residual`` in ``resnet/models/revnet_model.py`` of its code: with bottlenecks the projections are 1 by 1
    convolutions, otherwise :class:`Shortcut`.

    Args:
        in_channels: of each stream.
        out_channels: of each stream.
        stride: in pixels.
        bottleneck: whether F and G are a :class:`Bottleneck`, or a :class:`Residual`.
        first: whether F starts at its first convolution.

    Shape:
        - Input: a pair of ``(batch, in_channels, height, width)``
        - Output: a pair of ``(batch, out_channels, height / stride, width / stride)``

    Example:
        >>> x = torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
        >>> [y.shape for y in Transition(4, 16, stride=2, bottleneck=True)(x)]
        [torch.Size([2, 16, 4, 4]), torch.Size([2, 16, 4, 4])]
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, bottleneck: bool, first: bool = False
    ) -> None:
        super().__init__()
        kind = Bottleneck if bottleneck else Residual

        def shortcut() -> nn.Module:
            if bottleneck:
                return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            return Shortcut(in_channels, out_channels, stride=stride)

        self.f = kind(in_channels, out_channels, stride=stride, first=first)
        self.shortcut_1 = shortcut()
        self.g = kind(out_channels, out_channels)
        self.shortcut_2 = shortcut()

    def forward(self, x: Pair) -> Pair:
        """Maps both streams."""
        x1, x2 = x
        f = self.f(x2)
        y1 = self.shortcut_1(x1) + f
        g = self.g(y1)
        return y1, self.shortcut_2(x2) + g


class Stage(nn.Module):
    r"""The units of one resolution: perhaps a :class:`Transition`, then reversible ones.

    A reversible unit is two couplings,

    .. math::
        y_1 = x_1 + F(x_2), \qquad y_2 = x_2 + G(y_1),

    for a :class:`~invertible.Coupling` maps :math:`(x_1, x_2)` to :math:`(x_2, x_1 + F x_2)`. Both are in ``body``, a
    :class:`~invertible.Sequential`, one unit after another.

    Source: RevNet (Gomez et al., 2017), Eq. (6), https://arxiv.org/abs/1707.04585

    Args:
        in_channels: of each stream.
        out_channels: of each stream.
        units: how many, with the transition.
        stride: of the first unit, in pixels.
        bottleneck: whether F and G are a :class:`Bottleneck`, or a :class:`Residual`.
        first: whether it is the first stage, whose first F starts at a convolution.

    Shape:
        - Input: a pair of ``(batch, in_channels, height, width)``
        - Output: a pair of ``(batch, out_channels, height / stride, width / stride)``, in the dtype of the parameters

    Example:
        >>> stage = Stage(4, 4, units=3)
        >>> stage.entry, len(stage.body)
        (Identity(), 6)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        units: int,
        stride: int = 1,
        bottleneck: bool = False,
        first: bool = False,
    ) -> None:
        super().__init__()
        kind = Bottleneck if bottleneck else Residual
        keeps_shape = in_channels == out_channels and stride == 1
        self.entry = (
            nn.Identity()
            if keeps_shape
            else Transition(in_channels, out_channels, stride=stride, bottleneck=bottleneck, first=first)
        )
        couplings: list[Coupling] = []
        for i in range(units if keeps_shape else units - 1):
            starts = first and keeps_shape and i == 0
            couplings += [Coupling(kind(out_channels, out_channels, first=starts))]
            couplings += [Coupling(kind(out_channels, out_channels))]
        self.body = Sequential(*couplings)

    def forward(self, x: Pair) -> Pair:
        """Maps both streams."""
        dtype = next(self.parameters()).dtype  # autocast narrows what a transition adds up, and a grid widens
        x = self.entry(x)
        y = self.body((x[0].to(dtype), x[1].to(dtype)))
        return y[0].to(dtype), y[1].to(dtype)


class RevNet(ReversibleNetwork):
    r"""A residual network of two streams, whose units can be run backwards except where the shape changes.

    A stem, stages, and a head of batch norm, ReLU, global average and linear map. The channels after the stem are
    split into two streams, and the streams are put together before the head. In each :class:`Stage` the reversible
    units are a :class:`~invertible.Sequential`, of which ``backprop`` decides what training keeps; the stem, the
    transitions and the head are stored. So with ``Reconstruct()`` memory grows with the number of stages, and not with
    that of units. Pooling and strides lose information: the network has no inverse, its chains have.

    Source: RevNet (Gomez et al., 2017), section 3 and Table 2, https://arxiv.org/abs/1707.04585, and where the paper is
    silent its code, https://github.com/renmengye/revnet-public (5486f61).

    Deviations: batch norm has PyTorch's constants (the code: epsilon 1e-3, momentum 0.01), weights are drawn as PyTorch
    draws them (the code: normal, cut off, of variance 2 / (outputs times kernel size)), and strided kernels are padded
    on both sides by the same (TensorFlow pads more at the end). A first unit that keeps the shape, as in the small
    networks, is reversible, too: the code stores its input.

    Args:
        stem: of an image to ``(batch, stem_channels, ...)``.
        stem_channels: of both streams together, even.
        stem_stride: of the stem, in pixels.
        units: the number of units of each stage.
        channels: of both streams together at the end of each stage; of each stream a fourth is in the middle of a
            bottleneck.
        strides: of the first unit of each stage, in pixels.
        bottleneck: whether residual functions are a :class:`Bottleneck`, or a :class:`Residual`.
        num_classes: of the head; with 0 it has no classifier, and ``net(x)`` returns pooled features.
        in_channels: of the images.

    Shape:
        - Input: ``(batch, in_channels, height, width)``, floating point; height and width divisible by
          ``size_divisor``: without bottlenecks the stride of the stages, otherwise 1
        - Output: logits ``(batch, num_classes)``, or pooled features ``(batch, feature_channels)``

    Raises:
        TypeError: if the input is not a floating-point tensor, or not in the weights' dtype without autocast.
        ValueError: if the input has another shape, or leaves one value per channel in the last stage in training mode.

    Example:
        >>> net = revnet38().train()
        >>> net.backprop = Reconstruct()
        >>> net(torch.rand(2, 3, 32, 32)).sum().backward()
        >>> net.drift < 1e-4
        True
    """

    def __init__(
        self,
        stem: nn.Module,
        stem_channels: int,
        *,
        stem_stride: int,
        units: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
        bottleneck: bool,
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_number("RevNet", "num_classes", num_classes, least=0)
        check_number("RevNet", "in_channels", in_channels, least=1)
        if min(units) < 1 or max(units) < 2:
            rule = "units must be at least 1 in each stage, and 2 in one"
            raise ValueError(f"RevNet: {rule}, got {tuple(units)}.")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.total_stride = stem_stride * math.prod(strides)
        self.size_divisor = 1 if bottleneck else self.total_stride
        self.stem = stem
        self.stages = nn.ModuleList()
        width = stem_channels
        for count, out, stride in zip(units, channels, strides, strict=True):
            options = {"units": count, "stride": stride, "bottleneck": bottleneck, "first": not self.stages}
            self.stages.append(Stage(width // 2, out // 2, **options))
            width = out
        self.feature_channels = width
        self.head = pooling_head(width, num_classes)
        self._channels, self._strides = tuple(channels), tuple(strides)

    @property
    def chains(self) -> list[Sequential]:
        """The reversible units of each stage that has any."""
        return [stage.body for stage in self._stages() if len(stage.body)]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits; without a classifier, the pooled features."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Returns the last value, both streams put together: ``(batch, feature_channels, height, width)``."""
        self._check_image(x)
        self._share(x)
        x1, x2 = self.stem(x).chunk(2, dim=1)
        streams = x1, x2
        for stage in self.stages:
            streams = stage(streams)
        return torch.cat(streams, dim=1)

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.stages if isinstance(stage, Stage)]

    def _inputs(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        trained = x.requires_grad or _is_trained(self.stem)
        stride = self.total_stride // math.prod(self._strides)
        for stage, channels, own in zip(self._stages(), self._channels, self._strides, strict=True):
            trained, stride = trained or _is_trained(stage.entry), stride * own
            sizes = [-(-size // stride) for size in x.shape[2:]]  # rounded up
            like = {"dtype": next(stage.parameters()).dtype, "device": x.device}
            if isinstance(stage.entry, nn.Identity):  # parts of one tensor, the stem's
                a, b = torch.empty(len(x), channels, *sizes, **like).chunk(2, dim=1)
            else:
                a, b = (torch.empty(len(x), channels // 2, *sizes, **like) for _ in range(2))
            if len(stage.body):
                found.append((a.requires_grad_(trained), b.requires_grad_(trained)))
            trained = trained or _is_trained(stage.body)
        return found


def _is_trained(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


def _stem(in_channels: int, channels: int, *, kernel_size: int, stride: int = 1) -> nn.Sequential:
    check_number("RevNet", "in_channels", in_channels, least=1)
    convolution = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


def _imagenet(units: Sequence[int], num_classes: int, in_channels: int) -> RevNet:
    return RevNet(
        _stem(in_channels, 128, kernel_size=7, stride=2).append(nn.MaxPool2d(3, 2, padding=1)),
        128,
        stem_stride=4,
        units=units,
        channels=(512, 1024, 2048, 3328),
        strides=(1, 2, 2, 2),
        bottleneck=True,
        num_classes=num_classes,
        in_channels=in_channels,
    )


def _cifar(units: int, channels: Sequence[int], *, bottleneck: bool, num_classes: int, in_channels: int) -> RevNet:
    return RevNet(
        _stem(in_channels, 32, kernel_size=3),
        32,
        stem_stride=1,
        units=[units] * 3,
        channels=channels,
        strides=(1, 2, 2),
        bottleneck=bottleneck,
        num_classes=num_classes,
        in_channels=in_channels,
    )


@register
def revnet56(*, num_classes: int = 1000, in_channels: int = 3) -> RevNet:
    """The RevNet of the i-RevNet paper's Table 1: 9 units of two bottlenecks, 27,553,128 parameters with 1000 classes.

    A stem of 128 filters, then 2, 2, 3 and 2 units with 512, 1024, 2048 and 3328 channels over both streams. Table 1
    gives 28M. The code calls it ``revnet-54`` and has filters 128, 128, 256, 512, 832, the last four times 4. The first
    unit of each stage is a :class:`Transition`, in the first stage for its channels alone: 5 of the 9 units are
    reversible.

    Source: Table 2 of Gomez et al., 2017, https://arxiv.org/abs/1707.04585, and ``resnet/configs/imagenet_configs.py``
    of its code

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in revnet56().parameters())
        27553128
    """
    return _imagenet((2, 2, 3, 2), num_classes, in_channels)


@register
def revnet104(*, num_classes: int = 1000, in_channels: int = 3) -> RevNet:
    """The deeper RevNet for ImageNet: 2, 2, 11 and 2 units, 45,428,072 parameters with 1000 classes.

    Otherwise like :func:`revnet56`. Its code's README reports an error of 23.10 % on ImageNet.

    Source: Gomez et al., 2017, https://arxiv.org/abs/1707.04585, and ``resnet/configs/imagenet_configs.py`` of its code

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in revnet104().parameters())
        45428072
    """
    return _imagenet((2, 2, 11, 2), num_classes, in_channels)


@register
def revnet38(*, num_classes: int = 10, in_channels: int = 3) -> RevNet:
    """The smallest RevNet for CIFAR: 3, 3, 3 units of two 3 by 3 residual functions, 464,890 parameters.

    32, 64 and 112 channels over both streams. 7 of the 9 units are reversible.

    Source: Gomez et al., 2017, https://arxiv.org/abs/1707.04585, and ``resnet/configs/cifar_configs.py`` of its code

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in revnet38().parameters())
        464890
    """
    return _cifar(3, (32, 64, 112), bottleneck=False, num_classes=num_classes, in_channels=in_channels)


@register
def revnet110(*, num_classes: int = 10, in_channels: int = 3) -> RevNet:
    """A RevNet for CIFAR: 9, 9, 9 units of two 3 by 3 residual functions, 1,729,194 parameters.

    32, 64 and 128 channels over both streams. 25 of the 27 units are reversible.

    Source: as for :func:`revnet38`

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in revnet110().parameters())
        1729194
    """
    return _cifar(9, (32, 64, 128), bottleneck=False, num_classes=num_classes, in_channels=in_channels)


@register
def revnet164(*, num_classes: int = 10, in_channels: int = 3) -> RevNet:
    """A RevNet for CIFAR: 9, 9, 9 units of two bottlenecks, 1,748,778 parameters.

    128, 256 and 512 channels over both streams: 32, 64 and 128 times 4. 24 of the 27 units are reversible.

    Source: as for :func:`revnet38`

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in revnet164().parameters())
        1748778
    """
    return _cifar(9, (128, 256, 512), bottleneck=True, num_classes=num_classes, in_channels=in_channels)
