"""How well a network's inverse recovers its input."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zoo.augment import Preparation
from zoo.data import decode_image, evaluation_transform
from zoo.errors import InputError, diverging, reason
from zoo.evaluation import evaluating
from zoo.irevnet import IRevNet
from zoo.recipes import Recipe

__all__ = ["InversionError", "file_batches", "invert_batches", "relative_errors"]


def relative_errors(recovered: Tensor, x: Tensor) -> Tensor:
    r"""Returns :math:`\lVert \Phi^{-1}\Phi x - x \rVert / \lVert x \rVert` per sample, in float64.

    A sample that is 0 and comes back as 0 has the error 0, and as anything else an infinite one.

    Shape:
        - recovered, x: ``(batch, ...)``
        - Output: ``(batch,)``

    Example:
        >>> relative_errors(torch.tensor([[3.0, 4.5], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([0.1000, 0.0000], dtype=torch.float64)
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

    Example:
        >>> InversionError.of(torch.tensor([0.0, 1.0, 5.0]))
        InversionError(mean=2.0, median=1.0, maximum=5.0)
    """

    mean: float
    median: float
    maximum: float

    @classmethod
    def of(cls, errors: Tensor) -> "InversionError":
        """Summarises the errors of :func:`relative_errors`."""
        return cls(float(errors.mean()), float(errors.quantile(0.5)), float(errors.max()))


@torch.no_grad()
def invert_batches(net: IRevNet, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs the network forward and backwards in ``eval``, and yields each batch with its recovery.

    Raises:
        InputError: if a value leaves the network's grid.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", blocks=(1, 1, 1))
        >>> net.grid = "exact"
        >>> [(x, recovered)] = invert_batches(net, [torch.ones(2, 3, 32, 32)])
        >>> relative_errors(recovered, x)
        tensor([0., 0.], dtype=torch.float64)
    """
    with evaluating(net):
        for x in batches:
            with diverging("in the inversion"):
                recovered = net.inverse(net.features(x))
            yield x, recovered


def file_batches(paths: Iterable[Path], recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """Reads image files as the recipe does for its test, one by one: ``(1, 3, size, size)``.

    Args:
        paths: of the files.
        recipe: whose ``evaluation_size`` the size is, and whose normalisation.
        device: where to.

    Raises:
        InputError: if a file can't be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from zoo.recipes import RECIPES
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "red.png"
        ...     Image.new("RGB", (40, 40), "red").save(path)
        ...     [x] = file_batches([path], RECIPES["digits"], torch.device("cpu"))
        >>> x.shape, x.amax((0, 2, 3))
        (torch.Size([1, 3, 32, 32]), tensor([1., 0., 0.]))
    """
    prepare, transform = Preparation(recipe), evaluation_transform(recipe)
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the image {path}: {reason(error)}") from None
        yield prepare(transform(decode_image(content, str(path)))[None].to(device))
