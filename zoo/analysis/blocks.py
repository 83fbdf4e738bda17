"""The values at a block of a network, by its name, and the way back from there."""

from typing import Any

from torch import Tensor

from invertible import Sequential
from zoo.analysis.subject import Reversible
from zoo.errors import InputError
from zoo.evaluation import evaluating

__all__ = ["block_names", "features_at", "inverse_from"]


def block_names(net: Reversible) -> list[str]:
    """The names that ``net.trace`` gives to the layers of the body, in their order.

    Example:
        >>> import zoo
        >>> block_names(zoo.create("irevnet_small", num_classes=2, blocks=(1, 1)))
        ['0', '1', '2', '3', '4']
    """
    return [name for name, _ in net.body.named_children()]


def features_at(net: Reversible, x: Tensor, name: str) -> Any:
    r"""Returns the value of the layer of this name, :math:`\Phi_j x`, in ``eval``: a pair of streams at a block.

    Source: i-RevNet, section 5.1, whose :math:`\Phi_j` it is, https://arxiv.org/abs/1802.07088

    Args:
        net: whose layer.
        x: images ``(batch, channels, height, width)``.
        name: as ``net.trace`` gives it, or ``net.named_modules``, where ``body.`` is before it.

    Raises:
        InputError: if no layer of the body has this name.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2)
        >>> [tuple(stream.shape) for stream in features_at(net, torch.rand(1, 3, 16, 16), "2")]
        [(1, 24, 4, 4), (1, 24, 4, 4)]
    """
    chain = _up_to(net, name)
    with evaluating(net):
        net._check_image(x)
        return chain(x)


def inverse_from(net: Reversible, value: Any, name: str) -> Tensor:
    r"""Returns the images whose values at the layer of this name these are, :math:`\Phi_j^{-1} v`, in ``eval``.

    On a grid it takes what :func:`features_at` returns, bit for bit; other values are rounded to it.

    Args:
        net: whose layer.
        value: of the shape that :func:`features_at` returns.
        name: as ``net.trace`` gives it, or ``net.named_modules``.

    Raises:
        InputError: if no layer of the body has this name.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2)
        >>> net.grid = "exact"
        >>> x = torch.ones(1, 3, 16, 16)
        >>> bool((inverse_from(net, features_at(net, x, "4"), "4") == x).all())
        True
    """
    chain = _up_to(net, name)
    with evaluating(net):
        return chain.inverse(value)


def _up_to(net: Reversible, name: str) -> Sequential:
    """The body up to this layer, which shares its layers and its grid."""
    names = block_names(net)
    if name.removeprefix("body.") not in names:
        raise InputError(f"no block is named {name}; the names are {', '.join(names)}")
    return net.body[: names.index(name.removeprefix("body.")) + 1]
