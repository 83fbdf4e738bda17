"""The Jacobian of a map at a point, by its products with blocks of vectors, and its largest singular values."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zoo.analysis.parts import Parts

__all__ = ["Jacobian", "LargestValues", "basis_size", "largest_singular_values"]

SAVE_EVERY = 120.0
"""Seconds after which what has come to a basis is kept."""

Progress = Callable[[int, int], None]
"""Is told how much is done, and of how much."""


class Jacobian:
    r"""The Jacobian :math:`J` of a map at a point, of which nothing is stored: it is multiplied with blocks of vectors.

    :math:`J v` by ``torch.func.linearize`` and :math:`J^\top u` by ``torch.func.vjp``, each prepared once and then
    vectorised by ``torch.func.vmap`` over the vectors of a block. To linearize takes seconds, so that in few dimensions
    :math:`J v` is by ``torch.func.jvp``, which runs the map anew for each block.

    Args:
        function: of a tensor ``(1, ...)`` to a tensor ``(1, ...)``, differentiable.
        x: the point, ``(1, ...)``.
        block: vectors that are multiplied at once.
        linearize: whether to do so; ``None``: from 4,097 dimensions on.

    Example:
        >>> jacobian = Jacobian(lambda x: x**2, torch.tensor([[1.0, 2.0]]))
        >>> jacobian.times(torch.eye(2)), jacobian.dense()
        (tensor([[2., 0.],
                [0., 4.]]), tensor([[2., 0.],
                [0., 4.]]))
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, *, block: int = 32, linearize: bool | None = None
    ) -> None:
        def flat(point: Tensor) -> Tensor:
            return function(point.view(x.shape)).flatten()

        point = x.detach().flatten()
        self.block, self.dtype, self.device = block, x.dtype, x.device
        y, backward, *_ = torch.func.vjp(flat, point)
        self.columns, self.rows = point.numel(), y.numel()
        with warnings.catch_warnings():  # both load what torch itself has deprecated
            warnings.simplefilter("ignore")
            if self.columns > 4096 if linearize is None else linearize:
                forward = torch.func.linearize(flat, point)[1]
            else:
                forward = partial(_derivative, flat, point)
                forward(torch.zeros_like(point))
        self._forward = torch.func.vmap(forward)
        self._backward = torch.func.vmap(lambda u: backward(u)[0])

    def times(self, v: Tensor) -> Tensor:
        r""":math:`J v` of each row: ``(count, columns)`` to ``(count, rows)``."""
        return torch.cat([self._forward(part) for part in v.split(self.block)])

    def transposed_times(self, u: Tensor) -> Tensor:
        r""":math:`J^\top u` of each row: ``(count, rows)`` to ``(count, columns)``."""
        return torch.cat([self._backward(part) for part in u.split(self.block)])

    def dense(self, progress: Progress | None = None) -> Tensor:
        """The whole matrix, ``(rows, columns)``."""
        found = torch.empty(self.columns, self.rows, dtype=self.dtype, device=self.device)
        for first in range(0, self.columns, self.block):
            count = min(self.block, self.columns - first)
            unit = torch.zeros(count, self.columns, dtype=self.dtype, device=self.device)
            unit[torch.arange(count), torch.arange(first, first + count)] = 1
            found[first : first + count] = self.times(unit)
            if progress:
                progress(first + count, self.columns)
        return found.mT


