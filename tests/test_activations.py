"""Activations at the ends of their ranges, and against torch's own."""

import copy
import math

import numpy as np
import pytest
import torch

import invertible as inv
from invertible import Inverse, InvertibleLinear, Recompute, Reconstruct, Sequential
from tests.networks import assert_same, outcome, with_strategy
from tests.rows_mixing import PARAMETRIZATIONS

LAYERS = {
    "leaky": inv.LeakyReLU(0.1),
    "sigmoid": inv.Sigmoid(),
    "tanh": inv.Tanh(),
    "softplus": inv.Softplus(),
    "affine": inv.ConstantAffine([2.0, -0.5, 3.0], 1.0),
}
each = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
METHODS = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det")


class Method(torch.nn.Module):
    def __init__(self, layer, method):
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, value):
        return getattr(self.layer, self.method)(value)


def test_values_are_those_of_torch():
    x = torch.linspace(-5, 5, 12, dtype=torch.float64).view(2, 3, 2)
    assert torch.equal(inv.LeakyReLU(0.2)(x), torch.nn.functional.leaky_relu(x, 0.2))
    assert torch.equal(inv.Sigmoid()(x), x.sigmoid())
    assert torch.equal(inv.Tanh()(x), x.tanh())
    torch.testing.assert_close(inv.Softplus()(x), torch.nn.functional.softplus(x))
    torch.testing.assert_close(Inverse(inv.Sigmoid())(x.sigmoid()), torch.logit(x.sigmoid()))
    scale, shift = torch.tensor([2.0, -0.5, 3.0]).view(3, 1), 1.0
    torch.testing.assert_close(LAYERS["affine"](x), x * scale + shift)
    assert torch.equal(inv.ConstantAffine(-2.0, [0.0, 1.0, 2.0])(x)[:, 2], -2 * x[:, 2] + 2)


def test_constants_of_many_kinds():
    x = torch.ones(1, 2)
    for scale in (2, [2.0, 2.0], (2, 2), torch.tensor(2.0), torch.tensor([2.0, 2.0]), np.float32(2), np.full(2, 2.0)):
        assert inv.ConstantAffine(scale, -1)(x).tolist() == [[1.0, 1.0]]
    moved = inv.ConstantAffine(1e-8)
    assert moved.to_empty(device="meta").to(torch.float16).scale.is_meta
    with pytest.raises(ValueError, match=r"scale must not be zero, got \[1e-60\]"):
        inv.ConstantAffine(1e-60)  # as float32 holds it


@pytest.mark.parametrize("x", [-300.0, -50.0, -20.0, 0.0, 20.0, 50.0, 300.0])
def test_log_determinants_far_out(x):
    """Where the slope itself is 0 or 1 to rounding, its logarithm is not lost."""
    far = abs(x) + 2 * math.log1p(math.exp(-abs(x)))  # of sigmoid and, at twice x, of tanh
    expected = {
        "sigmoid": -far,
        "tanh": 2 * math.log(2) - 2 * (abs(x) + math.log1p(math.exp(-2 * abs(x)))),
        "softplus": min(x, 0.0) - math.log1p(math.exp(-abs(x))),
    }
    for name, value in expected.items():
        for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            wide = torch.tensor([[x]], dtype=dtype)
            found = LAYERS[name].forward_and_log_det(wide)[1]
            torch.testing.assert_close(found, torch.tensor([value], dtype=dtype), rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("layer", "low", "high"), [(inv.Sigmoid(), -87, 9.6), (inv.Tanh(), -5.9, 5.9), (inv.Softplus(), -87, 1e4)]
)
def test_what_the_docs_say_comes_back_in_float32(layer, low, high):
    x = torch.linspace(low, high, 4001).view(1, -1)
    assert ((layer.inverse(layer(x)) - x).abs() <= 1e-3 + 1e-6 * x.abs()).all()


