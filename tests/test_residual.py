"""Residual blocks: bounds that hold, inverses that converge or say so, log-determinants that are right on average."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import invertible as inv
from invertible import ConvergenceError, Coupling, Merge, Recompute, Reconstruct, Residual, Sequential, Split
from invertible._lipschitz import ACTIVATIONS, SLACK, constant_of, operator_bound
from invertible._log_det import by_series, roulette
from invertible._value import leaves
from invertible.testing import check, log_det_matches_autograd
from tests.networks import METHODS, assert_same, outcome, with_strategy
from tests.rows_residual import CONV, function


def noise(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def block(channels=2, dims=0, *, large=2.0, hidden=3, **options):
    """A block whose weights are scaled, and whose Jacobian is far from zero."""
    layer = Residual(function(channels, dims, nn.SiLU(), hidden=hidden), **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(large)
    return layer


def dense(map_, x):
    """The Jacobian of one sample's map."""
    return torch.autograd.functional.jacobian(lambda v: map_(v.view_as(x)).flatten(), x.flatten())


SMOOTH = [
    *(kind() for kind in ACTIVATIONS),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.ELU(),
    nn.ELU(1.5),
    nn.LeakyReLU(0.1),
    nn.LeakyReLU(-2.0),
    nn.CELU(0.5),
    nn.Softplus(beta=3),
    nn.Hardtanh(-3, 2),
]


@pytest.mark.parametrize("layer", SMOOTH, ids=repr)
def test_slopes_of_activations(layer):
    """The table's constant is the largest difference quotient, rounded up."""
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    slope = float((layer(x).diff() / x.diff()).abs().max())
    assert slope - 1e-9 <= constant_of(layer) <= slope * (1 + 1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 4), (7, 3), (40, 60)])
def test_bound_of_a_matrix(size):
    layer = nn.Linear(*size).double()
    norm, bound = torch.linalg.svdvals(layer.weight)[0], operator_bound(layer, layer.weight)
    assert norm <= bound <= norm * SLACK[1]
    single = operator_bound(layer, layer.weight.float())
    assert norm <= single <= norm * SLACK[1] * (1 + 1e-4)
    if max(size) < 10:
        torch.autograd.gradcheck(lambda w: operator_bound(layer, w), layer.weight)


