"""Bounds on Lipschitz constants that can be proved, and functions scaled to keep below one."""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "SLACK", "constant_of", "operator_bound", "scaled_weights", "walk"]

_linalg = cast("Any", torch.linalg)

SLACK = 1.05, 1.02
"""How far above the norm a bound is at most: by sampling frequencies, and by ending the Gram iteration."""

ACTIVATIONS: dict[type[nn.Module], float] = {
    nn.CELU: 1.0,
    nn.Hardsigmoid: 1 / 6,
    nn.Hardswish: 1.5,
    nn.Hardtanh: 1.0,
    nn.LogSigmoid: 1.0,
    nn.Mish: 1.0884982,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.SELU: 1.7580994,
    nn.SiLU: 1.0998394,
    nn.Sigmoid: 0.25,
    nn.Softplus: 1.0,
    nn.Softshrink: 1.0,
    nn.Softsign: 1.0,
    nn.Tanh: 1.0,
    nn.Tanhshrink: 1.0,
}
"""The largest slope of each activation, rounded up."""

_MOVING = (nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
"""They only move elements within a sample."""

_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def walk(function: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers of a function in the order of computation, with their keys; a ``Sequential`` is entered."""
    if cast("object", type(function)) is not nn.Sequential:
        yield prefix, function
        return
    # named_children leaves out what comes twice
    parts = cast("Iterator[tuple[str, nn.Module]]", function.named_modules(remove_duplicate=False))
    for key, part in parts:
        if key and "." not in key:
            yield from walk(part, f"{prefix}.{key}" if prefix else key)


def constant_of(layer: nn.Module) -> float | None:
    """A Lipschitz constant of a layer without weights; ``None`` if none is known."""
    kind = type(layer)
    if isinstance(layer, nn.Softplus) and layer.threshold < 20:
        return None  # it jumps where it becomes linear
    if isinstance(layer, nn.CELU) and layer.alpha <= 0:
        return None
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind]
    if kind is nn.GELU:
        return 1.1289042 if cast("nn.GELU", layer).approximate == "none" else 1.1289931
    if kind is nn.ELU:
        return max(1.0, abs(float(cast("nn.ELU", layer).alpha)))
    if kind is nn.LeakyReLU:
        return max(1.0, abs(float(cast("nn.LeakyReLU", layer).negative_slope)))
    moves = kind in _MOVING
    if kind is nn.Flatten:
        moves = cast("nn.Flatten", layer).start_dim >= 1
    if kind is nn.Unflatten:
        dim = cast("Any", layer).dim
        moves = isinstance(dim, int) and dim >= 1
    return 1.0 if moves else None


def dims_of(layer: nn.Module) -> int | None:
    """How many spatial dimensions a convolution has; ``None`` for any other layer."""
    return _CONVOLUTIONS.get(cast("Any", type(layer)))


def why_unbounded(layer: nn.Module) -> str | None:
    """The rule that a layer breaks, for an error message; ``None`` if its Lipschitz constant can be bounded."""
    if type(layer) is nn.Linear or dims_of(layer) is not None:
        if "weight" not in dict(layer.named_parameters(recurse=False)):
            return "a weight must be a plain parameter"  # and not what another normalisation makes
        return None if type(layer) is nn.Linear else _why_unbounded_padding(cast("nn.Conv2d", layer))
    if constant_of(layer) is None:
        return "every layer of the function must have a known Lipschitz constant"
    return None


def _why_unbounded_padding(layer: nn.Conv2d) -> str | None:
    if layer.padding_mode == "zeros":
        return None
    if layer.padding_mode != "circular":
        return "a convolution must pad by zeros or circularly"
    spread = zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
    if isinstance(layer.padding, str) or all(2 * p <= d * (k - 1) for p, d, k in cast("Any", spread)):
        return None
    return "a circular padding must not make the output larger than the input"  # its rows would come twice


def scaled_weights(function: nn.Module, limit: float, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The weights of a function, scaled so that it has a Lipschitz constant of at most ``limit``; and a bound on it.

    What the other layers multiply by is shared out equally among the layers with weights. A weight that is small enough
    stays as it is.
    """
    layers = list(walk(function))
    slopes = math.prod([constant_of(layer) or 1.0 for _, layer in layers])  # a list: the compiler knows no other
    weighted = [(key, cast("Any", layer)) for key, layer in layers if constant_of(layer) is None]
    share = (limit / slopes) ** (1 / max(len(weighted), 1))
    # Of a weight that is shared, other groups make another map.
    bounds, used = cast("dict[int, Tensor]", {}), cast("set[tuple[int, int]]", set())
    for _, layer in weighted:
        which, groups = id(layer.weight), getattr(layer, "groups", 1)
        if (which, groups) not in used:
            bound = operator_bound(layer, layer.weight.to(dtype))
            bounds[which] = torch.maximum(bounds[which], bound) if which in bounds else bound
            used.add((which, groups))
    total, weights, done = None, cast("dict[str, Tensor]", {}), cast("dict[int, Tensor]", {})
    for key, layer in weighted:
        which, bound = id(layer.weight), bounds[id(layer.weight)]
        if which not in done:
            done[which] = layer.weight.to(dtype) * (share / bound.clamp(min=share))
        weights[f"{key}.weight" if key else "weight"] = done[which]
        bound = bound.detach().clamp(max=share)
        total = bound if total is None else total * bound
    return weights, torch.tensor(slopes, dtype=dtype) if total is None else slopes * total


def operator_bound(layer: nn.Module, weight: Tensor) -> Tensor:
    r"""An upper bound on the operator norm of a linear layer or a convolution with this weight, at any size of image.

    A convolution with zero padding is a part of that on the whole plane, one with a stride leaves out rows of it, a
    circular one has some of its frequencies: all have at most the norm
    :math:`\sup_\theta \lVert A(\theta) \rVert` of the symbol :math:`A(\theta) = \sum_k W_k e^{i k \theta}`, whatever
    the dilation. Of N samples per dimension the largest is at least
    :math:`\prod \cos(\pi (k - 1) / 2 N)` times that, for kernels of k taps. Proof: for unit vectors u, v and a phase,
    :math:`T(\theta) = \Re(e^{i \varphi} u^* A(\theta) v)` is, in one dimension, a real trigonometric polynomial of
    degree :math:`n = (k - 1) / 2`, once the middle of the kernel is at 0. With M its largest absolute value,
    Bernstein's inequality in Szegő's form, :math:`T'^2 + n^2 T^2 \le n^2 M^2`, says that :math:`\arccos(T / M)` has a
    slope of at most n. A sample is within :math:`\pi / N` of the maximum, so there :math:`T \ge M \cos(\pi n / N)`.
    (Half-integer degrees: in :math:`\theta / 2`.) One dimension after the other gives the product.
    """
    dims = dims_of(layer)
    if dims is None:
        return gram_bound(weight)
    sizes, groups = weight.shape[2:], int(cast("Any", layer).groups)
    samples = [_samples(size, sum([s > 1 for s in sizes])) for size in sizes]
    kernel = weight.view(groups, -1, *weight.shape[1:])  # group, output, input, space
    if math.prod(samples) == 1:
        return gram_bound(kernel.flatten(3).squeeze(3)).amax()
    fft = cast("Any", torch.fft)
    symbol = fft.rfftn(
        kernel, s=samples, dim=tuple(range(3, 3 + dims))
    )  # of a real kernel; the other half is conjugate
    slack = math.prod([math.cos(math.pi * (size - 1) / (2 * n)) for size, n in zip(sizes, samples, strict=True)])
    return gram_bound(symbol.flatten(3).movedim(3, 0)).amax() / slack


def _samples(size: int, dims: int) -> int:
    """How many samples of a dimension are enough for the slack, of which each dimension has its part."""
    if size == 1:
        return 1
    return math.ceil(math.pi * (size - 1) / (2 * math.acos(SLACK[0] ** (-1 / dims))))


def gram_bound(matrices: Tensor) -> Tensor:
    r"""Upper bounds on the largest singular values of matrices, by Gram iteration.

    With :math:`G \leftarrow G^* G`, t times, :math:`\lVert G \rVert_F^{2^{-t}}` is
    :math:`(\sum \sigma_i^{2^{t+1}})^{2^{-t-1}}`: at least the largest, and at most :math:`r^{2^{-t-1}}` times it for r
    singular values. G is divided by its norm each time; the last factor covers rounding.
    """
    rank = min(matrices.shape[-2:])
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mT
    steps = max(0, math.ceil(math.log2(math.log(rank) / math.log(SLACK[1]))) - 1) if rank > 1 else 0
    bound = norm = _frobenius(matrices)
    for step in range(1, steps + 1):
        matrices = matrices / _nonzero(norm)[..., None, None]
        matrices = matrices.mH @ matrices
        norm = _frobenius(matrices)
        bound = bound * _nonzero(norm) ** (2.0**-step)
    return bound * (1 + 4 * torch.finfo(bound.dtype).eps * max(matrices.shape[-2:]))


def _frobenius(matrices: Tensor) -> Tensor:
    return _linalg.vector_norm(matrices, dim=(-2, -1))


def _nonzero(norm: Tensor) -> Tensor:
    return torch.where(norm == 0, 1, norm)