def _derivative(function: Callable[[Tensor], Tensor], point: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(function, (point,), (v,))[1]


@dataclass(frozen=True)
class LargestValues:
    """Singular values, and how well they are known.

    Example:
        >>> jacobian = Jacobian(lambda x: x * torch.tensor([3.0, 2.0, 1.0]), torch.zeros(1, 3))
        >>> found = largest_singular_values(jacobian, 2)
        >>> found.values.round(decimals=5).tolist(), round(found.energy, 4), found.energy_error
        ([3.0, 2.0], 14.0, 0.0)
    """

    values: Tensor
    """Descending, in float64 on the CPU."""
    residuals: Tensor
    r"""For each value a distance within which :math:`J` has a singular value; 0 if the basis holds the whole space."""
    energy: float
    r""":math:`\lVert J \rVert_F^2`: of the basis exactly, of what is orthogonal to it by Hutchinson's estimate."""
    energy_error: float
    """The standard error of the estimate; 0 if the basis holds the whole space."""


def basis_size(jacobian: Jacobian, k: int, *, oversample: float = 3.0) -> int:
    """How many vectors the basis of :func:`largest_singular_values` has on each side.

    ``oversample`` times k, rounded up to whole blocks: 8 of them at least, and no more vectors than there are rows or
    columns.

    Example:
        >>> jacobian = Jacobian(lambda x: 2 * x, torch.zeros(1, 100), block=4)
        >>> basis_size(jacobian, 5), basis_size(jacobian, 15), basis_size(jacobian, 50)  # 8 * 4; 3 * 15, in fours; all
        (32, 48, 100)
    """
    wanted = max(math.ceil(oversample * k), 8 * jacobian.block)
    return min(-(-wanted // jacobian.block) * jacobian.block, jacobian.columns, jacobian.rows)


@torch.no_grad()
def largest_singular_values(
    jacobian: Jacobian,
    k: int,
    *,
    oversample: float = 3.0,
    probes: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
    parts: Parts | None = None,
    part: str = "basis",
) -> LargestValues:
    r"""The k largest singular values by block Golub–Kahan bidiagonalisation with full reorthogonalisation.

    From a random block :math:`V_1`, blocks :math:`U_j` of :math:`J V_j` and :math:`V_{j+1}` of :math:`J^\top U_j` are
    orthogonalised twice against all blocks before them. With :math:`J V = U B` the singular values are those of
    :math:`B = U^\top J V`, which is computed as this product. Where a block brings fewer new directions than it has
    vectors, as with repeated singular values, random directions take the others' place, so that the basis becomes as
    large as it should.

    Source: Golub, Luk and Overton, 1981, "A block Lanczos method for computing the singular values and corresponding
    singular vectors of a matrix", https://doi.org/10.1145/355945.355946

    Args:
        jacobian: the matrix.
        k: how many.
        oversample: the size of the basis over k. For 200 values of 3,072 of a trained network, 2.5 left errors of up
            to 1.5e-3 of a value, and 3 of 5e-6.
        probes: random vectors that estimate the energy outside of the basis.
        seed: of all that is random.
        progress: is told how many vectors of the basis there are, and how many there will be.
        parts: where the basis is kept every two minutes, and when the computation is cut off by an exception such as
            that of Ctrl-C. If a part of it is there, the computation goes on from it, to the same bits.
        part: how the names of its parts begin.

    Raises:
        ValueError: if k is not in 1 ... the number of singular values.
        InputError: if a part can't be written.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> jacobian = Jacobian(lambda x: x @ matrix, torch.zeros(1, 3))
        >>> largest_singular_values(jacobian, 2).values.round(decimals=5)
        tensor([3., 2.], dtype=torch.float64)
    """
    limit = min(jacobian.columns, jacobian.rows)
    if not 1 <= k <= limit:
        raise ValueError(f"largest_singular_values: k must be in 1 ... {limit}, got {k}.")
    known = None if parts is None else parts.load(f"values-{part}")
    if known is not None:
        return LargestValues(**known[0], **known[1])
    size = basis_size(jacobian, k, oversample=oversample)
    basis = _Basis(jacobian, size, seed)
    _fill(basis, parts, part, progress)
    v, at = basis.v, basis.at
    left, values, _ = torch.linalg.svd(basis.b.double().cpu())
    residuals = torch.zeros(k, dtype=torch.float64)
    energy, error = float(values.square().sum()), 0.0
    if size < limit:
        outside = _without(at.new, v).double().cpu()
        residuals = (outside.mT @ left[-at.count :, :k]).norm(dim=0)
        signs = torch.randint(0, 2, (probes, jacobian.columns), generator=basis.generator, device=jacobian.device)
        energies = jacobian.times(_without(2.0 * signs.to(jacobian.dtype) - 1, v)).double().square().sum(1).cpu()
        energy += float(energies.mean())
        error = float(energies.std()) / math.sqrt(probes)
    found = LargestValues(values[:k].clone(), residuals, energy, error)
    if parts is not None:
        tensors = {"values": found.values, "residuals": residuals}
        parts.save(f"values-{part}", tensors, energy=energy, energy_error=error)
        parts.remove(f"{part}-")
    return found


@dataclass(frozen=True)
class _At:
    """Where a basis ends, and all that the next block depends on besides it."""

    first: int
    """The number of vectors."""
    count: int
    """How many of them the last block has."""
    scale: float
    """The largest norm of an image."""
    new: Tensor
    """What the next block is made of."""
    random: Tensor
    """The state of the generator."""


class _Basis:
    """Orthonormal rows v and u, with b = u J v^T, which grow by blocks; ``at`` changes when all of a block is there."""

    def __init__(self, jacobian: Jacobian, size: int, seed: int) -> None:
        options = {"dtype": jacobian.dtype, "device": jacobian.device}
        self.jacobian, self.size = jacobian, size
        self.generator = torch.Generator(jacobian.device).manual_seed(seed)
        self.v, self.u = (torch.empty(size, length, **options) for length in (jacobian.columns, jacobian.rows))
        self.b = torch.zeros(size, size, **options)
        new = torch.randn(jacobian.block, jacobian.columns, generator=self.generator, **options)
        self.at = _At(0, 0, 0.0, new, self.generator.get_state())

    def extend(self) -> None:
        """Adds a block."""
        first, new, scale = self.at.first, self.at.new, self.at.scale
        last = min(first + self.jacobian.block, self.size)
        v, u = self.v, self.u
        v[first:last] = _directions(new[: last - first], v[:first], scale, self.generator)
        images = self.jacobian.times(v[first:last])
        scale = max(scale, float(images.norm(dim=1).amax()))
        u[first:last] = _directions(images, u[:first], scale, self.generator)
        self.b[:last, first:last] = u[:last] @ images.mT
        new = self.jacobian.transposed_times(u[first:last])
        self.at = _At(last, last - first, scale, new, self.generator.get_state())

    def save(self, parts: Parts, name: str, start: int) -> None:
        """Writes what has come after the first vectors."""
        at = self.at
        new = {"v": self.v[start : at.first], "u": self.u[start : at.first], "b": self.b[: at.first, start : at.first]}
        parts.save(
            name,
            {**new, "new": at.new, "random": at.random},
            start=start,
            first=at.first,
            count=at.count,
            scale=at.scale,
        )

    def load(self, parts: Parts, name: str) -> bool:
        """Takes up what was saved under this name, if it goes on where the basis ends."""
        found = parts.load(name)
        if found is None or found[1]["start"] != self.at.first:
            return False
        tensors, plain = found
        start, first = plain["start"], plain["first"]
        self.v[start:first], self.u[start:first], self.b[:first, start:first] = (tensors[key] for key in "vub")
        self.at = _At(first, plain["count"], plain["scale"], tensors["new"].to(self.v), tensors["random"].clone())
        self.generator.set_state(self.at.random)
        return True


def _fill(basis: _Basis, parts: Parts | None, part: str, progress: Progress | None) -> None:
    """Makes the basis as large as it should be, from what is kept of it."""
    number = 0
    while parts is not None and basis.load(parts, f"{part}-{number}"):
        number += 1
    kept, since = basis.at.first, time.monotonic()
    try:
        while basis.at.first < basis.size:
            basis.extend()
            if parts is not None and time.monotonic() - since > SAVE_EVERY:
                basis.save(parts, f"{part}-{number}", kept)
                number, kept, since = number + 1, basis.at.first, time.monotonic()
            if progress:
                progress(basis.at.first, basis.size)
    except BaseException:
        if parts is not None and basis.at.first > kept:
            basis.save(parts, f"{part}-{number}", kept)
        raise


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    """What of the rows is orthogonal to a basis. Once leaves rounding errors, which a second time removes."""
    for _ in range(2):
        rows = rows - (rows @ basis.mT) @ basis
    return rows


def _directions(rows: Tensor, basis: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """As many orthonormal rows outside of the basis: they span what the rows have there, and random directions."""
    _, sizes, found = torch.linalg.svd(_without(rows, basis), full_matrices=False)
    missing = sizes <= 100 * torch.finfo(rows.dtype).eps * max(scale, float(sizes[0]))
    found[missing] = torch.randn(found[missing].shape, generator=generator, dtype=rows.dtype, device=rows.device)
    for _ in range(2):
        found = torch.linalg.qr(_without(found, basis).mT).Q.mT
    return found
