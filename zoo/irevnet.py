"""The i-RevNets of Jacobsen et al., assembled from invertible layers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from invertible import Coupling, InvertibleModule, Merge, PadSplit, PixelUnshuffle, Sequential, Split
from zoo._dimensions import BATCH_NORM, CONVOLUTION, check_dimensions
from zoo._options import check_blocks, check_number
from zoo.network import InvertibleNetwork, pooling_head
from zoo.registry import register

__all__ = ["Bottleneck", "IRevNet", "irevnet_a", "irevnet_b", "irevnet_cifar", "irevnet_small"]


class Bottleneck(nn.Sequential):
    """The function F of a block: batch norm, ReLU, convolution, three times, without biases.

    Source: i-RevNet, section 3.2, https://arxiv.org/abs/1802.07088. The middle layer has a quarter of the output's
    channels; a downsampling block's first convolution has stride 2. Batch norm has PyTorch's defaults.

    Args:
        in_channels: of the stream that F reads.
        out_channels: of the stream that F adds to.
        stride: of the first convolution, in pixels.
        first: whether this is the first block of a network, which starts at its first convolution.
        kernel_sizes: of the three convolutions, in pixels, odd.
        dropout: the probability with which values are dropped before the last batch norm, in training mode, as in the
            released code. It changes no key: the layer has a name, the others their numbers.
        dimensions: the number of spatial ones, 1, 2 or 3.

    Shape:
        - Input: ``(batch, in_channels, height, width)``, or as many sizes as there are dimensions
        - Output: ``(batch, out_channels, height / stride, width / stride)``

    Example:
        >>> Bottleneck(6, 24, stride=2)(torch.zeros(1, 6, 8, 8)).shape
        torch.Size([1, 24, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        first: bool = False,
        kernel_sizes: tuple[int, int, int] = (1, 3, 1),
        dropout: float = 0.0,
        dimensions: int = 2,
    ) -> None:
        check_dimensions("Bottleneck", dimensions)
        norm, convolution = BATCH_NORM[dimensions], CONVOLUTION[dimensions]
        middle = out_channels // 4
        widths = (in_channels, middle, middle, out_channels)
        layers: list[nn.Module] = []
        for i, size in enumerate(kernel_sizes):
            if i or not first:
                layers += [norm(widths[i]), nn.ReLU()]
            step = 1 if i else stride
            layers += [convolution(widths[i], widths[i + 1], size, step, padding=size // 2, bias=False)]
        super().__init__()
        for i, layer in enumerate(layers):
            if dropout and i == len(layers) - 3:
                self.add_module("dropout", nn.Dropout(dropout))
            self.add_module(str(i), layer)


class IRevNet(InvertibleNetwork):
    r"""An invertible body and a linear classifier on top of its features.

    The body is a :class:`~invertible.Sequential` of a splitting operator, the blocks, and a
    :class:`~invertible.Merge`. Each block is a :class:`~invertible.Coupling` with a :class:`Bottleneck`; at the first
    block of a stage with stride 2 it downsamples by ``PixelUnshuffle(2, order="pixel_major")``.

    Two deviations from the paper's text, both with the released code: the head is batch norm, ReLU, global average,
    linear (section 3.1 prints average, ReLU, linear); and S acts on both streams (Eq. (1) prints :math:`x_j` without
    S).

    Source: i-RevNet (Jacobsen et al., 2018), section 3, https://arxiv.org/abs/1802.07088

    Args:
        split: the splitting operator, of an image to a pair of streams.
        split_channels: channels of both streams together after ``split``.
        blocks: the number of blocks of each stage.
        channels: the channels of a stream, for each stage.
        strides: 1 or 2 for each stage; with 2 its first block downsamples.
        num_classes: of the head; with 0 it has no classifier, and ``net(x)`` returns the pooled features that one would
            see, ``(batch, feature_channels)``.
        in_channels: of the images.
        kernel_sizes: of the three convolutions of a block; the released code has ``(3, 3, 3)``.
        dropout: the probability of dropout in the blocks. In training mode the network has no inverse then.
        dimensions: the number of spatial ones: 1 for signals, 2 for images, 3 for volumes.
        size_divisor: what height and width must be divisible by, in pixels.

    Shape:
        - Input: ``(batch, in_channels, height, width)``, floating point; ``(batch, in_channels, length)`` in one
          dimension, ``(batch, in_channels, depth, height, width)`` in three
        - Output: logits ``(batch, num_classes)``, or pooled features ``(batch, feature_channels)``

    Raises:
        TypeError: if the input is not a floating-point tensor, or not in the weights' dtype, where neither a grid nor
            autocast converts it.
        ValueError: if the input has another shape, is one image of ``size_divisor`` pixels in training mode, or
            ``inverse`` is given logits or pooled features; if an option is out of range.

    The network's ``backprop`` decides what training keeps: ``net.backprop = Reconstruct()`` makes memory independent
    of the depth of the body. Its ``grid`` decides how values are rounded: with ``net.grid = "exact"`` the image comes
    back bit for bit.

    Example:
        >>> net = irevnet_small(num_classes=10).eval()
        >>> image = torch.rand(2, 3, 32, 32)
        >>> net(image).shape
        torch.Size([2, 10])
        >>> torch.allclose(net.inverse(net.features(image)), image, atol=1e-5)
        True
    """

    def __init__(
        self,
        split: Sequence[InvertibleModule],
        split_channels: int,
        *,
        blocks: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        kernel_sizes: tuple[int, int, int] = (1, 3, 1),
        dropout: float = 0.0,
        dimensions: int = 2,
        size_divisor: int,
    ) -> None:
        super().__init__()
        check_dimensions("IRevNet", dimensions)
        check_number("IRevNet", "num_classes", num_classes, least=0)
        check_number("IRevNet", "in_channels", in_channels, least=1)
        check_blocks("IRevNet", blocks)
        _check_kernel_sizes(kernel_sizes)
        if not 0 <= dropout < 1:
            raise ValueError(f"IRevNet: dropout must be at least 0 and less than 1, got {dropout}.")
        self.num_classes, self.in_channels, self.dimensions = num_classes, in_channels, dimensions
        self.size_divisor = self.total_stride = size_divisor
        layers: list[InvertibleModule] = list(split)
        width = split_channels // 2
        for count, out, stage_stride in zip(blocks, channels, strides, strict=True):
            for i in range(count):
                stride = 1 if i else stage_stride
                first = len(layers) == len(split)
                options = {"stride": stride, "first": first, "kernel_sizes": kernel_sizes}
                options |= {"dropout": dropout, "dimensions": dimensions}
                function = Bottleneck(width, out, **options)
                downsample = PixelUnshuffle(2, order="pixel_major") if stride == 2 else None
                layers.append(Coupling(function, downsample=downsample))
                width = out
        self.body = Sequential(*layers, Merge())
        self.feature_channels = 2 * width
        self.head = pooling_head(self.feature_channels, num_classes, dimensions)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits; without a classifier, the pooled features."""
        features = self.features(x)
        return self.head(features if self.grid is None else features.to(self._dtype()))

    def _check_features(self, features: Tensor) -> None:
        if isinstance(features, Tensor) and features.ndim == 2:  # pyright: ignore[reportUnnecessaryIsInstance]
            shape = tuple(features.shape)
            if shape[1] == (self.num_classes or self.feature_channels):
                what = "logits" if self.num_classes else "pooled features"
                raise ValueError(
                    f"IRevNet: {what} have no inverse, got a tensor of shape {shape}. "
                    "The image comes back from net.features(x)."
                )
        super()._check_features(features)


def _check_kernel_sizes(sizes: Any) -> None:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"IRevNet: kernel_sizes must be three odd numbers, got {sizes!r}.")
    for size in sizes:
        check_number("IRevNet", "kernel_sizes", size)
    if len(sizes) != 3 or any(size % 2 == 0 or size < 1 for size in sizes):
        raise ValueError(f"IRevNet: kernel_sizes must be three odd numbers, got {tuple(sizes)}.")


def _stream_channels(stages: int, dimensions: int, in_channels: int) -> tuple[int, ...]:
    """The channels of a stream in a bijective network that downsamples before its first stage and in each.

    They are no choice: a stream holds half of what the image does, and each step takes 2^dimensions pixels to one.
    """
    check_number("IRevNet", "in_channels", in_channels, least=1)
    block = 2**dimensions
    return tuple(in_channels * block ** (stage + 2) // 2 for stage in range(stages))


@register
def irevnet_b(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    kernel_sizes: tuple[int, int, int] = (1, 3, 1),
    dimensions: int = 2,
) -> IRevNet:
    """The bijective i-RevNet (b): 100 blocks, 29,201,092 parameters with 1000 classes.

    ``kernel_sizes=(3, 3, 3)`` gives the authors' released network, of 125,120,356 parameters. Widths are in proportion
    to ``in_channels``, for a bijective network has no other choice: its streams hold what the image does.

    ``dimensions=1`` is the network for signals and ``dimensions=3`` that for volumes, which are not in the paper. The
    image decides the width: a stream has 6, 12, 24, 48 channels in one dimension, and 96, 768, 6144, 49152 in three,
    which is 37,238,911,816 parameters; for volumes take :func:`irevnet_small`, with two stages.

    Source: section 3.2 and Table 1 (29M), https://arxiv.org/abs/1802.07088

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in irevnet_b().parameters())
        29201092
    """
    return IRevNet(
        [PixelUnshuffle(2, order="pixel_major"), Split()],
        in_channels * 2**dimensions,
        blocks=(6, 16, 72, 6),
        channels=_stream_channels(4, dimensions, in_channels),
        strides=(2, 2, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        kernel_sizes=kernel_sizes,
        dimensions=dimensions,
        size_divisor=32,
    )


@register
def irevnet_a(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    split_channels: int = 192,
    kernel_sizes: tuple[int, int, int] = (1, 3, 1),
) -> IRevNet:
    """The injective i-RevNet (a): 18 blocks, 180,999,016 parameters with 1000 classes.

    Table 1 gives 181M, which this reading meets with the block of (b): the splitting operator pads 48 channels to 192,
    and the streams have 96, 384, 1536 and 6144. The text of section 3.2 pads to 96 and prints 48, 192, 768 and 3072;
    ``split_channels=96`` is that network, of 48,352,360 parameters (199,033,960 with ``kernel_sizes=(3, 3, 3)``).
    Widths depend on ``split_channels`` alone, which is at least 16 times ``in_channels``.

    Source: section 3.2 and Table 1, https://arxiv.org/abs/1802.07088

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in irevnet_a().parameters())
        180999016
    """
    width = split_channels // 2
    return IRevNet(
        [PixelUnshuffle(4, order="pixel_major"), PadSplit(16 * in_channels, split_channels)],
        split_channels,
        blocks=(4, 4, 6, 4),
        channels=(width, 4 * width, 16 * width, 64 * width),
        strides=(1, 2, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        kernel_sizes=kernel_sizes,
        size_divisor=32,
    )


@register
def irevnet_small(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    blocks: tuple[int, ...] = (3, 3, 3),
    kernel_sizes: tuple[int, int, int] = (1, 3, 1),
    dimensions: int = 2,
) -> IRevNet:
    """A bijective i-RevNet for images of 32 by 32 pixels, such as the embedded digits: our own, not the paper's.

    ``dimensions=1`` is one for signals, ``dimensions=3`` one for volumes. There is a stage for each number in
    ``blocks``, and each multiplies a stream's channels by 2^dimensions: two are enough for volumes.

    Example:
        >>> irevnet_small(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_blocks("IRevNet", blocks)
    return IRevNet(
        [PixelUnshuffle(2, order="pixel_major"), Split()],
        in_channels * 2**dimensions,
        blocks=blocks,
        channels=_stream_channels(len(blocks), dimensions, in_channels),
        strides=(2,) * len(blocks),
        num_classes=num_classes,
        in_channels=in_channels,
        kernel_sizes=kernel_sizes,
        dimensions=dimensions,
        size_divisor=2 ** (len(blocks) + 1),
    )


@register
def irevnet_cifar(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    kernel_sizes: tuple[int, int, int] = (3, 3, 3),
    dropout: float = 0.1,
) -> IRevNet:
    """The injective i-RevNet of the released code for CIFAR: 54 blocks, 6,274,826 parameters with 10 classes.

    Streams of 16, 64 and 256 channels, 18 blocks each, from 32 by 32 pixels without downsampling before the first
    stage; 3 by 3 kernels throughout and dropout of 0.1, as its script has them. Its README reports an accuracy of about
    94.5 % on CIFAR-10. In the paper there is no such network.

    One deviation: the released code appends 29 channels of zeros to the 3 of an image before it splits, so that its
    second stream is all zeros. :class:`~invertible.PadSplit` gives two colours to the first stream and the third to the
    second. Widths do not depend on ``in_channels``, which is at most 32.

    Source: ``CIFAR_main.py --nBlocks 18 18 18 --nStrides 1 2 2 --nChannels 16 64 256`` and ``models/iRevNet.py`` of
    https://github.com/jhjacobsen/pytorch-i-revnet (9a93eb5)

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in irevnet_cifar().parameters())
        6274826
    """
    return IRevNet(
        [PadSplit(in_channels, 32)],
        32,
        blocks=(18, 18, 18),
        channels=(16, 64, 256),
        strides=(1, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        kernel_sizes=kernel_sizes,
        dropout=dropout,
        size_divisor=4,
    )
