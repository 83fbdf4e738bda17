"""A number that says whether a tensor has come back with all its bits, whatever the order of the sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["checksum", "checksums"]

_INTEGER = {4: torch.int32, 8: torch.int64}


def checksum(x: Tensor) -> Tensor:
    """A 64-bit integer for the bits of a tensor of float32 or float64, on its device.

    The bits are summed along each row and each column (dimensions from the third on are a row), modulo 2^64, so that
    threads and devices agree; the sums are then mixed, each by its place. It is linear in nothing: an exchange of two
    elements changes it, also of a number and its negative, as any change of one element does.
    """
    bits = x.detach().view(_INTEGER[x.element_size()])
    if x.ndim < 2:
        return _mixed(bits.long().flatten())
    rows = bits.sum(tuple(range(2, x.ndim)), dtype=torch.int64) if x.ndim > 2 else bits.long()
    columns = bits.sum((0, 1), dtype=torch.int64)
    return _mixed(torch.cat((rows.flatten(), columns.flatten())))


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Those of several tensors, on the device of the first."""
    return torch.stack([checksum(t).to(tensors[0].device) for t in tensors])


def _mixed(sums: Tensor) -> Tensor:
    """Source of the constants: SplitMix64, Steele et al., 2014, https://doi.org/10.1145/2660193.2660195."""
    place = torch.arange(1, len(sums) + 1, device=sums.device)
    mixed = sums + place * -7046029254386353131
    mixed = (mixed ^ _shifted(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shifted(mixed, 27)) * -7723592293110705685
    return (mixed ^ _shifted(mixed, 31)).sum()


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # without copies of the sign
