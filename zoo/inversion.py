"""How well a network's inverse recovers its input."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

from zoo.data import load_image
from zoo.errors import diverging
from zoo.irevnet import IRevNet

__all__ = ["InversionError", "invert_files", "relative_errors"]


def relative_errors(recovered: Tensor, x: Tensor) -> Tensor:
    r"""Returns :math:`\lVert \Phi^{-1}\Phi x - x \rVert / \lVert x \rVert` per sample, in float64.

    A sample that is 0 and comes back as 0 has the error 0.
    """
    true = x.detach().to(torch.float64).flatten(1)
    difference = (recovered.detach().to(torch.float64).flatten(1) - true).norm(dim=1)
    return torch.where(difference == 0, difference, difference / true.norm(dim=1))


@dataclass(frozen=True)
class InversionError:
    r"""The relative errors of a set of images.

    .. math::
        \epsilon(X) = \frac{1}{|X|} \sum_{x \in X} \frac{\lVert x - \Phi^{-1} \Phi x \rVert}{\lVert x \rVert}

    The mean is the paper's measure. Source: i-RevNet, section 4.2, https://arxiv.org/abs/1802.07088
    """

    mean: float
    median: float
    maximum: float

    @classmethod
    def of(cls, errors: Tensor) -> "InversionError":
        """Summarises the errors of :func:`relative_errors`."""
        return cls(float(errors.mean()), float(errors.quantile(0.5)), float(errors.max()))


@torch.no_grad()
def invert_files(
    net: IRevNet, paths: Iterable[Path], transform: v2.Compose, *, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads image files, runs the network forward and backwards in ``eval``, and yields each image and its recovery.

    Args:
        net: the network.
        paths: of the images.
        transform: from a Pillow image to a uint8 tensor.
        device: that the network is on.

    Raises:
        InputError: if a file can't be read, or a value leaves the network's grid.
    """
    net.eval()
    for path in paths:
        image = transform(load_image(path)).to(device).float()[None] / 255
        with diverging("in the inversion"):
            recovered = net.inverse(net.features(image))
        yield image, recovered
