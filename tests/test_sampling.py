"""What the laws cannot say of downsampling and of noise: the numbers themselves, against definitions written here."""

import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import invertible as inv
from invertible import Augment, Dequantize, Grid, Haar, LeGall53, Pad, PixelUnshuffle, Reconstruct, Sequential
from tests.networks import function, off, outcome, with_strategy
from tests.rows import Scale

WAVELETS = [Haar(), Haar(lifting=True), LeGall53()]
LAYERS = [*WAVELETS, PixelUnshuffle(2, order="checkerboard"), PixelUnshuffle(2, order="patch"), Pad(4, multiple_of=3)]
NOISY = [Augment(2), Dequantize(16)]


def levels(*shape, dtype=torch.float32):
    """Whole numbers from 0 to 15."""
    return torch.randint(0, 16, shape).to(dtype)


# PixelUnshuffle


@given(st.data())
def test_orders_by_the_index_formulas(data):
    """Element by element, against the docstring's formulas in any number of dimensions."""
    order = data.draw(st.sampled_from(["checkerboard", "patch"]))
    factors = data.draw(
        st.lists(st.sampled_from([2, 4] if order == "checkerboard" else [1, 2, 3]), max_size=3, min_size=1)
    )
    channels = data.draw(st.integers(1, 2))
    small = [data.draw(st.integers(1, 2)) for _ in factors]
    large = [f * s for f, s in zip(factors, small, strict=True)]
    x = torch.arange(2 * channels * math.prod(large)).view(2, channels, *large)
    y = PixelUnshuffle(factors, order=order)(x)
    blocks = list(itertools.product(*map(range, factors)))
    if order == "checkerboard":
        blocks = [b for b in blocks if sum(b) % 2 == 0] + [b for b in blocks if sum(b) % 2 == 1]
    assert y.shape == (2, channels * len(blocks), *small)
    for (k, block), c, where in itertools.product(
        enumerate(blocks), range(channels), itertools.product(*map(range, small))
    ):
        if order == "patch":
            fine = tuple(b * s + w for b, s, w in zip(block, small, where, strict=True))
        else:
            fine = tuple(w * f + b for w, f, b in zip(where, factors, block, strict=True))
        assert torch.equal(y[(slice(None), k * channels + c, *where)], x[(slice(None), c, *fine)])


def test_each_half_is_one_colour_of_the_checkerboard():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    colours = ((rows + columns) % 2).expand(1, 3, 8, 8)
    for factor in (2, 4):
        first, second = inv.Split()(PixelUnshuffle(factor, order="checkerboard")(colours))
        assert first.max() == 0
        assert second.min() == 1


def test_patches_are_quadrants():
    image = torch.arange(16).view(1, 1, 4, 4)
    y = PixelUnshuffle(2, order="patch")(image)
    assert y[0].tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]], [[8, 9], [12, 13]], [[10, 11], [14, 15]]]


# Wavelets, each against a definition in plain numbers


def haar(signal):
    """The orthogonal transform of a list."""
    pairs = list(zip(signal[::2], signal[1::2], strict=True))
    return [(a + b) / math.sqrt(2) for a, b in pairs], [(a - b) / math.sqrt(2) for a, b in pairs]