OPTIONS = [
    {"padding": 1},
    {"padding": 2},
    {"padding": 0},
    {"padding": 1, "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": 1, "groups": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "circular", "dilation": 2},
    {"padding": 1, "padding_mode": "circular", "stride": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize(("dims", "kernel"), [(1, 3), (1, 4), (2, 3), (2, 2), (2, (1, 3)), (3, 2)])
def test_bound_of_a_convolution(dims, kernel, options):
    """Above the norm at every size of image, and near the largest."""
    if kernel in {2, 4} and options["padding"] == 2 and "dilation" not in options:
        options = {**options, "padding": 1}
    circular = options.get("padding_mode") == "circular"
    if circular and (kernel in {2, (1, 3)}) and options["padding"] == 1:
        options = {**options, "padding": 0}
    layer = CONV[dims](2, 4, kernel, bias=False, **options).double()
    bound = operator_bound(layer, layer.weight)
    for size in (4, 5, 7) if dims < 3 else (4,):
        shape = (1, 2, *[size] * dims)
        matrix = dense(layer, torch.zeros(shape, dtype=torch.float64))
        assert torch.linalg.svdvals(matrix)[0] <= bound
    kernels = layer.weight.detach().view(layer.groups, -1, *layer.weight.shape[1:])
    symbol = torch.fft.fftn(kernels, s=[64 if dims < 3 else 16] * dims, dim=tuple(range(3, 3 + dims)))
    limit = torch.linalg.svdvals(symbol.flatten(3).movedim(3, 0)).max()
    assert bound <= limit * SLACK[0] * SLACK[1]


def test_bound_between_the_samples():
    """Few samples see the least of a kernel whose largest frequency is between them; the correction covers it."""
    kernel = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    layer = nn.Conv1d(1, 1, 3, bias=False).double()
    worst = math.inf
    for phase in torch.linspace(0, math.pi, 50):
        wave = torch.tensor([math.cos(phase), math.sin(phase), -math.cos(phase)], dtype=torch.float64)
        for weight in (kernel + wave, wave):
            fine = torch.fft.fft(weight, 4096).abs().max()
            worst = min(worst, float(operator_bound(layer, weight.view(1, 1, 3)) / fine))
    assert worst >= 1 - 1e-6
    assert worst <= SLACK[0]


def test_weights_are_scaled_only_if_they_must():
    layer = Residual(nn.Linear(4, 4), lipschitz=0.5).double()
    x = noise(3, 4)
    with torch.no_grad():
        layer.function.weight.copy_(0.25 * torch.eye(4))
    torch.testing.assert_close(layer(x), 1.25 * x + layer.function.bias, rtol=0, atol=1e-15)
    assert 0.25 <= layer.lipschitz_bound() <= 0.25 * 1.02
    with torch.no_grad():
        layer.function.weight.mul_(100)
    assert layer.lipschitz_bound() == 0.5
    assert 0.5 / 1.02 <= torch.linalg.svdvals(dense(layer, x[:1]) - torch.eye(4))[0] <= 0.5
    layer(x).sum().backward()
    assert layer.function.weight.grad.isfinite().all()


@pytest.mark.parametrize("dims", [0, 1, 2])
def test_function_is_a_contraction(dims):
    layer = block(2, dims, large=10.0, lipschitz=0.7)
    assert layer.lipschitz_bound() <= 0.7 + 1e-9
    x = noise(1, 2, *[4] * dims)
    jacobian = dense(layer, x) - torch.eye(x.numel())
    assert 0.1 < torch.linalg.svdvals(jacobian)[0] <= 0.7
    nested = Residual(nn.Sequential(layer.function, nn.Sequential(nn.Tanh(), layer.function)), lipschitz=0.7)
    assert nested.lipschitz_bound() <= 0.7 + 1e-9  # weights that come twice count twice
    assert torch.linalg.svdvals(dense(nested, x) - torch.eye(x.numel()))[0] <= 0.7


def test_a_weight_that_is_shared_is_bounded_for_all_its_uses():
    """As groups of two channels it has the norm 2, and as one map √8."""
    first, middle, last = nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 2, 1), nn.Conv1d(2, 4, 1)
    last.weight = first.weight
    with torch.no_grad():
        nn.init.ones_(first.weight)
        nn.init.ones_(middle.weight)
    for layers, channels in (((first, middle, last), 4), ((last, first, middle), 2)):
        layer = Residual(nn.Sequential(*layers), lipschitz=0.9).double()
        jacobian = dense(layer, noise(1, channels, 1)) - torch.eye(channels)
        assert 0.4 < torch.linalg.svdvals(jacobian)[0] <= layer.lipschitz_bound() <= 0.9 + 1e-9


def test_zero_weights_have_gradients():
    layer = block(2, 1)
    for p in layer.parameters():
        nn.init.zeros_(p)
    x = noise(2, 2, 4)
    y, log_det = layer.forward_and_log_det(x)
    (y.sum() + log_det.sum()).backward()
    assert torch.equal(y, x)
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert torch.equal(layer.inverse(x), x)
    assert layer.solved.iterations == 1


def test_functions_of_many_shapes():
    x = noise(2, 4, 4, 4)
    for inner in (
        nn.Sequential(nn.Conv2d(4, 8, 2, stride=2), nn.SiLU(), nn.Conv2d(8, 16, 1), nn.PixelShuffle(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 64), nn.Unflatten(1, (4, 4, 4))),
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(inplace=True)),
        nn.Linear(4, 4),
        nn.Hardsigmoid(),
    ):
        layer, before = Residual(inner).double(), x.clone()
        torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-10)
        assert torch.equal(x, before)


# The inverse


