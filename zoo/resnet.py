"""The residual networks that the others are compared with."""

from collections.abc import Sequence

from torch import Tensor, nn

from zoo._options import check_number
from zoo.network import check_dtype, check_images, pooling_head
from zoo.registry import register
from zoo.state import Stateful

__all__ = ["ResNet", "Residual", "ResidualUnit", "Shortcut", "resnet50", "resnet101", "resnet_small"]


@register
def resnet50(*, num_classes: int = 1000) -> nn.Module:
    """The ResNet of the i-RevNet paper's Table 1, as torchvision has it: 25,557,032 parameters with 1000 classes.

    Its strides are in the 3 by 3 convolutions (He et al. have them in the 1 by 1 before), and it is activated after
    each sum, where the networks of this zoo are before each convolution.

    Source: He et al., 2015, https://arxiv.org/abs/1512.03385; :func:`torchvision.models.resnet50`

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in resnet50().parameters())
        25557032
    """
    return _torchvisions("resnet50", num_classes)


@register
def resnet101(*, num_classes: int = 1000) -> nn.Module:
    """The deeper ResNet, to compare with RevNet-104, as torchvision has it: 44,549,160 parameters with 1000 classes.

    Source: as for :func:`resnet50`; :func:`torchvision.models.resnet101`

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in resnet101().parameters())
        44549160
    """
    return _torchvisions("resnet101", num_classes)


def _torchvisions(name: str, num_classes: int) -> nn.Module:
    check_number(name, "num_classes", num_classes, least=0)
    from torchvision import models  # slow to import, and only these two need it

    net = getattr(models, name)(num_classes=num_classes or 1)
    net.feature_channels = net.fc.in_features
    if not num_classes:
        net.fc = nn.Identity()
    return net


class Residual(nn.Sequential):
    """The residual function of small networks: batch norm, ReLU, 3 by 3 convolution, twice, without biases.

    Source: He et al., 2016, https://arxiv.org/abs/1603.05027, as in https://github.com/renmengye/revnet-public

    Args:
        in_channels: of the input.
        out_channels: of the output, and between the two convolutions.
        stride: of the first convolution, in pixels.
        first: whether it starts at its first convolution, as at the beginning of a network.

    Shape:
        - Input: ``(batch, in_channels, height, width)``
        - Output: ``(batch, out_channels, height / stride, width / stride)``, rounded up

    Example:
        >>> from zoo import Residual  # and not the layer of that name
        >>> Residual(4, 8, stride=2)(torch.zeros(2, 4, 6, 6)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, first: bool = False) -> None:
        layers: list[nn.Module] = [] if first else [nn.BatchNorm2d(in_channels), nn.ReLU()]
        layers += [nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
        layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)]
        super().__init__(*layers)


class Shortcut(nn.Module):
    """The way past a residual function that has no parameters: averages of pixels, and channels of zeros.

    Half of the zeros come before the channels and half after them.

    Source: ``_possible_downsample`` in ``resnet/models/resnet_model.py`` of
    https://github.com/renmengye/revnet-public (5486f61)

    Args:
        in_channels: of the input.
        out_channels: of the output; as many or more, by an even number.
        stride: side of the squares that are averaged, in pixels.

    Shape:
        - Input: ``(batch, in_channels, height, width)``
        - Output: ``(batch, out_channels, height / stride, width / stride)``

    Example:
        >>> Shortcut(1, 3, stride=2)(torch.ones(1, 1, 2, 2)).flatten()
        tensor([0., 1., 0.])
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.added = (out_channels - in_channels) // 2
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Averages and pads."""
        return nn.functional.pad(self.pool(x), (0, 0, 0, 0, self.added, self.added))


class ResidualUnit(nn.Module):
    r"""A residual function and the way past it: :math:`y = P x + F(x)`.

    P is the identity, or a :class:`Shortcut` where the shape changes.

    Source: He et al., 2016, https://arxiv.org/abs/1603.05027

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: in pixels.
        first: whether F, a :class:`Residual`, starts at its first convolution.

    Shape:
        - Input: ``(batch, in_channels, height, width)``
        - Output: ``(batch, out_channels, height / stride, width / stride)``

    Example:
        >>> ResidualUnit(4, 8, stride=2)(torch.zeros(2, 4, 6, 6)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        self.function = Residual(in_channels, out_channels, stride=stride, first=first)
        self.shortcut = Shortcut(in_channels, out_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the function to what passes it."""
        return self.shortcut(x) + self.function(x)


class ResNet(Stateful):
    """A residual network for small images: activated before each convolution, shortcuts without parameters.

    Source: He et al., 2016, https://arxiv.org/abs/1603.05027, as in ``resnet/models/resnet_model.py`` of
    https://github.com/renmengye/revnet-public (5486f61): what the RevNets for CIFAR are compared with there.

    Args:
        units: the number of :class:`ResidualUnit` of each stage; every stage but the first halves height and width.
        channels: of each stage; the stem has those of the first.
        stem_stride: of the first convolution, in pixels.
        num_classes: of the head; with 0 it has no classifier, and ``net(x)`` returns pooled features.
        in_channels: of the images.

    Shape:
        - Input: ``(batch, in_channels, height, width)``, floating point; height and width divisible by ``size_divisor``
        - Output: logits ``(batch, num_classes)``, or pooled features ``(batch, feature_channels)``

    Raises:
        TypeError: if the input is not a floating-point tensor, or not in the weights' dtype without autocast.
        ValueError: if the input has another shape, or leaves one value per channel in the last stage in training mode.

    Example:
        >>> resnet_small(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        units: Sequence[int],
        channels: Sequence[int],
        *,
        stem_stride: int,
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_number("ResNet", "num_classes", num_classes, least=0)
        check_number("ResNet", "in_channels", in_channels, least=1)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.size_divisor = self.total_stride = stem_stride * 2 ** (len(units) - 1)
        width = channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.units = nn.Sequential()
        for stage, (count, out) in enumerate(zip(units, channels, strict=True)):
            for i in range(count):
                stride = 2 if stage and not i else 1
                self.units.append(ResidualUnit(width, out, stride=stride, first=not len(self.units)))
                width = out
        self.feature_channels = width
        self.head = pooling_head(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits; without a classifier, the pooled features."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Returns the last value before the head: ``(batch, feature_channels, height, width)``."""
        check_images(
            "ResNet",
            x,
            in_channels=self.in_channels,
            size_divisor=self.size_divisor,
            total_stride=self.total_stride,
            training=self.training,
        )
        check_dtype(self, x, "images")
        return self.units(self.stem(x))


@register
def resnet_small(*, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """A ResNet for images of 32 by 32 pixels, such as the embedded digits, to compare ``irevnet_small`` with.

    It is ResNet-32, 15 units of 16, 32 and 64 channels, except that the first convolution has stride 2, so that its
    maps are 16, 8 and 4 pixels wide. 464,154 parameters with 10 classes; ``irevnet_small`` has 484,738.

    Source: ``resnet-32`` in ``resnet/configs/cifar_configs.py`` of https://github.com/renmengye/revnet-public; the
    stride is ours

    Example:
        >>> sum(p.numel() for p in resnet_small(num_classes=10).parameters())
        464154
    """
    return ResNet((5, 5, 5), (16, 32, 64), stem_stride=2, num_classes=num_classes, in_channels=in_channels)
