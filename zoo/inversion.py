"""How well a network's inverse recovers its input."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

from zoo.data import load_image
from zoo.irevnet import IRevNet

__all__ = ["InversionError", "inversion_error", "invert_files", "relative_errors"]


def relative_errors(recovered: Tensor, x: Tensor) -> Tensor:
    r"""Returns :math:`\lVert \Phi^{-1}\Phi x - x \rVert / \lVert x \rVert` per sample, in float64.

    A sample that is 0 and comes back as 0 has the error 0.
    """
    true = x.detach().to(torch.float64).flatten(1)
    difference = (recovered.detach().to(torch.float64).flatten(1) - true).norm(dim=1)
    return torch.where(difference == 0, difference, difference / true.norm(dim=1))


@dataclass(frozen=True)
class InversionError:
    """The relative errors of a set of images; their mean is the paper's measure, section 4.2."""

    mean: float
    median: float
    maximum: float

    @classmethod
    def of(cls, errors: Tensor) -> "InversionError":
        """Summarises the errors of :func:`relative_errors`."""
        return cls(float(errors.mean()), float(errors.median()), float(errors.max()))


@torch.no_grad()
def inversion_error(net: IRevNet, batches: Iterable[Tensor]) -> InversionError:
    r"""Inverts images from their last features and returns the relative error over all of them.

    .. math::
        \epsilon(X) = \frac{1}{|X|} \sum_{x \in X} \frac{\lVert x - \Phi^{-1} \Phi x \rVert}{\lVert x \rVert}

    Source: i-RevNet, section 4.2, https://arxiv.org/abs/1802.07088. The network runs in the mode that it is in.

    Args:
        net: the network.
        batches: batches of the images as the network sees them.
    """
    errors = [relative_errors(net.inverse(net.features(x)), x).cpu() for x in batches]
    return InversionError.of(torch.cat(errors))


@torch.no_grad()
def invert_files(
    net: IRevNet, paths: Sequence[Path], transform: v2.Compose, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Reads image files, runs the network forward and backwards in ``eval``, and returns images and recoveries.

    Args:
        net: the network.
        paths: of the images, at least one.
        transform: from a Pillow image to a uint8 tensor of one size.
        device: that the network is on.

    Raises:
        InputError: if a file can't be read.
    """
    net.eval()
    images = torch.stack([transform(load_image(path)) for path in paths]).to(device).float() / 255
    return images, net.inverse(net.features(images))
