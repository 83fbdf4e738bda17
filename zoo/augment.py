"""What happens to a batch on its device: scaling, the colour distortion of Gomez et al., normalisation, mixing."""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from zoo.recipes import Recipe

__all__ = ["DRAWS", "Preparation", "inception_colour", "mixture"]

DRAWS = 5
"""Random numbers that the colours of one image take."""


def inception_colour(images: Tensor, draws: Tensor) -> Tensor:
    r"""Distorts the colours of a batch as the RevNets of Gomez et al. do, each image by numbers of its own.

    With H, S, V of each pixel, the mean :math:`\mu_c` of each colour over the image, and the numbers
    :math:`\delta \in [-32/255, 32/255]`, :math:`s, f \in [0.5, 1.5]`, :math:`h \in [-0.2, 0.2]`, drawn uniformly, these
    operations act one after another, in one of two orders with equal probability:

    * brightness: :math:`x + \delta`
    * saturation: :math:`S \to \min(\max(S s, 0), 1)`
    * hue: :math:`H \to (H + h) \bmod 1`
    * contrast: :math:`x_c \to \mu_c + f (x_c - \mu_c)`

    The orders: as listed, or with contrast second. At the end values are clipped to [0, 1], and not before.

    Source: ``distort_color`` in ``resnet/data_tfrecord/image_processing.py`` of
    https://github.com/renmengye/revnet-public (5486f61). There the order goes by a thread's number, and so with the way
    of resizing; here it is drawn. torchvision's ``ColorJitter`` is something else: brightness by a factor, saturation
    towards grey, contrast around the mean grey, clipped after each.

    Args:
        images: ``(batch, 3, height, width)``, floating point, in [0, 1].
        draws: ``(batch, 5)``, uniform in [0, 1): order, brightness, saturation, hue, contrast.

    Returns:
        Images of the same shape, in [0, 1].

    Example:
        >>> grey = torch.full((1, 3, 2, 2), 0.5)
        >>> inception_colour(grey, torch.tensor([[0.0, 1.0, 0.5, 0.5, 0.5]]))[0, :, 0, 0]  # brighter by 32/255
        tensor([0.6255, 0.6255, 0.6255])
    """
    order, brightness, saturation, hue, contrast = draws.to(images)[:, :, None, None, None].unbind(1)
    contrast = contrast + 0.5
    second = order >= 0.5
    images = images + (2 * brightness - 1) * (32 / 255)
    images = _contrast(images, torch.where(second, contrast, 1))
    images = _saturation_and_hue(images, saturation + 0.5, (2 * hue - 1) * 0.2)
    return _contrast(images, torch.where(second, 1, contrast)).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return images + (factor - 1) * (images - images.mean((2, 3), keepdim=True))


def _saturation_and_hue(images: Tensor, factor: Tensor, turn: Tensor) -> Tensor:
    """Both at once, for they follow each other, and the way to H, S, V and back between them changes nothing."""
    red, green, blue = images.split(1, 1)
    value, which = images.max(1, keepdim=True)
    span = value - images.amin(1, keepdim=True)
    sixths = torch.where(which == 0, green - blue, torch.where(which == 1, blue - red, red - green))
    hue = 2.0 * which + sixths / torch.where(span > 0, span, 1)
    hue = torch.remainder(hue + 6 * turn, 6)
    saturation = torch.where(value > 0, span / torch.where(value > 0, value, 1), 0)
    saturation = (saturation * factor).clamp(0, 1)
    # How much of each colour the hue has: 1 within a sixth of the circle of it, 0 beyond two sixths.
    parts = torch.cat([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], 1).clamp(0, 1)
    return value * (1 - saturation * (1 - parts))


class Preparation:
    """Makes of the uint8 images of the loader what the network sees, on the device that they are on.

    Args:
        recipe: how.

    Shape:
        - images: ``(batch, 3, height, width)``, uint8
        - draws: ``(batch, 5)``, in training
        - Output: the same shape, float32: in [0, 1] or, if the recipe has mean and std, normalised

    Example:
        >>> from zoo.recipes import RECIPES
        >>> prepare = Preparation(RECIPES["digits"])
        >>> images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 3, 2, 3)
        >>> prepare(images)[0, 0, 0].tolist()
        [0.0, 0.20000000298023224, 1.0]
    """

    def __init__(self, recipe: Recipe) -> None:
        self._colours = recipe.colour == "inception"
        self._plain = (recipe.mean, recipe.std) == ((0, 0, 0), (1, 1, 1))
        self._mean, self._std = (torch.tensor(each).view(3, 1, 1) for each in (recipe.mean, recipe.std))
        self._channels_last = recipe.channels_last

    def __call__(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        last = self._channels_last and images.device.type == "cuda"  # on a CPU see zoo.building.configure
        x = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).float() / 255
        if self._colours and draws is not None:
            x = inception_colour(x, draws.to(x.device))
        if not self._plain:
            x = (x - self._mean.to(x.device)) / self._std.to(x.device)
        return x

    def restored(self, x: Tensor) -> Tensor:
        """Undoes the normalisation: images in [0, 1]."""
        return x if self._plain else x * self._std.to(x.device) + self._mean.to(x.device)


def mixture(recipe: Recipe, num_classes: int) -> Any:
    """Mixup, cutmix, or one of both for each batch; ``None`` if the recipe has neither.

    It takes images ``(batch, 3, height, width)`` and labels ``(batch,)`` and returns images and probabilities
    ``(batch, num_classes)``; each image is mixed with the one before it. It draws from PyTorch's global generator.

    Source: Zhang et al., 2018, https://arxiv.org/abs/1710.09412; Yun et al., 2019, https://arxiv.org/abs/1905.04899; as
    torchvision has them

    Example:
        >>> import dataclasses
        >>> from zoo.recipes import RECIPES
        >>> mix = mixture(dataclasses.replace(RECIPES["digits"], mixup=0.2), num_classes=3)
        >>> x, target = mix(torch.rand(2, 3, 8, 8), torch.tensor([0, 2]))
        >>> x.shape, target.sum(1).tolist(), mixture(RECIPES["digits"], num_classes=3)
        (torch.Size([2, 3, 8, 8]), [1.0, 1.0], None)
    """
    kinds: list[Any] = []
    if recipe.mixup:
        kinds.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
    if recipe.cutmix:
        kinds.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
    return None if not kinds else kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)
