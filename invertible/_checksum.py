"""A number that says whether a tensor has come back with all its bits, whatever the order of the sum."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["checksum", "checksums", "digest"]

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(x: Tensor) -> Tensor:
    """A 64-bit integer for the bits of a tensor, on its device.

    The bits are summed along each row and each column (dimensions from the third on are a row), modulo 2^64, so that
    threads and devices agree; the sums are then mixed, each by its place. It is linear in nothing: an exchange of two
    elements changes it, also of a number and its negative, as any change of one element does.
    """
    x = x.detach()
    x = torch.view_as_real(x) if x.is_complex() else x
    bits = x.view(_INTEGER[x.element_size()])
    if x.ndim < 2:
        return _mixed(bits.long().flatten())
    rows = bits.sum(tuple(range(2, x.ndim)), dtype=torch.int64) if x.ndim > 2 else bits.long()
    columns = bits.sum((0, 1), dtype=torch.int64)
    return _mixed(torch.cat((rows.flatten(), columns.flatten())))


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Those of several tensors, on the device of the first."""
    return torch.stack([checksum(t).to(tensors[0].device) for t in tensors])


def digest(tensors: Iterable[Tensor]) -> str:
    """Sixteen characters for the bits, dtypes and shapes of any tensors; waits for each device once."""
    tensors = list(tensors)
    sums = [checksum(t) for t in tensors]
    devices = dict.fromkeys(s.device for s in sums)
    read: dict[torch.device, list[int]] = {
        device: torch.stack([s for s in sums if s.device == device]).tolist()  # pyright: ignore[reportUnknownMemberType]
        for device in devices
    }
    found = [(read[s.device].pop(0), str(t.dtype), tuple(t.shape)) for s, t in zip(sums, tensors, strict=True)]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _mixed(sums: Tensor) -> Tensor:
    """Source of the constants: SplitMix64, Steele et al., 2014, https://doi.org/10.1145/2660193.2660195."""
    place = torch.arange(1, len(sums) + 1, device=sums.device)
    mixed = sums + place * -7046029254386353131
    mixed = (mixed ^ _shifted(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shifted(mixed, 27)) * -7723592293110705685
    return (mixed ^ _shifted(mixed, 31)).sum()


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # without copies of the sign
