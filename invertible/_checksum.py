"""A number that says whether a tensor has come back with all its bits, whatever the order of the sum."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["checksum", "digest"]

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(*tensors: Tensor) -> Tensor:
    """A 64-bit integer for the bits of one tensor or of several, on the device of the first.

    The bits are summed along each row and each column (dimensions from the third on are a row), with overflow, so that
    threads and devices agree; the sums are then mixed, each by its place. So an exchange of two elements changes it,
    of a number and its negative too, as any change of one element does. It is not safe from whoever means to cheat it.
    """
    return _mixed(torch.cat([part.to(tensors[0].device) for t in tensors for part in _sums(t.detach())]))


def _sums(x: Tensor) -> tuple[Tensor, ...]:
    x = torch.view_as_real(x) if x.is_complex() else x
    bits = x.view(_INTEGER[x.element_size()])
    if x.ndim < 2:
        return (bits.long().flatten(),)
    wide = bits.dtype if x.element_size() >= 4 else torch.int64  # to widen while summing is slow
    rows = bits.sum(tuple(range(2, x.ndim)), dtype=wide) if x.ndim > 2 else bits
    return rows.long().flatten(), bits.sum((0, 1), dtype=wide).long().flatten()


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
    mixed = torch.arange(1, len(sums) + 1, device=sums.device)
    mixed = _stirred(mixed.mul_(-7046029254386353131).add_(sums), 30).mul_(-4658895280553007687)
    return _stirred(_stirred(mixed, 27).mul_(-7723592293110705685), 31).sum()


def _stirred(x: Tensor, by: int) -> Tensor:
    """Writes into ``x`` its bits, each changed by the one so many places above."""
    above = (x >> by).bitwise_and_((1 << (64 - by)) - 1)  # without copies of the sign
    return x.bitwise_xor_(above)
