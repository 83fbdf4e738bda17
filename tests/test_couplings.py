"""What the laws cannot say of the transforms and of conditions: oracles, extremes, precision, bits on a grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible import (
    Affine,
    Conditional,
    Coupling,
    RationalQuadraticSpline,
    Recompute,
    Reconstruct,
    Store,
    VolumePreserving,
)
from invertible.testing import check, check_backprop
from tests.networks import METHODS, outcome, with_strategy
from tests.rows import ConditionalTanh
from tests.rows_transforms import Strong

SCALES = {
    "half-to-one": lambda a: 0.5 + 0.5 / (1 + math.exp(-a - 2)),
    "sigmoid": lambda a: 1 / (1 + math.exp(-a - 2)),
    "exp-clamped": lambda a: math.exp(2 * math.tanh(a / 2)),
}
TRANSFORMS = {
    **{scale: lambda scale=scale: Affine(scale=scale) for scale in SCALES},
    "volume preserving": VolumePreserving,
    "spline": RationalQuadraticSpline,
    "additive": inv.Additive,
}
each_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
EXTREMES = [0.0, 1e-30, -1e-30, 1.0, -2.0, 30.0, -30.0, 1e4, -1e4, 1e38, -1e38]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Affine


@pytest.mark.parametrize("scale", SCALES)
def test_affine_equals_its_definition(scale):
    """First all scales, then all shifts."""
    x, parameters = normal(2, 3, 2, dtype=torch.float64), 2 * normal(2, 6, 2, seed=1, dtype=torch.float64)
    y, log_det = Affine(scale=scale).forward_and_log_det(x, parameters)
    for n in range(2):
        total = 0.0
        for c in range(3):
            for i in range(2):
                s = SCALES[scale](parameters[n, c, i].item())
                total += math.log(s)
                assert math.isclose(y[n, c, i], s * x[n, c, i] + parameters[n, 3 + c, i], abs_tol=1e-12)
        assert math.isclose(log_det[n], total, abs_tol=1e-12)


def test_the_clamp_of_the_exponential():
    a = torch.tensor([[-1e9, -1.0, 0.0, 1e9]])
    transform = Affine(scale="exp-clamped", clamp=0.5)
    parameters = torch.cat((a, torch.zeros_like(a)), 1)
    _, log_det = transform.forward_and_log_det(torch.ones(1, 4), parameters)
    scales = transform(torch.ones(1, 4), parameters).log()
    assert torch.allclose(scales, torch.tensor([[-0.5, -0.5 * math.tanh(2), 0, 0.5]]))
    assert torch.allclose(log_det, scales.sum(1))


@pytest.mark.parametrize("scale", SCALES)
def test_the_logarithm_of_a_scale_keeps_its_digits(scale):
    """Near 1 it is small, and 1 - s has lost them; near 0 it is large, and s may be nothing."""
    a = torch.tensor([-80.0, -15.0, -2.0, 0.0, 5.0, 14.0, 40.0, 80.0])[:, None]
    parameters = torch.cat((a, torch.zeros_like(a)), 1)
    transform, one = Affine(scale=scale), torch.ones(8, 1)
    single = transform.forward_and_log_det(one, parameters)[1].double()
    # Of what is σ(-82) below 1, double precision keeps the logarithm by the same formula alone.
    u = a.double()[:, 0] + 2
    expected = {
        "half-to-one": torch.log1p(-0.5 / (1 + u.exp())),
        "sigmoid": -torch.log1p((-u).exp()),
        "exp-clamped": 2 * torch.tanh(a.double()[:, 0] / 2),
    }[scale]
    assert torch.allclose(single, expected, rtol=1e-5, atol=1e-37)


@each_transform
def test_extreme_parameters_give_numbers(make):
    """Values, log-determinants, gradients; where an inverse is beyond single precision it may be infinite."""
    transform = make()
    count, x = transform.parameters_per_element, torch.tensor([[0.5, -2.0]])
    for first in EXTREMES:
        parameters = torch.full((1, 2 * count), 0.0)
        parameters[:, : 2 * count - 2] = first
        parameters.requires_grad_()
        y, log_det = transform.forward_and_log_det(x, parameters)
        back, back_log_det = transform.inverse_and_log_det(x, parameters)
        results = [y, log_det, back_log_det] + [back] * (make is not TRANSFORMS["sigmoid"])
        (grad,) = torch.autograd.grad(sum(t.sum() for t in results), parameters)
        assert all(t.isfinite().all() for t in (*results, grad)), first


# Precision


@each_transform
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(make, dtype):
    """Within a few roundings of what double precision makes of the same numbers."""
    transform = make()
    x, parameters = (
        normal(2, 4, 3).to(dtype),
        normal(2, 4 * transform.parameters_per_element, 3, seed=1).to(dtype),
    )
    step = torch.finfo(dtype).eps * (
        16 if make is RationalQuadraticSpline else 1
    )  # it magnifies what its knots are off by
    for method in (transform.forward_and_log_det, transform.inverse_and_log_det):
        y, log_det = method(x, parameters)
        expected, expected_log_det = method(x.double(), parameters.double())
        assert y.dtype == log_det.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=8 * step, atol=8 * step)
        torch.testing.assert_close(log_det.double(), expected_log_det, rtol=8 * step, atol=8 * step)


@each_transform
def test_parameters_from_autocast_are_computed_in_single_precision(make):
    transform = make()
    torch.manual_seed(0)
    function = nn.Linear(4, 4 * transform.parameters_per_element)
    coupling, x = Coupling(function, transform), (normal(3, 4), normal(3, 4, seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        parameters = function(x[1])
        assert parameters.dtype == torch.bfloat16
        (_, y), log_det = coupling.forward_and_log_det(x)
        back, back_log_det = coupling.inverse_and_log_det((x[1], y))
    expected, expected_log_det = transform.forward_and_log_det(x[0].double(), parameters.double())
    assert y.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det.double(), expected_log_det, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back[0], x[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back_log_det, -log_det, rtol=1e-4, atol=1e-4)


@each_transform
def test_a_batch_of_zero(make):
    transform = make()
    for shape in ((0, 2), (0, 2, 3, 3)):
        x = torch.zeros(shape)
        parameters = torch.zeros(0, 2 * transform.parameters_per_element, *shape[2:])
        for method in (transform.forward_and_log_det, transform.inverse_and_log_det):
            y, log_det = method(x, parameters)
            assert y.shape == shape
            assert log_det.shape == (0,)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward-mode formulas
@pytest.mark.parametrize("make", [Affine, VolumePreserving, RationalQuadraticSpline])
def test_whole_graphs_and_transformations(make):
    """``torch.compile(fullgraph=True)``, ``vmap`` over samples, forward mode, second derivatives."""
    torch.compiler.reset()
    transform = make()
    torch.manual_seed(0)
    coupling = Coupling(nn.Linear(2, 2 * transform.parameters_per_element), transform).double().eval()
    x = normal(3, 2, dtype=torch.float64), normal(3, 2, seed=1, dtype=torch.float64)

    def both(a, b):
        (y1, y2), log_det = coupling.forward_and_log_det((a, b))
        (x1, _), other = coupling.inverse_and_log_det((y1, y2 + 1))
        return x1 + log_det[:, None] * other[:, None]

    expected = both(*x)
    torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True)(*x), expected)
    mapped = torch.func.vmap(lambda a, b: both(a[None], b[None])[0])(*x)
    torch.testing.assert_close(mapped, expected)
    _, tangent = torch.func.jvp(both, x, (torch.ones_like(x[0]), torch.ones_like(x[1])))
    step = 1e-6
    numeric = (both(x[0] + step, x[1] + step) - both(x[0] - step, x[1] - step)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-7)
    inputs = [t[:1].clone().requires_grad_() for t in x]
    assert torch.autograd.gradgradcheck(both, inputs, fast_mode=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@each_transform
def test_inductor_makes_the_same(make):
    torch.compiler.reset()
    transform = make()
    torch.manual_seed(0)
    function = nn.Conv2d(2, 2 * transform.parameters_per_element, 3, padding=1)
    coupling = Coupling(function, transform).eval()
    x = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    for method in METHODS:
        call = getattr(coupling, method)
        torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x), rtol=1e-4, atol=1e-4)


# Volume preserving


def test_volume_preserving_equals_its_definition():
    x, parameters = normal(2, 4, 2, dtype=torch.float64), 2 * normal(2, 8, 2, seed=1, dtype=torch.float64)
    y = VolumePreserving(max_scale=3)(x, parameters)
    for n in range(2):
        for pair in range(2):
            for i in range(2):
                r = parameters[n, 2 * pair, i].item()
                u = r / math.sqrt(1 + r * r) / 2
                s = (1 + u) / (1 - u)
                assert 1 / 3 < s < 3
                a, b = x[n, 2 * pair, i], x[n, 2 * pair + 1, i]
                assert math.isclose(y[n, 2 * pair, i], s * a + parameters[n, 4 + 2 * pair, i], abs_tol=1e-12)
                assert math.isclose(y[n, 2 * pair + 1, i], b / s + parameters[n, 5 + 2 * pair, i], abs_tol=1e-12)


def stack(depth, channels=4, grid="exact", backprop=None, kind=VolumePreserving):
    torch.manual_seed(depth)
    functions = [
        nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 2 * channels, 3, padding=1))
        for _ in range(depth)
    ]
    return inv.Sequential(
        inv.Split(), *(Coupling(f, kind()) for f in functions), inv.Merge(), grid=grid, backprop=backprop
    )


@pytest.mark.parametrize("grid", ["exact", "exact32"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_lifting_pair_comes_back_bit_for_bit(grid, train, autocast):
    net, x = stack(30, grid=grid).train(train), normal(3, 8, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, log_det = net.forward_and_log_det(x)
        assert torch.equal(net.inverse(y), net.snap(x))
    assert torch.equal(log_det, torch.zeros(3, dtype=log_det.dtype))
    assert net.exactness is inv.Exactness.EXACT


@given(
    st.integers(0, 999),
    st.sampled_from([1.01, 2.0, 10.0]),
    st.sampled_from([(40, torch.float64), (16, torch.float32), (3, torch.float64)]),
)
@settings(max_examples=25)
def test_on_a_grid_the_values_are_those_of_the_formula(seed, max_scale, form):
    """To within steps of the grid; whatever the parameters, the inverse is bit for bit, and so is the other round."""
    grid, transform = inv.Grid(*form), VolumePreserving(max_scale=max_scale)
    on_grid = transform._on_grid(grid, None)
    x, parameters = grid.round(4 * normal(2, 6, 3, seed=seed)), 3 * normal(2, 12, 3, seed=seed + 1)
    parameters[0, 0] = torch.tensor([3e38, -3e38, 1e-40])
    y = on_grid(x, parameters)
    assert torch.equal(grid.round(y), y)
    assert torch.equal(on_grid.inverse(y, parameters), x)
    assert torch.equal(on_grid(on_grid.inverse(x, parameters), parameters), x)
    exact = transform(x.double(), parameters.double())
    rounding = torch.finfo(grid.dtype).eps * 16 * max_scale**2  # of products, which on a coarse grid is nothing
    assert ((y.double() - exact).abs() <= grid.step * (2 + 2 * max_scale**2) + rounding).all()


SAVING = [Recompute(), Recompute(every=3), Reconstruct(), Reconstruct(anchor_every=2), Reconstruct(locate=True)]


@pytest.mark.parametrize("strategy", SAVING, ids=repr)
@pytest.mark.parametrize(("grid", "autocast"), [("exact", False), ("exact32", True)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_the_lifting_pair_have_the_bits_of_stored_activations(strategy, grid, autocast, layout):
    net, x = stack(5, grid=grid), normal(3, 8, 4, 4).contiguous(memory_format=layout)

    def found(strategy):
        context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        return outcome(with_strategy(net, strategy), x, autocast=context)[0]

    expected, other = found(Store()), found(strategy)
    for key, value in expected.items():
        assert torch.equal(other[key], value), key


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_passes_the_rounding(method):
    """On a fine grid it is that without a grid; what is not read has none."""
    net = stack(3).double().eval()
    x = normal(2, 8, 3, 3, dtype=torch.float64)
    expected, _ = outcome(with_strategy(net, Store()), x, method=method)
    net.grid = None
    plain, _ = outcome(net, x, method=method)
    for key, value in plain.items():
        if value is not None and value.is_floating_point():
            torch.testing.assert_close(expected[key], value, rtol=1e-6, atol=1e-7)


def test_the_scale_of_an_element_does_not_depend_on_its_place():
    """Vectorised exponentials and those for the rest of a loop differ in the last bit; this has none."""
    grid, transform = inv.Grid(45), VolumePreserving(max_scale=3)
    on_grid = transform._on_grid(grid, None)
    x, parameters = grid.round(normal(67, 2, 3)), normal(67, 4, 3, seed=1)
    whole = on_grid(x, parameters)
    for i in range(67):
        assert torch.equal(on_grid(x[i : i + 1], parameters[i : i + 1]), whole[i : i + 1])


def test_the_range_of_the_sums_in_between_is_checked():
    net = inv.Sequential(Coupling(nn.Linear(2, 4), VolumePreserving()), grid=inv.Grid(16, torch.float32))
    nn.init.zeros_(net[0].function.weight)
    nn.init.zeros_(net[0].function.bias)
    x = torch.tensor([[200.0, 100.0]]), torch.zeros(1, 2)
    with pytest.raises(inv.StreamRangeError, match="got 300"):
        net(x)


class UsersAdditive(inv.Additive):
    def forward(self, x, parameters):
        return x + 2 * parameters

    def inverse(self, y, parameters):
        return y - 2 * parameters


class UsersPair(VolumePreserving):
    def forward(self, x, parameters):
        return super().forward(x, 2 * parameters)


@pytest.mark.parametrize("kind", [UsersAdditive, UsersPair, Affine, RationalQuadraticSpline])
def test_other_transforms_are_refused_on_a_grid(kind):
    with pytest.raises(ValueError, match=r"every layer must keep its values on the grid, got layer '0', Coupling\(\)"):
        inv.Sequential(Coupling(nn.Tanh(), kind()), grid="exact")


def test_a_transform_that_only_says_it_keeps_the_grid_has_no_arithmetic():
    class Hopeful(Affine):
        keeps_grid = True

    net = inv.Sequential(Coupling(nn.Linear(2, 4), Hopeful()), grid="exact")
    with pytest.raises(TypeError, match=r"Hopeful\(.*\): there is no exact arithmetic for this transform on a grid"):
        net((torch.ones(1, 2), torch.ones(1, 2)))


def test_odd_channels_are_refused_before_buffers_move():
    coupling = Coupling(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6)), VolumePreserving())
    for method in METHODS:
        with pytest.raises(ValueError, match="the number of channels must be even"):
            getattr(coupling, method)(
                (torch.rand(2, 3), torch.rand(2, 4)) if method.startswith("f") else (torch.rand(2, 4), torch.rand(2, 3))
            )
    assert coupling.function[0].num_batches_tracked == 0


# The spline


def softmax(values):
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def defined_spline(x, numbers, spline):
    """One element by the paper: knots, then Eq. (4), and its derivative, Eq. (5)."""
    bins, bound = spline.bins, spline.bound
    if not -bound <= x <= bound:
        return x, 1.0

    def knots(logits, least):
        shares = [least + (1 - bins * least) * p for p in softmax(logits)]
        return [-bound + 2 * bound * sum(shares[:k]) for k in range(bins + 1)]

    xs, ys = knots(numbers[:bins], spline.min_width), knots(numbers[bins : 2 * bins], spline.min_height)
    limit = -math.log(spline.min_derivative)
    ds = [1.0, *(math.exp(limit * math.tanh(r / limit)) for r in numbers[2 * bins :]), 1.0]
    k = max(i for i in range(bins) if x >= xs[i])
    s, xi = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k]), (x - xs[k]) / (xs[k + 1] - xs[k])
    below = s + (ds[k + 1] + ds[k] - 2 * s) * xi * (1 - xi)
    y = ys[k] + (ys[k + 1] - ys[k]) * (s * xi**2 + ds[k] * xi * (1 - xi)) / below
    above = s**2 * (ds[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + ds[k] * (1 - xi) ** 2)
    return y, above / below**2


def defined_inverse(y, numbers, spline):
    """By bisection, which needs no formula."""
    low, high = -spline.bound, spline.bound
    if not low <= y <= high:
        return y
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if defined_spline(middle, numbers, spline)[0] < y else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("bins", [1, 2, 5])
def test_the_spline_equals_its_definition(bins):
    spline = RationalQuadraticSpline(bins=bins, bound=2)
    count = spline.parameters_per_element
    x = 2 * normal(3, 2, 2, dtype=torch.float64)
    parameters = 1.5 * normal(3, 2 * count, 2, seed=bins, dtype=torch.float64)
    y, log_det = spline.forward_and_log_det(x, parameters)
    back, back_log_det = spline.inverse_and_log_det(x, parameters)
    for n in range(3):
        total = back_total = 0.0
        for c in range(2):
            for i in range(2):
                numbers = parameters[n, c::2, i].tolist()  # parameter-major
                value, derivative = defined_spline(x[n, c, i].item(), numbers, spline)
                assert math.isclose(y[n, c, i], value, abs_tol=1e-12)
                total += math.log(derivative)
                inverse = defined_inverse(x[n, c, i].item(), numbers, spline)
                assert math.isclose(back[n, c, i], inverse, abs_tol=1e-9)
                back_total -= math.log(defined_spline(inverse, numbers, spline)[1])
                step = 1e-6
                numeric = [defined_spline(x[n, c, i].item() + e, numbers, spline)[0] for e in (step, -step)]
                if abs(abs(x[n, c, i]) - 2) > step:
                    assert math.isclose(derivative, (numeric[0] - numeric[1]) / (2 * step), rel_tol=1e-4)
        assert math.isclose(log_det[n], total, abs_tol=1e-10)
        assert math.isclose(back_log_det[n], back_total, abs_tol=1e-6)


def test_a_spline_of_zeros_is_the_identity():
    x = torch.linspace(-4, 4, 50)[:, None]
    y, log_det = RationalQuadraticSpline().forward_and_log_det(x, torch.zeros(50, 23))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_det, torch.zeros(50), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 10.0, 100.0, 1e10, 3e38])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_adversarial_splines_in_single_precision(size, seed):
    """Flat beside steep bins, elements at knots, at the bound and beside them: no NaN, monotonic, and it comes back.

    What comes back is compared in y: a flat bin has many x for one y.
    """
    spline = RationalQuadraticSpline(bound=4)
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(23, generator=generator) * 2 - 1).sign() * torch.rand(23, generator=generator) * size
    xs, ys = (spline._knots(numbers[None, a : a + 8, None], 1e-3)[0, :, 0] for a in (0, 8))
    assert (xs.diff() > 0).all()
    assert (ys.diff() > 0).all()
    places = torch.cat((torch.linspace(-5, 5, 101), xs, ys, torch.tensor([3e38, -3e38, 0.0, -0.0, 1e-45])))
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    x = torch.cat((places, torch.nextafter(places, up), torch.nextafter(places, down))).clamp(-3e38, 3e38).unique()
    x = x.sort()[0][:, None]
    parameters = numbers.expand(len(x), 23).clone().requires_grad_()
    leaf = x.clone().requires_grad_()
    y, log_det = spline.forward_and_log_det(leaf, parameters)
    back, back_log_det = spline.inverse_and_log_det(leaf, parameters)
    results = [y, log_det, back, back_log_det]
    grads = torch.autograd.grad([t.clamp(-10, 10).sum() for t in results], [leaf, parameters])
    assert all(t.isfinite().all() for t in (*results, *grads))
    inside = x.abs() <= 4
    assert (y[inside].abs() <= 4 + 1e-6).all()
    assert torch.equal(y[~inside], x[~inside])
    assert (y.diff(dim=0) >= -2e-6).all()
    again = spline(back, parameters)
    assert ((again - x).abs()[inside] < 2e-3).all()
    double = spline(back.double(), parameters.double())
    assert ((double - x.double()).abs()[inside] < 2e-3).all()


def test_no_discriminant_is_negative_where_peers_have_one():
    """Slopes and derivatives at both limits: the quadratic formula's difference of squares is negative for many."""
    spline = RationalQuadraticSpline(bins=2, bound=1, min_width=1e-3, min_height=1e-3, min_derivative=1e-3)
    y = torch.linspace(-1, 1, 20001)[:, None]
    for widths, heights, derivative in [
        (90.0, -90.0, -90.0),
        (-90.0, 90.0, 90.0),
        (90.0, -90.0, 90.0),
        (0.0, 0.0, -90.0),
    ]:
        parameters = torch.tensor([[widths, -widths, heights, -heights, derivative]]).expand(len(y), 5)
        x, log_det = spline.inverse_and_log_det(y, parameters)
        assert x.isfinite().all()
        assert log_det.isfinite().all()
        assert (x.diff(dim=0) >= -1e-6).all()
        torch.testing.assert_close(spline(x.double(), parameters.double()), y.double(), atol=3e-4, rtol=0)


