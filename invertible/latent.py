"""What a network on a grid makes of its input, and what its exact way back depends on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ._checksum import digest
from ._value import Value, describe, leaves, map_value

__all__ = ["EnvironmentMismatch", "Latent"]


class EnvironmentMismatch(RuntimeError):  # noqa: N818 (the name of the design)
    """A latent would not come back bit for bit: something is other than it was in ``encode``."""

    differences: dict[str, tuple[object, object]]
    """What differs: how it was, and how it is."""


@dataclass(frozen=True, repr=False)
class Latent:
    """The output of a network on a grid, from :meth:`Sequential.encode`, with all that its way back depends on.

    The fingerprint holds plain numbers and words only, so that a latent is saved by
    ``torch.save((latent.value, latent.fingerprint), path)`` and loaded by ``Latent(*torch.load(path))``.

    A part of the batch is a latent, too, ``latent[2:3]``, if the network was in ``eval``: then samples don't depend
    on each other (on a GPU, whose kernels depend on the size of the batch, :meth:`Sequential.inverse` refuses it).

    Args:
        value: what ``forward`` has returned.
        fingerprint: what the way back depends on, by name.

    Raises:
        TypeError: if an index is not a slice.
        ValueError: if a part is asked for and the network was in training.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge(), grid="exact").eval()
        >>> latent = net.encode(torch.rand(3, 4))
        >>> latent
        Latent(a tensor of shape (3, 4), Grid(40, torch.float64))
        >>> net.inverse(latent[1:2]).shape
        torch.Size([1, 4])
    """

    value: Value
    fingerprint: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Latent({describe(self.value)}, {self.fingerprint.get('grid')})"

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("Latent: it is not iterated; latent.value is what forward has returned.")

    def __getitem__(self, part: slice) -> "Latent":
        if not isinstance(part, slice):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Latent: the index must be a slice of the batch, such as 2:3, got {part!r}.")
        if self.fingerprint["mode"] != "eval":
            raise ValueError(
                f"Latent: a part of a batch has no way back of its own in {self.fingerprint['mode']!r}, where samples "
                "depend on each other. Encode in eval."
            )
        if self.fingerprint["condition"] is not None:
            raise ValueError("Latent: a part of a batch that was encoded with a condition is to be encoded by itself.")
        value = map_value(lambda t: t[part], self.value)
        return Latent(value, {**self.fingerprint, "value": digest(leaves(value))})