def s_transform(signal):
    """Said and Pearlman's, for integers."""
    pairs = list(zip(signal[::2], signal[1::2], strict=True))
    return [(a + b) // 2 for a, b in pairs], [a - b for a, b in pairs]


def mirrored(signal, i):
    period = 2 * (len(signal) - 1)
    i %= period
    return signal[min(i, period - i)]


def jpeg2000(signal):
    """T.800's reversible 5-3 filter, for integers: Annex F's equations on the signal mirrored at its ends."""
    size = len(signal)

    def high(i):  # at an odd position, in the extension too
        return mirrored(signal, i) - (mirrored(signal, i - 1) + mirrored(signal, i + 1)) // 2

    low = [signal[i] + (high(i - 1) + high(i + 1) + 2) // 4 for i in range(0, size, 2)]
    return low, [high(i) for i in range(1, size, 2)]


def filters(signal):
    """The 5/3 filter bank without rounding: convolutions with the published taps."""
    low, high = {-2: -1 / 8, -1: 2 / 8, 0: 6 / 8, 1: 2 / 8, 2: -1 / 8}, {-1: -1 / 2, 0: 1, 1: -1 / 2}
    apply = lambda taps, i: sum(tap * mirrored(signal, i + k) for k, tap in taps.items())  # noqa: E731
    size = len(signal)
    return [apply(low, i) for i in range(0, size, 2)], [apply(high, i) for i in range(1, size, 2)]


def separably(transform, x, factors):
    """Band-major, one dimension after another, the first one first, through lists."""
    bands = [x]
    for dim, factor in enumerate(factors, start=2):
        if factor == 2:
            bands = [half for band in bands for half in _along(transform, band, dim)]
    return torch.cat(bands, 1)


def _along(transform, x, dim):
    moved = x.movedim(dim, -1)
    lines = [transform(line) for line in moved.reshape(-1, moved.shape[-1]).tolist()]
    shape = (*moved.shape[:-1], moved.shape[-1] // 2)
    return [torch.tensor([line[k] for line in lines], dtype=x.dtype).view(shape).movedim(-1, dim) for k in (0, 1)]


SHAPES = [((6,), (2,)), ((4, 6), (2, 2)), ((3, 4), (1, 2)), ((2, 4, 2), (2, 2, 2)), ((4, 3, 2), (2, 1, 2))]


@pytest.mark.parametrize(("size", "factors"), SHAPES)
def test_wavelets_without_a_grid(size, factors):
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(Haar(factors)(x), separably(haar, x, factors))
    torch.testing.assert_close(LeGall53(factors)(x), separably(filters, x, factors))
    halves = lambda line: ([l / math.sqrt(2) for l in haar(line)[0]], [h * math.sqrt(2) for h in haar(line)[1]])  # noqa: E731, E741
    torch.testing.assert_close(Haar(factors, lifting=True)(x), separably(halves, x, factors))
    torch.testing.assert_close(Haar(factors)(x).square().sum(), x.square().sum())


@pytest.mark.parametrize("grid", [Grid(0), Grid(0, torch.float32), Grid(8), Grid(16, torch.float32)], ids=repr)
@pytest.mark.parametrize(("size", "factors"), SHAPES)
def test_wavelets_of_whole_numbers_are_the_published_integer_transforms(size, factors, grid):
    """In steps of the grid, up to a 32nd of its limit; each dimension may double values."""
    top = int(grid.limit / grid.step) // 32 if grid.dtype == torch.float32 else 2**44
    x = torch.randint(-top, top, (2, 2, *size))
    for layer, transform in ((Haar(factors, lifting=True), s_transform), (LeGall53(factors), jpeg2000)):
        net = Sequential(layer, grid=grid)
        y = net(x.double() * grid.step)
        assert y.dtype == grid.dtype
        assert torch.equal((y / grid.step).long(), separably(transform, x, factors))
        assert torch.equal((net.inverse(y) / grid.step).long(), x)


def test_low_frequencies_are_those_of_another_implementation():
    """OpenJPEG's, decoded at half the size: the order of the dimensions matters, too, as each one rounds."""
    image = nn.functional.avg_pool2d(
        torch.randint(0, 256, (1, 1, 18, 26)).double(), 3, 1
    ).round()  # smooth: no clipping
    file = io.BytesIO()
    Image.fromarray(image[0, 0].byte().numpy()).save(file, "JPEG2000", irreversible=False, num_resolutions=2)
    with Image.open(file) as reader:
        reader.reduce = 1
        expected = torch.frombuffer(bytearray(reader.tobytes()), dtype=torch.uint8).view(8, 12).long()
    y = Sequential(LeGall53(), grid=Grid(0))(image - 128)
    assert torch.equal(y[0, 0].long() + 128, expected)
    turned = Sequential(LeGall53(), grid=Grid(0))(image.mT - 128)
    assert not torch.equal(turned[0, 0].mT.long() + 128, expected)


def test_an_image_of_8_bits_comes_back_through_many_levels():
    image = torch.randint(0, 256, (1, 3, 16, 16)).float()
    layers = [LeGall53(), Haar(lifting=True), LeGall53(), Haar(lifting=True)]
    net = Sequential(*layers, grid=Grid(0, torch.float32))
    y = net(image)
    assert torch.equal(y, y.round())
    assert torch.equal(net.inverse(y), image)


@pytest.mark.parametrize("layer", WAVELETS[1:])
def test_wavelets_are_exact_up_to_the_limit(layer):
    """Where halves and quarters of a step no longer fit, ties may go otherwise; the way back is the same."""
    grid = Grid(16, torch.float32)
    x = grid.round((torch.rand(2, 2, 8, 8) * 2 - 1) * grid.limit / 5)
    net = Sequential(copy.deepcopy(layer), grid=grid)
    assert torch.equal(net.inverse(net(x)), x)


def test_what_is_linear_has_no_high_frequencies():
    ramp = torch.arange(8.0).view(1, 1, 8)
    assert LeGall53()(ramp)[0, 1].tolist() == [0, 0, 0, 1]  # the last one sees the mirror
    assert Haar()(torch.ones(1, 2, 4, 4))[:, 2:].abs().max() == 0


def test_split_separates_low_frequencies_from_high_ones():
    rows = torch.arange(4.0).remainder(2).view(1, 1, 4, 1).expand(1, 3, 4, 4)  # stripes: high along the height
    for layer in WAVELETS:
        low, high = inv.Split()(layer(rows - rows.mean()))
        assert low.abs().max() < 0.6 < high.abs().max()


def test_lifting_passes_gradients_straight_through():
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    for layer in WAVELETS[1:]:
        expected = torch.autograd.grad((layer(x) * weight).sum(), x)[0]
        net = Sequential(copy.deepcopy(layer), grid=Grid(4))  # a coarse one
        torch.testing.assert_close(torch.autograd.grad((net(x) * weight).sum(), x)[0], expected)


# All of them


@pytest.mark.parametrize("layer", WAVELETS, ids=repr)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 0.07), (torch.float16, 8e-3)])
def test_precision(layer, dtype, atol):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x.to(dtype))
    assert y.dtype == log_det.dtype == dtype
    torch.testing.assert_close(y.double(), layer(x.to(dtype).double()), atol=atol, rtol=0)
    torch.testing.assert_close(layer.inverse(y).double(), x.to(dtype).double(), atol=atol, rtol=0)