def test_what_the_inverse_took():
    layer = block(3, tolerance=1e-6)
    assert layer.solved is None
    x = noise(4, 3)
    y = layer(x)
    coarse = layer.inverse(y)
    first = layer.solved
    assert first.guaranteed
    assert float((coarse - x).square().mean(1).sqrt().detach().max()) <= first.error <= 1e-6
    layer.tolerance = 1e-10
    layer.inverse(y)
    assert layer.solved.iterations > first.iterations
    promised = Residual(layer.function, lipschitz=None)
    with torch.no_grad():
        for p in promised.parameters():
            p.mul_(0.1)
    torch.testing.assert_close(promised.inverse(promised(x)), x, rtol=0, atol=1e-10)
    assert not promised.solved.guaranteed


def test_the_error_is_proved_where_the_iteration_is_slow():
    """Each step goes the same way, and brings the error down by the bound and no more."""
    layer = Residual(nn.Linear(3, 3), lipschitz=0.9, tolerance=1e-6).double()
    with torch.no_grad():
        layer.function.weight.copy_(-2 * torch.eye(3))
    x = noise(4, 3)
    off = (layer.inverse(layer(x)) - x).square().mean(1).sqrt().detach().max()
    assert 0.5 * layer.solved.error <= off <= layer.solved.error <= 1e-6


class Rates(nn.Module):
    """Multiplies, by itself: each element has its own rate."""

    def forward(self, x):
        return 0.4 * x.sin() * x.abs().clamp(max=2)


def test_a_sample_does_not_wait_for_others():
    """The same bits, whatever the others need."""
    layer = Residual(Rates(), lipschitz=None)
    fast, slow = torch.full((1, 3), 1e-3, dtype=torch.float64), torch.full((1, 3), -1.5, dtype=torch.float64)
    alone = layer.inverse(fast)
    few = layer.solved.iterations
    assert torch.equal(layer.inverse(torch.cat((fast, slow)))[:1], alone)
    assert layer.solved.iterations > few


