"""What a network on a grid makes of its input, and what its exact way back depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._value import Value, describe

__all__ = ["EnvironmentMismatch", "Latent"]


class EnvironmentMismatch(RuntimeError):  # noqa: N818 (the name of the design)
    """A latent would not come back bit for bit: something is other than it was in ``encode``."""

    differences: dict[str, tuple[object, object]]
    """What differs: how it was, and how it is."""


@dataclass(frozen=True, repr=False, eq=False)
class Latent:
    """The output of a network on a grid, from :meth:`Sequential.encode`, with all that its way back depends on.

    The fingerprint holds plain numbers and words only, so that a latent is saved by
    ``torch.save((latent.value, latent.fingerprint), path)`` and loaded by ``Latent(*torch.load(path))``.

    A part of the batch is none: the kernels are chosen by its size, and so are the last bits. Invert all, and take the
    part of the result.

    Args:
        value: what ``forward`` has returned.
        fingerprint: what the way back depends on, by name.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge(), grid="exact").eval()
        >>> latent = net.encode(torch.rand(3, 4))
        >>> latent
        Latent(a tensor of shape (3, 4), Grid(40, torch.float64))
        >>> net.inverse(latent).shape
        torch.Size([3, 4])
    """

    value: Value
    fingerprint: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Latent({describe(self.value)}, {self.fingerprint.get('grid')})"