@pytest.mark.parametrize("layer", LAYERS + NOISY, ids=repr)
def test_autocast_and_empty_batches(layer):
    x = levels(3, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = layer.forward_and_log_det(x)
        back, _ = layer.inverse_and_log_det(y)
    assert y.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(back, x)
    y, log_det = layer.forward_and_log_det(x[:0])
    back, inverse_log_det = layer.inverse_and_log_det(y)
    assert back.shape == x[:0].shape
    assert log_det.shape == inverse_log_det.shape == layer.off_range(y).shape == (0,)


@pytest.mark.parametrize("layer", [*LAYERS, *NOISY, Sequential(LeGall53(), grid="exact")], ids=repr)
def test_compiled_as_a_whole(layer):
    x = levels(3, 2, 4, 4)

    def both(x):
        y, log_det = layer.forward_and_log_det(x)
        return y, log_det, *layer.inverse_and_log_det(y)

    torch.compiler.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    found = compiled(x)
    torch.manual_seed(3)
    for a, b in zip(found, both(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [*WAVELETS[1:], Dequantize(255), Augment(2), Pad(4, multiple_of=3)], ids=repr)
def test_by_the_default_compiler(layer):
    """The grid's bits are those without it, and no level is lost."""
    torch.compiler.reset()
    net = Sequential(copy.deepcopy(layer), grid=Grid(0) if layer in WAVELETS else None)
    x = torch.randint(0, 255, (64, 16, 4, 4)).double() if layer in WAVELETS else levels(64, 16, 4, 4) * 15
    y = torch.compile(net, fullgraph=True)(x)
    back = torch.compile(net.inverse, fullgraph=True)(y)
    assert torch.equal(back, x)
    if not layer.stochastic:
        assert torch.equal(y, net(x))


@pytest.mark.filterwarnings("ignore:.*jit.script:FutureWarning", "ignore:.*jit.script:DeprecationWarning")
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_transforms_of_torch_func_and_second_derivatives(layer):
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    tangent = torch.randn_like(x)
    _, moved = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(moved, layer(tangent))  # all of them are linear
    alone = torch.func.vmap(lambda sample: layer(sample[None])[0])(x)
    torch.testing.assert_close(alone, layer(x))
    assert torch.autograd.gradgradcheck(lambda x: layer(x).pow(3), x[:1].requires_grad_(), fast_mode=True)


# Pad


def test_a_padded_network_trains_without_stored_activations():
    """The layer after the padding keeps its input, or batch norm would amplify what the zeros come back as."""

    class Careless(Pad):
        @property
        def bijective(self):
            return True

    def errors(pad):
        torch.manual_seed(1)
        couplings = [inv.Coupling(function(16)) for _ in range(4)]
        before = [Scale(), Scale(0.7)]  # the first layer of all that computes something keeps its input anyway
        down = PixelUnshuffle(4, order="pixel_major")  # some of its channels are all zeros
        net = Sequential(*before, pad((2, 7), multiple_of=4), down, inv.Split(), *couplings, inv.Merge())
        x = torch.randn(4, 2, 2, 7)
        expected, _ = outcome(net, x)
        found, trained = outcome(with_strategy(net, Reconstruct()), x)
        assert trained.drift < 1e-5
        return off(found, expected)[0]

    assert errors(Pad) < 1e-4 < 1e-3 < errors(Careless)


def test_off_range_is_what_the_padding_holds():
    layer = Pad(3, multiple_of=4)
    y = torch.zeros(2, 1, 4, 4)
    y[0, 0, 3, 0], y[0, 0, 0, 3], y[1, 0, 2, 2] = 3, 4, 7
    assert layer.off_range(y).tolist() == [5, 0]
    assert (layer.bijective, Pad((4, 6), multiple_of=(4, 3)).bijective) == (False, True)
    x = torch.rand(1, 1, 4, 6)
    assert Pad((4, 6), multiple_of=2)(x) is x


# Noise


@pytest.mark.parametrize("distribution", [None, torch.distributions.Uniform(*torch.tensor([-1.0, 3.0]).double())])
def test_augment_returns_the_density_of_its_noise(distribution):
    layer = Augment(2, distribution=distribution)
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    y, log_det = layer.forward_and_log_det(x)
    noise = y[:, 1:]
    expected = (distribution or torch.distributions.Normal(0.0, 1.0)).log_prob(noise).flatten(1).sum(1)
    torch.testing.assert_close(log_det, -expected)
    torch.testing.assert_close(layer.inverse_and_log_det(y)[1], expected)
    assert noise.std() > 0.3


def test_the_bound_is_tight_where_the_noise_is_the_posterior():
    """With independent normal channels the density of the data comes out as it is."""
    normal = torch.distributions.Normal(0.0, 1.0)
    x = torch.randn(4, 3, 2)
    y, log_det = Augment(2).forward_and_log_det(x)
    density = normal.log_prob(y).flatten(1).sum(1) + log_det
    torch.testing.assert_close(density, normal.log_prob(x).flatten(1).sum(1))


@pytest.mark.parametrize("layer", NOISY, ids=repr)
def test_noise_moves_the_stream_as_the_plain_draw_and_copies_draw_alike(layer):
    x = levels(3, 2, 4, 4)
    start = torch.get_rng_state()
    y, log_det = layer.forward_and_log_det(x)
    end = torch.get_rng_state()
    torch.set_rng_state(start)
    torch.randn_like(x) if isinstance(layer, Augment) else torch.rand_like(x)
    assert torch.equal(torch.get_rng_state(), end)
    layer.inverse_and_log_det(y)
    layer.off_range(y)
    assert torch.equal(torch.get_rng_state(), end)
    torch.set_rng_state(start)
    assert torch.equal(copy.deepcopy(layer).eval()(x), y)
    assert layer.stochastic
    assert not layer.bijective
    assert log_det.shape == (3,)


def test_derivatives_under_one_seed():
    x = levels(2, 2, 2, dtype=torch.float64).requires_grad_()
    grad = torch.autograd.grad(Augment(1)(x).sum(), x)[0]
    assert torch.equal(grad, torch.ones_like(x))
    grad = torch.autograd.grad(Dequantize(16)(x).sum(), x)[0]
    torch.testing.assert_close(grad, torch.full_like(x, 1 / 16))
    y = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(Augment(1).inverse_and_log_det(y)[1].sum(), y)[0]
    torch.testing.assert_close(grad[:, 2:], -y[:, 2:])
    assert grad[:, :2].abs().max() == 0


@settings(max_examples=40)
@given(st.integers(2, 524288), st.sampled_from([torch.float32, torch.float64]))
def test_dequantized_levels_come_back_whatever_the_noise(count, dtype):
    _comes_back(count, dtype)


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(256, torch.float32), (255, torch.float32), (524288, torch.float32), (64, torch.float16), (8, torch.bfloat16)],
)
def test_dequantized_levels_come_back_at_the_edges(count, dtype):
    _comes_back(count, dtype)


