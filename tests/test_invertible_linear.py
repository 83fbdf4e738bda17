"""Matrices over the channels, against their definitions in float64."""

from functools import partial

import pytest
import torch

import invertible as inv
from invertible.testing import check_backprop
from tests.rows_mixing import PARAMETRIZATIONS, disturbed
from tests.test_export import exported

each = pytest.mark.parametrize("kind", PARAMETRIZATIONS)


def made(kind, channels=4, size=0.3):
    return disturbed(inv.InvertibleLinear(channels, parametrization=kind), size).double()


def defined(mix):
    """The matrix, by its textbook definition."""
    values = mix.matrix.values.detach()
    one = torch.eye(mix.channels, dtype=torch.float64)
    if mix.parametrization == "plu":
        permutation = one[mix.matrix.order]
        lower = values.tril(-1) + one
        upper = values.triu(1) + torch.diag(mix.matrix.sign * values.diagonal().exp())
        return permutation @ lower @ upper
    if mix.parametrization == "householder":
        product = one
        for v in values.T:
            product = product @ (one - 2 * torch.outer(v, v) / v.dot(v))
        return product
    if mix.parametrization == "matrix-exponential":
        term = total = one
        for k in range(1, 60):
            term = term @ values / k
            total = total + term
        return total
    return values


@each
@pytest.mark.parametrize("size", [(), (3,), (2, 3), (2, 1, 3)])
def test_matches_its_definition(kind, size):
    mix = made(kind)
    weight = defined(mix)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    y, log_det = mix.forward_and_log_det(x)
    torch.testing.assert_close(mix.dense(), weight)
    torch.testing.assert_close(y, torch.einsum("cd,bd...->bc...", weight, x))
    pixels = x[0, 0].numel()
    torch.testing.assert_close(log_det, (pixels * torch.linalg.slogdet(weight)[1]).repeat(2))
    back, inverse_log_det = mix.inverse_and_log_det(y)
    torch.testing.assert_close(back, torch.einsum("cd,bd...->bc...", torch.linalg.inv(weight), y))
    torch.testing.assert_close(inverse_log_det, -log_det)


@each
def test_the_matrix_is_computed_in_float32_under_autocast(kind):
    mix = made(kind).float()
    expected = mix.dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mix.dense(), expected)


@each
def test_starts_as_a_rotation_that_a_seed_repeats(kind):
    torch.manual_seed(3)
    mix = inv.InvertibleLinear(8, parametrization=kind)
    torch.manual_seed(3)
    again = inv.InvertibleLinear(8, parametrization=kind)
    weight = mix.dense()
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), atol=1e-5, rtol=0)
    assert weight.diagonal().abs().max() < 0.99  # and not the identity
    assert torch.equal(weight, again.dense())
    again.reset_parameters()
    assert not torch.equal(weight, again.dense())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision(kind, dtype, autocast):
    """At least float32 inside, whatever comes in, and under autocast the same bits."""
    mix = made(kind, 16, 0.05).float()
    x = torch.randn(3, 16, 5)
    expected, log_det = mix.forward_and_log_det(x.to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, found = mix.forward_and_log_det(x.to(dtype))
        back, _ = mix.inverse_and_log_det(y)
    assert y.dtype == found.dtype == back.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(found, log_det)
    torch.testing.assert_close(back, x.to(dtype), atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)
    exact, _ = made_double(mix).forward_and_log_det(x.to(dtype).double())
    torch.testing.assert_close(y.double(), exact, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


def made_double(mix):
    twin = inv.InvertibleLinear(mix.channels, parametrization=mix.parametrization).double()
    twin.load_state_dict(mix.state_dict())
    return twin


@each
def test_wide_inputs_are_computed_wide(kind):
    mix = made(kind).float()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(mix.inverse(mix(x)), x, atol=1e-12, rtol=0)


@each
def test_parameters_in_16_bits(kind):
    mix = made(kind).bfloat16()
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(mix.inverse(mix(x)), x, atol=1e-5, rtol=0)


@each
@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0)])
def test_nothing_in_nothing_out(kind, shape):
    mix = made(kind).float()
    y, log_det = mix.forward_and_log_det(torch.zeros(shape))
    x, _ = mix.inverse_and_log_det(y)
    assert y.shape == x.shape == shape
    assert log_det.shape == shape[:1]
    assert not log_det.any()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_reflections_at_vectors_of_any_length(scale):
    mix = inv.InvertibleLinear(4, parametrization="householder")
    with torch.no_grad():
        mix.matrix.values[:, 1] *= scale
    weight = mix.dense()
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(weight.square().mul(torch.arange(4)).sum(), mix.matrix.values)
    assert gradient.isfinite().all()