def test_an_inverse_that_does_not_converge():
    layer = block(3, max_iterations=3)
    with pytest.raises(ConvergenceError, match=r"did not converge in 3 iterations: 2 of 2 samples may be off by up to"):
        layer.inverse(noise(2, 3))
    assert layer.solved.iterations == 3
    doubling = Residual(nn.Linear(2, 2, bias=False), lipschitz=None, max_iterations=500)
    with torch.no_grad():
        doubling.function.weight.copy_(2 * torch.eye(2))
    with pytest.raises(ConvergenceError, match=r"values that are not finite after \d+ iterations, 1 of 2 samples"):
        doubling.inverse(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    with pytest.raises(ConvergenceError, match=r"not finite after \d+ iterations, 1 of 2 samples"):
        block(3).inverse(torch.tensor([[0.0, 0.0, 0.0], [1.0, math.nan, 1.0]]))
    assert issubclass(ConvergenceError, RuntimeError)


def test_gradients_of_the_inverse_need_no_graph_of_the_iteration():
    layer = block(2, 1)
    y = noise(2, 2, 4).requires_grad_()
    sizes = []
    for tolerance in (1e-1, 1e-12):
        layer.tolerance = tolerance
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            layer.inverse(y)
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1]
    x = layer.inverse(y)
    found = torch.autograd.grad(x.sin().sum(), [y, *layer.parameters()])
    again = x.detach().requires_grad_()
    loss = torch.autograd.grad(again.sin().sum(), again)[0]
    jacobian = torch.stack([dense(layer, x[i : i + 1].detach()) for i in range(2)])
    solved = torch.linalg.solve(jacobian.mT, loss.flatten(1)).view_as(y)
    expected = torch.autograd.grad(layer(x.detach()), list(layer.parameters()), -solved)
    for a, b in zip(found, (solved, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_values_and_gradients_whose_squares_are_no_numbers(size):
    layer = block(2, lipschitz=0.5, tolerance=1e-40).float()
    layer.function[0].bias = layer.function[2].bias = None
    x = noise(3, 2, dtype=torch.float32)
    linear = Residual(nn.Linear(2, 2, bias=False), lipschitz=0.5, tolerance=1e-40)
    torch.testing.assert_close(linear.inverse(linear(size * x)) / size, x, rtol=1e-5, atol=1e-5)
    y = x.requires_grad_()
    one = torch.autograd.grad(layer.inverse(y).sum(), y)[0]
    found = torch.autograd.grad((size * layer.inverse(y)).sum(), y)[0]
    torch.testing.assert_close(found / size, one, rtol=1e-4, atol=1e-5)


def test_gradients_that_overflow_go_through():
    layer = block(2)
    y = noise(2, 2).requires_grad_()
    layer.inverse(y).backward(torch.tensor([[math.inf, 1.0], [1.0, 1.0]], dtype=torch.float64))
    assert not y.grad[0].isfinite().all()
    assert y.grad[1].isfinite().all()


def test_the_inverse_is_differentiated_once():
    layer = block(2)
    y = noise(2, 2).requires_grad_()
    with pytest.raises(RuntimeError, match=r"the inverse has no second derivatives \(create_graph=True\)"):
        torch.autograd.grad(layer.inverse(y).sum(), y, create_graph=True)


# The log-determinant


def jacobians(layer, x):
    return torch.stack([dense(layer, x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("terms", [1, 2, 5, 20])
def test_series_is_off_by_its_remainder(terms):
    layer = block(2, 1, lipschitz=0.6, terms=terms, probes="all")
    x = noise(3, 2, 4)
    expected = jacobians(layer, x).slogdet().logabsdet
    off = float((layer.forward_and_log_det(x)[1] - expected).detach().abs().max())
    d, rate = x[0].numel(), layer.lipschitz
    assert off <= d * rate ** (terms + 1) / (terms + 1) / (1 - rate)
    assert off > 0 or terms == 20


def value_and_gradient(layer, x):
    """The log-determinant of one sample, and its gradient in one direction."""
    log_det = layer.forward_and_log_det(x)[1].sum()
    return torch.stack([log_det.detach(), torch.autograd.grad(log_det, layer.function[0].weight)[0].sum()])


@pytest.mark.parametrize("options", [{"terms": 30}, {"log_det": "roulette", "terms": 1}], ids=repr)
def test_estimates_are_right_on_average(options):
    """Of 4000 probes; the roulette, one throw for each batch, of 400 batches."""
    exact = block(3, lipschitz=0.5, log_det="exact")
    x = noise(1, 3)
    expected = value_and_gradient(exact, x)
    layer = Residual(exact.function, lipschitz=0.5, **options)
    size = 400 if layer.log_det == "roulette" else 40
    layer.probes = 4000 // size
    torch.manual_seed(1)
    found = torch.stack([value_and_gradient(layer, x) for _ in range(size)])
    error = found.std(0) / size**0.5
    assert (error < 0.1).all()
    assert ((found.mean(0) - expected).abs() <= 4 * error).all()


@pytest.mark.parametrize(("lipschitz", "expected"), [(0.3, 0.5), (0.8, 0.8), (None, 0.9)])
def test_the_roulette_goes_on_as_the_bound_says(monkeypatch, lipschitz, expected):
    seen = []
    monkeypatch.setattr("invertible.residual.roulette", lambda terms, go_on, **_: seen.append(go_on) or [1.0] * terms)
    Residual(nn.Linear(2, 2), lipschitz=lipschitz, log_det="roulette").forward_and_log_det(torch.zeros(1, 2))
    assert seen == [expected]


def test_roulette_has_the_weights_of_its_probabilities():
    torch.manual_seed(0)
    runs = [roulette(2, 0.6) for _ in range(4000)]
    for k in range(1, 8):
        present = torch.tensor([weights[k - 1] if len(weights) >= k else 0.0 for weights in runs])
        assert abs(present.mean() - 1) <= 4 * present.std() / len(runs) ** 0.5 + 1e-9
    assert all(weights[:2] == [1.0, 1.0] for weights in runs)


def test_terms_have_their_weights_in_value_and_gradient():
    weights = [1.0, 2.5, 0.5, 4.0]
    matrix, x = (0.5 * noise(3, 3)).requires_grad_(), noise(2, 3)
    found = by_series(lambda x: x @ matrix.T, x, weights, probes=None)[1]
    traces = [torch.linalg.matrix_power(matrix, k).trace() for k in range(1, 5)]
    expected = sum(-((-1) ** k) * w / k * trace for k, (w, trace) in enumerate(zip(weights, traces, strict=True), 1))
    torch.testing.assert_close(found, expected.expand(2))
    grads = [torch.autograd.grad(each[0], matrix)[0] for each in (found, expected.expand(2))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", [{"log_det": "exact"}, {"terms": 40, "probes": "all"}], ids=repr)
def test_gradients_are_those_of_slogdet(options):
    layer = block(2, 1, lipschitz=0.4, **options)
    x = noise(2, 2, 3).requires_grad_()
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(layer.forward_and_log_det(x)[1].sum(), wanted, materialize_grads=True)
    total = 0
    for sample in x.split(1):
        f = torch.autograd.functional.jacobian(layer, sample, create_graph=True)
        total = total + f.reshape(6, 6).slogdet().logabsdet
    expected = torch.autograd.grad(total, wanted, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_memory_does_not_grow_with_the_terms():
    x = noise(2, 2, 4).requires_grad_()
    sizes = []
    for terms in (1, 12):
        layer, saved = block(2, 1, terms=terms), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            layer.forward_and_log_det(x)
        sizes.append(sum(saved))
    # What the products of the terms look at is freed with them; hooks see it all, in one evaluation.
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("log_det", ["series", "roulette", "exact"])
def test_without_gradients_nothing_else_is_found(log_det):
    layer = block(2, 1, log_det=log_det)
    x = noise(2, 2, 4)

    def seeded(call, value):
        torch.manual_seed(3)
        return call(value)

    expected = seeded(layer.forward_and_log_det, x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            given = x.clone()
            y, value = seeded(layer.forward_and_log_det, given)
            back, minus = seeded(layer.inverse_and_log_det, y)
            assert not any(t.requires_grad for t in (y, value, given))
        torch.testing.assert_close((y.clone(), value.clone()), tuple(t.detach() for t in expected))
        torch.testing.assert_close((back.clone(), minus.clone()), (x, -value.clone()))
    fired = []
    x = (x + 0).requires_grad_()
    x.register_hook(fired.append)
    layer.forward_and_log_det(x)
    assert x.grad is None
    assert not fired
    assert all(p.grad is None for p in layer.parameters())


def test_what_inference_mode_has_made_is_taken():
    layer = block(2)
    with torch.inference_mode():
        x = noise(3, 2)
    expected = layer.forward_and_log_det(noise(3, 2))[0]
    found, log_det = layer.forward_and_log_det(x)
    assert torch.equal(found, expected)
    log_det.sum().backward()
    assert layer.function[0].weight.grad is not None


def test_constant_function_has_no_log_determinant():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    for options in ({}, {"log_det": "exact"}):
        y, log_det = Residual(Constant(), lipschitz=None, **options).forward_and_log_det(torch.zeros(2, 3))
        assert torch.equal(y, torch.ones(2, 3))
        assert torch.equal(log_det, torch.zeros(2))


# Among other layers, in other precisions


@pytest.mark.parametrize("log_det", ["series", "roulette"])
def test_estimates_keep_the_other_laws(log_det):
    layer = block(2, 1, log_det=log_det, lipschitz=0.5)
    assert layer.stochastic
    check(layer, noise(2, 2, 3), exempt=[log_det_matches_autograd])


@pytest.mark.parametrize("method", METHODS)
def test_trains_among_couplings_under_every_strategy(method):
    """The replay throws the same probes."""

    def coupling():
        return [Split(), Coupling(nn.Sequential(nn.Linear(2, 2), nn.Tanh())), Merge()]

    kinds = [block(4, lipschitz=0.5, log_det=kind) for kind in ("series", "roulette")]
    net = Sequential(*coupling(), kinds[0], *coupling(), kinds[1], *coupling()).double()
    x = noise(3, 4)
    expected, _ = outcome(net, x, method=method)
    for strategy in (Recompute(every=2), Reconstruct(), inv.Budget(2**20)):
        found, _ = outcome(with_strategy(net, strategy), x, method=method)
        assert_same(found, expected, 1e-9)


def test_dtypes_and_autocast():
    layer = block(2, 1).float()
    x = noise(3, 2, 5, dtype=torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
        torch.testing.assert_close(layer.inverse(expected), x, rtol=0, atol=1e-5)
        assert layer.forward_and_log_det(x)[1].dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(layer.inverse(y).float(), x, rtol=0, atol=0.1)
        half = copy.deepcopy(layer).to(dtype)
        assert half(x.to(dtype)).dtype == dtype
        assert half.forward_and_log_det(x.to(dtype))[1].dtype == dtype
    assert layer(x.double()).dtype == torch.float64


def test_empty_batches_and_images():
    for options in ({}, {"log_det": "exact"}, {"log_det": "roulette", "probes": "all"}):
        layer = block(2, 1, **options)
        for size in ((0, 2, 4),):
            x = torch.zeros(size, dtype=torch.float64, requires_grad=True)
            y, log_det = layer.forward_and_log_det(x)
            back, minus = layer.inverse_and_log_det(y)
            assert (y.shape, back.shape) == (size, size)
            assert log_det.shape == minus.shape == (size[0],)
            (back.sum() + minus.sum() + log_det.sum()).backward()
        assert layer.solved.iterations == 0


def test_no_data():
    """On the meta device one step stands for all of them."""
    layer = block(2, 2).to("meta")
    x = torch.zeros(3, 2, 4, 4, device="meta", dtype=torch.float64)
    for method in METHODS:
        result = getattr(layer, method)(x)
        assert (result[0] if isinstance(result, tuple) else result).shape == x.shape


def test_a_copy_has_what_the_last_inverse_took():
    layer = block(2)
    layer.inverse(noise(1, 2))
    assert pickle.loads(pickle.dumps(layer)).solved == copy.deepcopy(layer).solved == layer.solved  # noqa: S301
    assert set(layer.state_dict()) == {
        f"function.{i}.{name}" for i, name in itertools.product((0, 2), ("weight", "bias"))
    }


@pytest.mark.parametrize("log_det", ["series", "roulette", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_block_returns_what_needs_no_gradient(log_det, method):
    """The solution and the Jacobian are differentiated at a tensor of the layer's own: its graph was handed out."""
    layer, x = block(log_det=log_det), noise(4, 2)
    made = getattr(layer, method)(x)
    frozen = getattr(layer.requires_grad_(False), method)(x)
    for t, f in zip(leaves(made), leaves(frozen), strict=True):
        assert t.requires_grad
        assert not f.requires_grad
    for t in leaves(getattr(layer, method)(x.requires_grad_())):
        assert t.requires_grad


def test_hooks_inside_the_function_fire():
    layer, seen = block(2), []
    layer.function[0].register_forward_hook(lambda *_: seen.append(1))
    layer(noise(1, 2))
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch's own forward mode
def test_what_is_no_one_graph_is_refused():
    layer, x = block(2), noise(3, 2)
    words = "is no one graph, and can't be exported, traced or run under torch.func"
    for call in (layer.inverse, layer.forward_and_log_det):
        with pytest.raises(RuntimeError, match=words):
            torch.func.vmap(call)(x[None])
    with pytest.raises(RuntimeError, match=words):
        torch.func.jvp(layer.inverse, (x,), (x,))
    torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0], layer(x))
    assert torch.func.jacrev(layer)(x).shape == (3, 2, 3, 2)


@pytest.mark.slow  # the compiler takes seconds
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which the compiler asks for at a break
def test_compiled_with_gradients():
    layer = block(2, 1, log_det="exact")
    x = noise(3, 2, 4)
    for method in METHODS:
        torch._dynamo.reset()
        expected, _ = outcome(layer, x, method=method)
        compiled = torch.compile(getattr(layer, method), backend="aot_eager")
        found, _ = outcome(layer, x, method=method, copies=False, compiled=compiled)
        assert_same(found, expected, 1e-9)