def _comes_back(count, dtype):
    """All levels, or many: with the least noise, and with the largest one."""
    x = torch.arange(count)[:: max(1, count // 1000)].to(dtype)[None]
    layer = Dequantize(count)
    largest = 1 - torch.finfo(dtype).eps / 2
    for noise in (0.0, largest, 0.5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand_like", lambda x, noise=noise, **_: torch.full_like(x, noise))
            y = layer(x)
        assert torch.equal(layer.inverse(y), x)
        assert layer.off_range(y).max() == 0
        assert ((y.double() * count - x.double() - noise).abs() <= 8 * torch.finfo(dtype).eps * (x.double() + 1)).all()


def test_dequantize_outside_the_unit_interval():
    y = torch.tensor([[-3.0, 0.5], [1.0, 5.0], [0.0, 0.999]])
    assert Dequantize(4).inverse(y).tolist() == [[0, 2], [3, 3], [0, 3]]
    assert Dequantize(4).off_range(y).tolist() == [3, 4, 0]


def test_uniform_levels_have_the_probability_that_the_bound_says():
    y, log_det = Dequantize(10).forward_and_log_det(torch.randint(0, 10, (5, 2, 3)).double())
    torch.testing.assert_close(log_det, torch.full((5,), -6 * math.log(10), dtype=torch.float64))  # the density is 1
    assert (y >= 0).all()
    assert (y < 1).all()
    many = Dequantize(2)(torch.zeros(1, 100_000))
    assert abs(float(many.mean()) - 0.25) < 2e-3
    assert abs(float(many.var()) - 1 / 48) < 2e-4


def test_log_determinants_add_up_after_noise_but_not_after_zeros():
    flow = Sequential(Dequantize(16), Augment(2), inv.Split(), inv.Coupling(nn.Tanh()), inv.Merge())
    x = levels(3, 2, 4)
    y, log_det = flow.forward_and_log_det(x)
    _, inverse_log_det = flow.inverse_and_log_det(y)
    noise = torch.distributions.Normal(0.0, 1.0).log_prob(flow[2:].inverse(y)[:, 2:]).flatten(1).sum(1)
    torch.testing.assert_close(log_det, -noise - 8 * math.log(16))
    torch.testing.assert_close(inverse_log_det, -log_det)
    assert Sequential(flow, inv.Split(), inv.Coupling(nn.Tanh())).forward_and_log_det(x)[1].shape == (3,)
    both = inv.Parallel(Augment(2), inv.Identity())
    assert Sequential(both, inv.Merge(), inv.LeGall53()).forward_and_log_det((x, torch.cat((x, x), 1)))[1].shape == (3,)
    padded = Sequential(Augment(2), inv.PadSplit(4, 8), inv.Merge())
    assert padded.forward_and_log_det(x)[1].shape == (3,)
    with pytest.raises(ValueError, match="has no log-determinant, because layer 2, Coupling"):
        Sequential(padded, inv.Split(), inv.Coupling(nn.Tanh())).forward_and_log_det(x)


def test_plans_ask_for_no_values_of_the_density():
    base = torch.distributions.Laplace(0.0, 1.0, validate_args=True)
    shifted = torch.distributions.TransformedDistribution(base, torch.distributions.AffineTransform(1.0, 2.0))
    for distribution in (base, shifted):
        layers = [Augment(2, distribution=distribution), inv.Split(), inv.Coupling(nn.Linear(2, 2))]
        y, log_det = Sequential(*layers, backprop=inv.Budget(10**6)).forward_and_log_det(torch.zeros(2, 2))
        (y[0].sum() + y[1].sum() + log_det.sum()).backward()
    with pytest.raises(ValueError, match="Expected value argument"):  # elsewhere it is asked
        layers[0].inverse_and_log_det(torch.full((2, 4), float("nan")))


def test_plans_and_grids_know_what_draws():
    net = Sequential(Dequantize(16), Augment(2), inv.Split(), inv.Coupling(nn.Tanh()), backprop=inv.Budget(2**30))
    x = levels(3, 2, 4)
    net.plan(x)
    net(x.requires_grad_())[0].sum().backward()
    assert Dequantize(16)(torch.empty(1, 2, device="meta")).is_meta
    net = Sequential(Augment(2), inv.Split(), inv.Coupling(nn.Tanh()), grid="exact")
    with pytest.raises(ValueError, match="random"):
        net.encode(x.detach())