# Compositions


def hint(channels, depth):
    """HINT: the halves are transformed likewise, and then one by the other."""
    if depth == 0 or channels < 2:
        return inv.Identity()
    half = channels // 2
    rest = channels - half
    return inv.Sequential(
        inv.Split(channels=half),
        inv.Swap(),
        inv.Parallel(hint(rest, depth - 1), inv.Identity()),
        Coupling(Strong(half, 2 * rest, 1, gain=1), Affine()),
        inv.Parallel(hint(half, depth - 1), inv.Identity()),
        inv.Merge(channels=half),
    )


def test_recursive_couplings_keep_the_laws():
    torch.manual_seed(0)
    net, x = hint(5, 3).double(), normal(2, 5, 2, dtype=torch.float64)
    check(net, x)
    check_backprop(net, x)
    jacobian = torch.autograd.functional.jacobian(lambda t: net(t.view(1, 5, 1)).view(-1), x[0, :, 0])
    assert (jacobian.tril().diagonal() != 0).all()
    assert torch.equal(jacobian.triu(1), torch.zeros(5, 5, dtype=torch.float64))
    assert (jacobian.tril() != 0).sum() > 12  # of 15: nearly every channel sees all before it


# Conditions


def test_a_condition_is_joined_to_the_channels():
    function, seen = nn.Identity(), []
    function.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, vector, image = normal(2, 3, 4, 5), normal(2, 2, seed=1), normal(2, 1, 4, 5, seed=2)
    Conditional(function)(x, vector)
    Conditional(function)(x, image)
    assert torch.equal(seen[0], torch.cat((x, vector[:, :, None, None].expand(2, 2, 4, 5)), 1))
    assert torch.equal(seen[1], torch.cat((x, image), 1))
    last = x.contiguous(memory_format=torch.channels_last)
    Conditional(function)(last, vector.double())
    assert seen[2].is_contiguous(memory_format=torch.channels_last)
    assert seen[2].dtype == torch.float32
    Conditional(function)(x[:, :, 0, 0], torch.tensor([[1], [0]]))
    assert torch.equal(seen[3][:, 3], torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    "condition", [normal(2, 3, 4), normal(3, 2), normal(2), normal(2, 2, 4, 1), (normal(2, 2),), 3]
)
def test_wrong_conditions_are_refused_before_the_function_runs(condition):
    function = nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1))
    coupling, x = Coupling(Conditional(function)), (normal(2, 3, 4, 5), normal(2, 3, 4, 5))
    words = (
        "stream of shape (2, 3, 4, 5), got a tensor of shape"
        if isinstance(condition, torch.Tensor)
        else "a tensor, got"
    )
    with pytest.raises((ValueError, TypeError)) as error:
        coupling(x, condition=condition)
    assert words in str(error.value)
    assert function[0].num_batches_tracked == 0