@pytest.mark.parametrize(("layer", "x"), [(inv.Sigmoid(), 17.0), (inv.Tanh(), -10.0), (inv.Softplus(), -105.0)])
def test_what_saturates_is_refused(layer, x):
    y = layer(torch.tensor([[0.0, x]]))
    with pytest.raises(ValueError, match=r"What saturates in forward can't be undone"):
        layer.inverse(y)


def test_softplus_is_exact_where_torch_is_linear():
    x = torch.tensor([[20.5, 30.0, 39.9, 40.1]], dtype=torch.float64)
    exact = x + torch.log1p(torch.exp(-x))
    torch.testing.assert_close(inv.Softplus()(x), exact, rtol=1e-15, atol=0)
    torch.testing.assert_close(inv.Softplus().inverse(exact), x, rtol=1e-15, atol=0)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(layer, dtype):
    x = torch.linspace(-2, 2, 12).view(2, 3, 2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = layer.forward_and_log_det(x)
        back, inverse_log_det = layer.inverse_and_log_det(y)
    assert {t.dtype for t in (y, log_det, back, inverse_log_det)} == {dtype}
    _, exact = layer.forward_and_log_det(x.double())
    atol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(back, x, atol=atol, rtol=0)
    torch.testing.assert_close(log_det.double(), exact, atol=atol, rtol=0)
    torch.testing.assert_close(inverse_log_det.double(), -exact, atol=20 * atol, rtol=0.01)


@each
def test_a_batch_of_zero(layer):
    y, log_det = layer.forward_and_log_det(torch.zeros(0, 3, 4))
    x, _ = layer.inverse_and_log_det(y)
    assert x.shape == (0, 3, 4)
    assert log_det.shape == (0,)


@each
def test_compiles_whole(layer):
    torch.compiler.reset()
    x = torch.randn(2, 3, 4)
    for method in METHODS:
        value = x if method.startswith("forward") else layer(x)
        found = torch.compile(Method(layer, method), backend="aot_eager", fullgraph=True)(value)
        torch.testing.assert_close(found, getattr(layer, method)(value))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check")  # torch's own, in its lowering of diagonal
def test_inductor_compiles_a_step_of_all_layers_together():
    """In training, after the first batch."""
    mixes = [InvertibleLinear(3, parametrization=kind) for kind in PARAMETRIZATIONS]
    norms = [inv.ActNorm(3), inv.BatchNorm(3)]
    net = Sequential(*norms, *mixes, *LAYERS.values()).double()
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    net.forward_and_log_det(x)
    torch.compiler.reset()
    expected, _ = outcome(net, x, method="forward_and_log_det")
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin.forward_and_log_det, fullgraph=True)
    found, _ = outcome(twin, x, method="forward_and_log_det", copies=False, compiled=compiled)
    assert_same(found, expected, 1e-10)


@each
def test_function_transforms_and_second_derivatives(layer):
    x = (torch.rand(2, 2, 3, 2, dtype=torch.float64) + 0.1) * torch.tensor([1.0, -1.0])
    for method in METHODS:
        call = getattr(layer, method)
        value = x if method.startswith("forward") else torch.stack([layer(each) for each in x])
        found = torch.func.vmap(call)(value)
        for a, b in zip(found, call(value[0]), strict=True) if isinstance(found, tuple) else [(found, call(value[0]))]:
            torch.testing.assert_close(a[0], b)
        assert torch.autograd.gradgradcheck(call, value[0].clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("method", ["forward", "forward_and_log_det", "inverse"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softplus"])
def test_saturated_values_have_the_gradients_of_store(name, method):
    """Far out they could not come back from the output: the input is kept."""
    net = Sequential(InvertibleLinear(3), LAYERS[name], InvertibleLinear(3)).double()
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    x = 30 * x if method.startswith("forward") else net(x).detach()
    expected, _ = outcome(net, x, method=method)
    for strategy in (Reconstruct(on_drift="record"), Recompute()):
        found, _ = outcome(with_strategy(net, strategy), x, method=method)
        assert_same(found, expected, 1e-12)
