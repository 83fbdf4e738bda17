"""What the laws compare with what, and how."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from invertible._value import Value, describe, leaves, map_value
from invertible.module import Exactness, InvertibleModule

Layer = InvertibleModule[Any, Any]


def fail(message: str) -> None:
    raise AssertionError(message)


def assert_close(module: Layer, actual: Value, expected: Value, atol: float | None, message: str) -> None:
    if describe(actual) != describe(expected):
        fail(f"{message}: {describe(actual)}, expected {describe(expected)}")
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        assert_near(a, b, 0.0 if module.exactness is Exactness.EXACT else atol, message)


def assert_near(actual: Tensor, expected: Tensor, atol: float | None, message: str) -> None:
    rtol = None if atol is None else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda detail: f"{message}\n{detail}"
    )


def gradcheck(module: nn.Module, call: Callable[[Value], Value], value: Value) -> None:
    """Compares autograd with finite differences, for the input and for the parameters inside."""
    value = map_value(lambda t: t.detach().clone().requires_grad_(), value)
    inputs = list(leaves(value))

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:  # gradcheck moves the parameters in place
        given = iter(tensors)
        return tuple(leaves(call(map_value(lambda _: next(given), value))))

    parameters = [p for p in module.parameters() if p.requires_grad and p.dtype == torch.float64]
    torch.autograd.gradcheck(flat, (*inputs, *parameters), fast_mode=True)


def under_one_seed(call: Callable[[], Any]) -> Any:
    """Returns ``call()``, with the same random numbers each time; the caller's stream stays where it is."""
    with cast("Any", torch.random).fork_rng():
        torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
        return call()


def directions(module: Layer, x: Value, condition: Value | None) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields the methods of both directions by name; those of the log-determinant, if the layer has one."""
    yield "forward", module
    yield "inverse", module.inverse
    try:  # a missing one is the business of log_det_matches_autograd
        copy.deepcopy(module).forward_and_log_det(map_value(torch.clone, x), condition=condition)
    except (NotImplementedError, ValueError):
        return
    yield "forward_and_log_det", module.forward_and_log_det
    yield "inverse_and_log_det", module.inverse_and_log_det


def part_of(condition: Tensor, sample: int, batch: int) -> Tensor:
    """A sample's part of a condition; all of it, if it is one for all."""
    return condition[sample : sample + 1] if condition.ndim and len(condition) == batch else condition


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def moved(y: Value) -> Value:
    """An output as nobody computed it: each element moved by up to a tenth, integers by one."""

    def move(t: Tensor) -> Tensor:
        t = t.detach()
        return t + 0.1 * torch.rand_like(t) if t.is_floating_point() or t.is_complex() else t ^ 1

    return map_value(move, y)


def snapped(module: Layer, value: Value) -> Value:
    """A value on the module's grid, if it has one: no other one comes back bit for bit."""
    return value if module.grid is None else map_value(module.grid.round, value)


def describe_form(value: Value) -> str:
    return "; ".join(f"{t.dtype} on {t.device} with batch {len(t)}" for t in leaves(value))


def as_channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


def has_layout(x: Tensor) -> bool:
    """Whether contiguous and channels-last are two layouts: not with one channel, nor with one pixel."""
    return x.ndim in (4, 5) and x.shape[1] > 1 and x.shape[2:].numel() > 1


def is_channels_last(x: Tensor) -> bool:
    return has_layout(x) and x.stride(1) == 1


def fingerprint(x: Tensor) -> tuple[Any, ...]:
    return x._version, x.data_ptr(), x.untyped_storage().nbytes(), x.requires_grad, x.shape, x.stride()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in (*module.named_parameters(), *module.named_buffers())}


def assert_same_state(module: nn.Module, before: dict[str, Tensor], message: str) -> None:
    for key, value in tensors_of(module).items():
        if not equal(value, before[key]):
            fail(f"{message}: {key}")


def slogdet(module: Layer, x: Value, sample: int, condition: Value | None) -> Tensor:
    """Half of log det JᵀJ for one sample, by autograd: log|det J| where J is square."""
    one = map_value(lambda t: t[sample : sample + 1].detach(), x)
    batch = len(next(leaves(x)))
    own = None if condition is None else map_value(lambda t: part_of(t, sample, batch), condition)

    def flat(vector: Tensor) -> Tensor:
        rest = [vector]

        def take(t: Tensor) -> Tensor:
            head, rest[0] = rest[0][: t.numel()], rest[0][t.numel() :]
            return head.view_as(t)

        return torch.cat([t.flatten() for t in leaves(module(map_value(take, one), condition=own))])

    start = torch.cat([t.flatten() for t in leaves(one)])
    if not start.is_floating_point():
        return torch.zeros((), device=start.device)  # a map between integers has no Jacobian; by convention 0
    jacobian = cast("Tensor", cast("Any", torch.autograd.functional).jacobian(flat, start)).double()
    if jacobian.shape[0] == jacobian.shape[1]:
        return jacobian.slogdet()[1]
    return (jacobian.T @ jacobian).slogdet()[1] / 2


def distance(a: Value, b: Value) -> Tensor:
    """How far apart two values are; for integers, the root of how many elements differ."""
    squares = [
        (s - t).abs().double().square().sum() if s.is_floating_point() or s.is_complex() else (s != t).double().sum()
        for s, t in zip(leaves(a), leaves(b), strict=True)
    ]
    return torch.stack(squares).sum().sqrt()
