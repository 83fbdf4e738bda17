"""The invertible U-Net of Etmann, Ke and Schönlieb, assembled from invertible layers."""

import collections.abc
from typing import Any

from torch import Tensor, nn

from invertible import (
    Coupling,
    Identity,
    Inverse,
    InvertibleModule,
    Merge,
    PadSplit,
    Parallel,
    PixelUnshuffle,
    Sequential,
    Split,
)
from zoo._dimensions import CONVOLUTION, INPUT, check_dimensions
from zoo._options import check_blocks, check_number
from zoo.network import InvertibleNetwork, check_images
from zoo.registry import register

__all__ = ["IUNet", "iunet"]


class IUNet(InvertibleNetwork):
    r"""A U-Net whose body is invertible from the image to its features, and a logit for each class and pixel.

    The values of a level are a pair of streams :math:`(a, b)`, of half its channels each. With couplings
    :math:`C`, :math:`C'` of that level, :math:`S` = ``PixelUnshuffle(2)`` and the level below, :math:`U_{l+1}`,

    .. math::
        U_l = C'_l \circ D_l \circ C_l, \qquad
        D_l(a, b) = \left(a, \; S^{-1} \, U_{l+1} \, S \, b\right).

    So the first stream goes on as the skip connection while the second is downsampled, transformed and upsampled, and
    the couplings on the way up mix them again. In two dimensions a half of the channels is skipped, in three
    dimensions three quarters (the first half of :math:`b` is skipped too): a level has twice the channels of the one
    above. In one dimension a half is skipped, and all levels have the same channels. The lowest level has the
    couplings of both ways.

    The function of a coupling is a 3×3 convolution without bias, leaky ReLU, and layer norm over channels and space
    (``GroupNorm(1, ...)``), whose weight and bias begin as zeros: the network begins by moving elements only.

    The body is one :class:`~invertible.Sequential` with :class:`~invertible.Parallel` inside, so that
    ``net.backprop = Reconstruct()`` makes memory independent of the number of couplings, and ``net.inverse`` returns
    the image from the features, bit for bit with ``net.grid = "exact"``.

    Deviations from the paper: down- and upsampling are fixed rearrangements of pixels in place of learnt orthogonal
    maps, which begin as the Haar transform, and channels are not mixed by orthogonal maps between levels; zeros pad
    the image to the body's channels where the paper's networks for segmentation have a learnt convolution, so that
    the image itself comes back; sizes that are not divisible are refused, not padded. Kernel, norm and initialisation
    are those of the authors' code, whose fraction of skipped channels is ours for ``slice_mode="double"``.

    Source: iUNets (Etmann, Ke and Schönlieb, 2020), https://arxiv.org/abs/2005.05220;
    https://github.com/cetmann/iunets

    Args:
        channels: of the body at full resolution, over both streams; a multiple of 2, in three dimensions of 4.
        blocks: the number of couplings of each level on each way, from full resolution down; so many levels there are.
        in_channels: of an image, at most ``channels``. With one, the second stream begins as zeros.
        num_classes: of the head, a 1×1 convolution; with 0 it has none, and ``net(x)`` returns the features.
        dimensions: the number of spatial ones: 1 for signals, 2 for images, 3 for volumes.

    Shape:
        - Input: ``(batch, in_channels, height, width)``, floating point; as many sizes as there are dimensions
        - Output: logits ``(batch, num_classes, height, width)``

    Raises:
        TypeError: if the input is not a floating-point tensor, or not in the weights' dtype, where neither a grid nor
            autocast converts it.
        ValueError: if the input has another shape, or sizes that are not divisible by 2 for each level but the first;
            if an option is out of range; if ``inverse`` is given a tensor of another shape than features have.

    Example:
        >>> net = iunet(num_classes=2, channels=8, blocks=(2, 2)).eval()
        >>> image = torch.rand(1, 3, 16, 16)
        >>> net(image).shape
        torch.Size([1, 2, 16, 16])
        >>> torch.allclose(net.inverse(net.features(image)), image, atol=1e-5)
        True
    """

    def __init__(
        self,
        *,
        channels: int,
        blocks: collections.abc.Sequence[int],
        in_channels: int = 3,
        num_classes: int,
        dimensions: int = 2,
    ) -> None:
        super().__init__()
        check_dimensions("IUNet", dimensions)
        divisor = 2 ** _halvings(dimensions)
        check_number("IUNet", "channels", channels)
        if channels < divisor or channels % divisor:
            rule = f"channels must be a multiple of {divisor} with dimensions={dimensions}"
            raise ValueError(f"IUNet: {rule}, got {channels}.")
        check_blocks("IUNet", blocks)
        check_number("IUNet", "in_channels", in_channels)
        if not 1 <= in_channels <= channels:
            raise ValueError(f"IUNet: in_channels must be between 1 and channels, {channels}, got {in_channels}.")
        check_number("IUNet", "num_classes", num_classes, least=0)
        self.num_classes, self.in_channels, self.dimensions = num_classes, in_channels, dimensions
        self.size_divisor = self.total_stride = 2 ** (len(blocks) - 1)
        self.feature_channels = channels
        self.body = Sequential(PadSplit(in_channels, channels), *_level(channels, blocks, dimensions), Merge())
        self.head = nn.Sequential(self.classifier(channels, num_classes) if num_classes else nn.Identity())

    def classifier(self, channels: int, num_classes: int, **options: Any) -> nn.Module:
        """Makes the last layer, a 1×1 convolution; ``options`` are its own, such as ``device``."""
        return CONVOLUTION[self.dimensions](channels, num_classes, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of each pixel; without a head, the features."""
        features = self.features(x)
        return self.head(features if self.grid is None else features.to(next(self.body.parameters()).dtype))

    def _check_image(self, x: Tensor) -> None:
        divisor = self.size_divisor
        options = {"in_channels": self.in_channels, "dimensions": self.dimensions}
        # No norm is over the batch: one image of one pixel will do.
        check_images("IUNet", x, size_divisor=divisor, total_stride=divisor, training=False, **options)
        self._check_dtype(x, f"{INPUT[self.dimensions]}s")


def _halvings(dimensions: int) -> int:
    """How often a level's channels are halved before the rest is downsampled, which multiplies it by 2^dimensions."""
    return max(dimensions - 1, 1)


def _level(channels: int, blocks: collections.abc.Sequence[int], dimensions: int) -> list[InvertibleModule]:
    """The layers of a level and of those below, from a pair of streams to a pair."""
    width = channels // 2
    down = [Coupling(_function(width, dimensions)) for _ in range(blocks[0])]
    up = [Coupling(_function(width, dimensions)) for _ in range(blocks[0])]
    if len(blocks) == 1:
        return [*down, *up]
    halvings = _halvings(dimensions)
    below = _level(channels * 2**dimensions // 2**halvings, blocks[1:], dimensions)
    branch = Sequential(
        PixelUnshuffle(2, order="pixel_major"),
        Split(),
        *below,
        Merge(),
        Inverse(PixelUnshuffle(2, order="pixel_major")),
    )
    for _ in range(halvings - 1):
        branch = Sequential(Split(), Parallel(Identity(), branch), Merge())
    return [*down, Parallel(Identity(), branch), *up]


def _function(width: int, dimensions: int) -> nn.Sequential:
    convolution = CONVOLUTION[dimensions](width, width, 3, padding=1, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=0.01, mode="fan_out", nonlinearity="leaky_relu")
    norm = nn.GroupNorm(1, width, eps=1e-3)
    nn.init.zeros_(norm.weight)
    return nn.Sequential(convolution, nn.LeakyReLU(), norm)


@register
def iunet(
    *,
    num_classes: int = 2,
    in_channels: int = 3,
    channels: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    dimensions: int = 2,
) -> IUNet:
    """The invertible U-Net for images, or volumes by ``dimensions=3``: 3,137,410 parameters with 2 classes.

    Four levels of 64, 128, 256 and 512 channels, with two couplings on each way: our own choice, for the paper has many
    sizes.

    Source: https://arxiv.org/abs/2005.05220

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in iunet().parameters())
        3137410
    """
    return IUNet(
        channels=channels,
        blocks=blocks,
        in_channels=in_channels,
        num_classes=num_classes,
        dimensions=dimensions,
    )