def test_reflections_stay_orthogonal():
    """However they are trained: 64 channels in float32."""
    mix = disturbed(inv.InvertibleLinear(64, parametrization="householder"), 30.0)
    weight = mix.dense().double()
    assert (weight @ weight.T - torch.eye(64)).abs().max() < 5e-6


@each
def test_second_derivatives(kind):
    mix = made(kind, 3)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    values = mix.matrix.values.detach().clone().requires_grad_()

    def call(run, x, values):
        return torch.func.functional_call(run, {"layer.matrix.values": values}, (x,))

    for method in (mix.forward_and_log_det, mix.inverse_and_log_det):
        assert torch.autograd.gradgradcheck(partial(call, _Method(mix, method)), (x, values), fast_mode=True)


class _Method(torch.nn.Module):
    def __init__(self, layer, method):
        super().__init__()
        self.layer, self.method = layer, method.__name__

    def forward(self, x):
        return getattr(self.layer, self.method)(x)


@each
def test_compiles_whole(kind):
    torch.compiler.reset()
    mix = made(kind).float()
    x = torch.randn(2, 4, 3, 3)
    for method in (mix.forward_and_log_det, mix.inverse_and_log_det):
        for form in (x, x.contiguous(memory_format=torch.channels_last)):
            found = torch.compile(_Method(mix, method), backend="aot_eager", fullgraph=True)(form)
            for a, b in zip(found, method(form), strict=True):
                torch.testing.assert_close(a, b)


@each
def test_trains_under_every_strategy_and_exports(kind):
    net = inv.Sequential(*(made(kind) for _ in range(3)))
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    check_backprop(net, x)
    again = exported(_Method(net, net.inverse_and_log_det), x)
    other = torch.randn(5, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(again(other), net.inverse_and_log_det(other))


@each
def test_function_transforms(kind):
    mix = made(kind)
    x = torch.randn(5, 2, 4, 3, dtype=torch.float64)
    for method in (mix.forward, mix.inverse):
        expected = torch.stack([method(each) for each in x])
        torch.testing.assert_close(torch.func.vmap(method)(x), expected)
    jacobian = torch.func.jacrev(mix)(x[0, :1, :, :1]).squeeze()
    torch.testing.assert_close(jacobian, mix.dense())


@each
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_any_default_dtype(kind, default):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        mix = inv.InvertibleLinear(3, parametrization=kind)
    finally:
        torch.set_default_dtype(before)
    assert mix.matrix.values.dtype == default


@each
def test_made_without_data_first(kind):
    with torch.device("meta"):
        mix = inv.InvertibleLinear(3, parametrization=kind)
        assert mix.inverse(mix(torch.zeros(2, 3, 5))).shape == (2, 3, 5)
    mix = mix.to_empty(device="cpu")
    mix.reset_parameters()
    x = torch.randn(2, 3)
    torch.testing.assert_close(mix.inverse(mix(x)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("key", "value"), [("order", [0, 0, 1]), ("sign", [1.0, 0.0, 1.0])])
def test_a_corrupt_checkpoint_is_refused(key, value):
    mix = inv.InvertibleLinear(3)
    state = mix.state_dict() | {f"matrix.{key}": torch.tensor(value)}
    with pytest.raises(ValueError, match=f"InvertibleLinear: matrix.{key} must be"):
        mix.load_state_dict(state)