def test_a_missing_condition_is_said_at_once():
    needing = nn.Sequential(nn.BatchNorm1d(3))
    needing.forward = lambda x, condition: None
    for function in (Conditional(nn.Linear(5, 3)), ConditionalTanh(), needing):
        net = inv.Sequential(inv.Split(), Coupling(function), inv.Merge())
        for method in METHODS:
            with pytest.raises(TypeError, match=r"the function needs a condition, got None\. Pass it to the network"):
                getattr(net, method)(torch.ones(2, 6))


class Labelled(nn.Module):
    """Encodes labels and a smaller image, in bits that a batch does not change."""

    def __init__(self):
        super().__init__()
        self.label, self.image = nn.Embedding(5, 2), nn.Conv2d(1, 2, 1)

    def forward(self, condition):
        label, image = condition
        larger = nn.functional.interpolate(torch.tanh(self.image(image)), scale_factor=2.0)
        return larger + self.label(label)[:, :, None, None]


def conditioned(grid=None, backprop=None):
    torch.manual_seed(1)
    encoder = Labelled()

    def coupling(transform):
        count = 2 * transform.parameters_per_element
        return Coupling(
            Conditional(nn.Sequential(nn.Conv2d(4, count, 3, padding=1), nn.Tanh()), encoder=encoder), transform
        )

    inner = inv.Sequential(inv.Split(), coupling(VolumePreserving()), coupling(inv.Additive()), inv.Merge())
    branches = inv.Parallel(inner, inv.Inverse(inv.Sequential(inv.Split(), coupling(VolumePreserving()), inv.Merge())))
    return inv.Sequential(inv.Split(), branches, inv.Merge(), grid=grid, backprop=backprop)


@pytest.mark.parametrize("grid", [None, "exact", "exact32"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("strategy", [Recompute(), Reconstruct()], ids=repr)
def test_gradients_reach_the_condition_and_its_encoder(grid, autocast, strategy):
    """Labels have no gradient, images have, through Sequential, Parallel and Inverse."""
    x, label = normal(3, 8, 4, 4), torch.tensor([0, 4, 2])

    def trained(strategy):
        net, image = conditioned(grid, strategy), normal(3, 1, 2, 2, seed=5).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x, condition=(label, image))
            with torch.no_grad():
                back = net.inverse(y.detach(), condition=(label, image))
        (y.double() * torch.linspace(1, 2, 8)[:, None, None]).sum().backward()
        return y, back, [image.grad, *(p.grad for p in net.parameters())]

    y, back, grads = trained(Store())
    assert all(g is not None and g.any() for g in grads)
    other_y, _, other_grads = trained(strategy)
    assert torch.equal(y, other_y)
    for a, b in zip(grads, other_grads, strict=True):
        # A shared encoder's gradient is a sum, whose order may be another; without a grid bf16 flips bits.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if not autocast or grid else 0.1)
    if grid is None:
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4 if not autocast else 0.1)
    else:
        assert torch.equal(back, conditioned(grid).snap(x))


def test_one_encoder_output_for_many_couplings():
    """As the documentation advises: encoded once, outside."""
    torch.manual_seed(0)
    encoder = nn.Linear(7, 2)
    net = inv.Sequential(inv.Split(), *(Coupling(Conditional(nn.Linear(4, 2))) for _ in range(3)), inv.Merge())
    net.backprop = Reconstruct()
    net(normal(3, 4), condition=encoder(normal(3, 7))).sum().backward()
    assert encoder.weight.grad.any()
