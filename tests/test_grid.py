"""On a grid sums do not round: the inverse is bit for bit, and all strategies give the same bits."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible import Coupling, Grid, Merge, PixelUnshuffle, Recompute, Reconstruct, Sequential, Split, Store
from invertible._value import leaves
from invertible.testing import measure_memory
from tests.networks import METHODS, assert_same, draw_network, outcome, with_strategy
from tests.rows import Scale

GRIDS = ["exact", "exact32"]
each_grid = pytest.mark.parametrize("grid", GRIDS)
SAVING = [Recompute(), Recompute(every=3), Reconstruct(), Reconstruct(anchor_every=2), Reconstruct(locate=True)]
ADVERSE = [0.0, -0.0, 1e-45, -1e-45, 2.0**-17, -(2.0**-41), 2.0**-41, 1 / 3, -7.3, 100.0, 1 - 2.0**-24]


def bottleneck(channels, out=None, stride=1):
    """As in an i-RevNet, with a kink: only the same bits have the same gradients."""
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, out or channels, 3, stride, padding=1, bias=False)
    )


def deep(depth=12, grid="exact", channels=4, backprop=None):
    torch.manual_seed(depth)
    down = Coupling(bottleneck(channels, 4 * channels, 2), downsample=PixelUnshuffle(2))
    blocks = [Coupling(bottleneck(4 * channels)) for _ in range(depth)]
    return Sequential(PixelUnshuffle(2), Split(), down, *blocks, Merge(), grid=grid, backprop=backprop)


def adverse(batch=3, channels=2, size=8):
    """Images with what is hardest to keep."""
    x = torch.randn(batch, channels, size, size)
    x.view(-1)[: len(ADVERSE)] = torch.tensor(ADVERSE)
    return x


def same(found, expected):
    for key, value in expected.items():
        other = found[key]
        assert (value is None) == (other is None), key
        assert value is None or torch.equal(value, other), key


# The grid itself


@given(st.floats(-200, 200), st.integers(0, 16), st.sampled_from([torch.float32, torch.float64]))
def test_rounds_to_the_nearest_multiple(x, bits, dtype):
    grid = Grid(bits, dtype)
    value = torch.tensor([x], dtype=torch.float64)
    rounded = grid.round(value)
    assert rounded.dtype == dtype
    assert rounded.item() == round(x * 2**bits) / 2**bits  # Python, too, takes the even one of two
    assert not torch.signbit(rounded).any() or rounded.item() < 0
    assert torch.equal(grid.round(rounded), rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounds_every_dtype_and_passes_the_gradient(dtype):
    x = torch.linspace(-3, 3, 50).to(dtype).requires_grad_()
    rounded = Grid(3).round(x)
    assert torch.equal(rounded, (x.detach().double() * 8).round() / 8 + 0.0)
    rounded.backward(torch.arange(50, dtype=torch.float64))
    assert torch.equal(x.grad, torch.arange(50).to(dtype))


@pytest.mark.parametrize("grid", [Grid(16, torch.float32), Grid(0, torch.float32), Grid(40), Grid(52)])
def test_near_the_limit_no_wrong_inverse_passes_the_check(grid):
    """Sums around the bound, where every second one would be rounded."""
    generator = torch.Generator().manual_seed(0)
    n, steps = 2_000_000, int(grid.limit / grid.step)

    def held(number):
        """So many steps, of which all are representable."""
        return number.to(grid.dtype) * grid.step

    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    start = torch.randint(64, steps, (n,), generator=generator)
    total = steps + torch.randint(-64, 64, (n,), generator=generator)
    x, shift = held(sign * start), held(sign * (total - start))
    y = grid.add(x, shift)
    passed = y.abs() < grid.limit
    assert n * 0.4 < passed.sum() < n * 0.6
    assert torch.equal(grid.subtract(y, shift)[passed], x[passed])
    loose = y.abs() <= grid.limit
    assert not torch.equal(grid.subtract(y, shift)[loose], x[loose])  # the check must be strict


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grid(1.5), "Grid: bits must be an integer, got 1.5."),
        (lambda: Grid(4, torch.int32), "Grid: dtype must be torch.float64 or torch.float32, got torch.int32."),
        (lambda: Grid(53), "Grid: bits must be from 0 to 52 for torch.float64, got 53."),
        (lambda: Grid(-1), "got -1."),
        (lambda: Grid(4, on_range="warn"), """on_range must be "raise" or "record", got 'warn'."""),
        (lambda: Grid(4).round(torch.ones(2, dtype=torch.uint8)), "expected a floating-point tensor, got dtype"),
        (lambda: Sequential(grid="exakt"), """grid must be "exact", "exact32", a Grid or None, got 'exakt'."""),
        (lambda: Sequential(grid=40), 'grid must be "exact", "exact32", a Grid or None, got 40.'),
    ],
)
def test_refuses_what_is_no_grid(make, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        make()


# Networks on a grid


@each_grid
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_inverse_is_bit_for_bit(grid, train, autocast):
    net = deep(100, grid).train(train)
    x = adverse()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
        assert y.dtype == net.grid.dtype
        assert torch.equal(net.inverse(y), net.snap(x))
    assert net.peak < net.grid.limit
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(net(x), y)
        assert torch.equal(net.inverse(net(x)), net.snap(x))


def test_the_exact_grid_keeps_single_precision():
    net = adding(0.0, 0.0)
    x = torch.randint(0, 256, (2, 2, 8, 8)).float() / 255
    x[0, 0, 0] = torch.tensor([2.0**-16, 8191.9995, -8191.9995, 1 / 3, 2.0**-16 * 1.9999999, -1e3, 0.0, 5e-2])
    assert torch.equal(net.snap(x), x.double())
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)).float(), x)
    assert not torch.signbit(net.snap(torch.tensor([[-0.0, -1e-40]]))).any()


@each_grid
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(data=st.data())
def test_drawn_networks_have_the_same_bits_by_every_strategy(grid, method, data):
    net, x, condition = draw_network(data.draw, additive=True)
    if data.draw(st.booleans(), label="single"):
        net, x, condition = net.float(), x.float(), condition.float()
    net.grid = grid
    if method.startswith("inverse"):
        with torch.no_grad():
            x = net(x, condition=condition)
            assert torch.equal(net(net.inverse(x, condition=condition), condition=condition), x)
    expected, _ = outcome(with_strategy(net, Store()), x, condition, method=method)
    strategy = data.draw(st.sampled_from(SAVING), label="strategy")
    found, _ = outcome(with_strategy(net, strategy), x, condition, method=method)
    shared = {key: expected.pop(key) for key in list(expected) if key.startswith("condition")}
    same(found, expected)
    assert_same({key: found[key] for key in shared}, shared, 1e-5)  # a sum over layers, in another order


@each_grid
@pytest.mark.parametrize("strategy", SAVING, ids=repr)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_have_the_bits_of_stored_activations(grid, strategy, autocast):
    net, x = deep(40, grid), adverse()
    context = {"autocast": torch.autocast("cpu", torch.bfloat16, enabled=autocast)}
    expected, _ = outcome(with_strategy(net, Store()), x, **context)
    found, _ = outcome(with_strategy(net, strategy), x, **context)
    same(found, expected)


@pytest.mark.parametrize("strategy", [Store(), Reconstruct()])
def test_channels_last_keeps_its_bits(strategy):
    """A scale per channel sums its gradient in the order of memory."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(x)) * self.scale

    torch.manual_seed(0)
    net = Sequential(Split(), *(Coupling(Scaled()) for _ in range(6)), Merge(), grid="exact32")
    x = torch.randn(3, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    expected, _ = outcome(with_strategy(net, Recompute()), x)
    found, _ = outcome(with_strategy(net, strategy), x)
    same(found, expected)
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.snap(x))


@each_grid
def test_one_sample_has_the_bits_of_its_place_in_a_batch(grid):
    net = deep(10, grid, channels=8).eval()
    x = adverse(5, channels=4, size=16)
    with torch.no_grad():
        whole = net(x)
        for i in range(5):
            assert torch.equal(net(x[i : i + 1]), whole[i : i + 1])
            assert torch.equal(net.inverse(whole[i : i + 1]), net.snap(x[i : i + 1]))


def test_one_sample_keeps_its_condition():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 2)

        def forward(self, x, condition):
            assert len(condition) == len(x)
            return torch.tanh(x * self.table(condition)[:, :, None, None])

    net = Sequential(Split(), Coupling(Labelled()), Coupling(Labelled()), Merge(), grid="exact").eval()
    x, label = torch.randn(3, 4, 2, 2), torch.tensor([2, 0, 1])
    with torch.no_grad():
        whole = net(x, condition=label)
        assert torch.equal(net(x[1:2], condition=label[1:2]), whole[1:2])


def test_attention_without_gradients_has_the_bits_of_training():
    """In ``eval`` torch has another kernel for it without gradients."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.layer(x.transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    net = Sequential(Split(), *(Coupling(Attention()) for _ in range(4)), Merge(), grid="exact").eval()
    x = torch.randn(3, 16, 10)
    y = net(x).detach()
    with torch.no_grad():
        assert torch.equal(net(x), y)
        assert torch.equal(net.inverse(y), net.snap(x))
    expected, _ = outcome(with_strategy(net, Store()), x)
    found, _ = outcome(with_strategy(net, Reconstruct()), x)
    same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_functions_compute_in_the_dtype_of_their_parameters(dtype):
    seen = []
    net = deep(3).to(dtype)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    x = adverse()
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.snap(x))
    assert set(seen) == {(dtype, dtype)}


# Where a grid comes from


def test_a_grid_is_inherited_and_changes_no_key():
    inner = Sequential(Coupling(nn.Tanh()), inv.Inverse(Coupling(nn.Tanh(), downsample=inv.Identity())))
    net = Sequential(Split(), inner, Merge())
    keys, x = list(net.state_dict()), torch.randn(2, 4)
    assert net.exactness is inv.Exactness.ROUNDING
    plain = net(x)
    net.grid = "exact"
    assert inner.grid == net.grid == Grid(40)
    assert inner[1].layer.downsample.grid == Grid(40)
    assert net.exactness is inner[0].exactness is inv.Exactness.EXACT
    assert repr(net).count("grid=") == 1
    assert list(net.state_dict()) == keys
    assert net(x).dtype == torch.float64
    net.grid = Grid(20, torch.float32)
    assert inner[0].grid == Grid(20, torch.float32)
    net.grid = None
    assert inner[0].grid is None
    assert torch.equal(net(x), plain)


def test_slices_copies_and_new_layers_are_on_the_grid():
    net = deep(3)
    assert net[1:3].grid == net[2].grid == copy.deepcopy(net)[2].grid == pickle.loads(pickle.dumps(net)).grid  # noqa: S301
    x = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(net[3:](net[:3](x)), net(x))
        *_, (_, last) = net.trace(x)
        assert torch.equal(last, net(x))
        *_, (_, first) = net.trace_inverse(last)
        assert torch.equal(first, net.snap(x))
    net.insert(3, Coupling(bottleneck(16)))
    assert net[3].grid == net.grid
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.snap(x))


def test_an_inner_network_may_have_its_own():
    inner = deep(3, backprop=Reconstruct())
    net = Sequential(Scale(0.5), inner, inv.Identity())
    x = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(net[1](x / 2), net(x))
        assert torch.equal(inv.Inverse(net).inverse(x), net(x))
    both = Sequential(inv.Identity(), inner, grid="exact")
    with torch.no_grad():
        assert torch.equal(both(x), inner(x))
    assert both.peak == inner.peak


def test_a_network_inside_a_function_rounds_for_itself():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Sequential(Split(), Coupling(nn.Conv1d(2, 2, 1)), Merge(), grid="exact32")

        def forward(self, x):
            return self.net(x)

    net = Sequential(Split(), Coupling(Inside()), Coupling(Inside()), Merge(), grid="exact")
    assert net[1].function.net.grid != net.grid
    x = torch.randn(2, 8, 3)
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.snap(x))


def other():
    shared = Coupling(nn.Tanh())
    Sequential(shared, grid="exact32")
    return shared


def mixed():
    net = deep(2)
    return Sequential(net[2])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Sequential(Split(), Sequential(Scale()), grid="exact"),
            "Sequential: every layer must keep its values on the grid, got layer '1.0', Scale(), which does not",
        ),
        (
            lambda: Sequential(Coupling(nn.Tanh(), downsample=Scale()), grid="exact"),
            "got layer '0.downsample', Scale()",
        ),
        (
            lambda: Sequential(Sequential(grid="exact32"), grid="exact"),
            "layer '0' must have the grid of the container around it, Grid(40, torch.float64), or None, got Grid(16",
        ),
        (lambda: Sequential(other(), grid="exact"), "on Grid(16, torch.float32), which is that of another container."),
        (lambda: Sequential(other()), "a layer must be on the grid of its container, None, got layer '0', Coupling()"),
        (lambda: inv.Parallel(other()), "Parallel: a layer must be on the grid of its container, None"),
        (lambda: inv.Inverse(other()), "Inverse: a layer must be on the grid of its container, None"),
        (lambda: Sequential(grid="exact").append(Scale()), "got layer '0', Scale(), which does not"),
        (mixed, "which is that of another container. Set the same grid for both."),
    ],
)
def test_refuses_what_cannot_be_on_the_grid(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_refusals_leave_everything_as_it_was():
    net = Sequential(Split(), Coupling(nn.Tanh()), Scale(), Merge())
    with pytest.raises(ValueError, match="Scale"):
        net.grid = "exact"
    assert net.grid is net[1].grid is None
    net = Sequential(grid="exact")
    with pytest.raises(ValueError, match="Scale"):
        net.append(Scale())
    assert len(net) == 0


def test_another_container_changed_the_grid():
    net = deep(2)
    part = net[2:4]
    part.grid = "exact32"
    with pytest.raises(ValueError, match="must be on the grid of its container, Grid") as caught:
        net(torch.randn(2, 2, 8, 8))
    assert "in Sequential, layer 2 of 6, forward" in caught.value.__notes__


def test_a_narrow_copy_is_refused():
    net = deep(2)
    y = net(torch.randn(2, 2, 8, 8)).detach()
    with pytest.raises(TypeError, match=re.escape("inverse takes the torch.float64 values that forward returned, got")):
        net.inverse(y.float())
    with pytest.raises(
        TypeError, match=re.escape("on its grid values have the dtype torch.float64, got torch.float32")
    ):
        net[3]((y.float(), y.float()))
    with pytest.raises(TypeError, match="expected a floating-point tensor, got dtype"):
        net(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))
    wide = deep(2, "exact32")
    y = wide(torch.randn(2, 2, 8, 8)).detach()
    assert torch.equal(wide.inverse(y.double()), wide.inverse(y))


class Shifted(inv.InvertibleModule):
    """A user's layer on a grid."""

    def __init__(self):
        super().__init__()
        self.function = nn.Linear(2, 2)

    @property
    def keeps_grid(self):
        return True

    def forward(self, x, *, condition=None):
        return x[0], self.grid.add(x[1], self.function(x[0].float()))

    def inverse(self, y, *, condition=None):
        return y[0], self.grid.subtract(y[1], self.function(y[0].float()))


def test_a_layer_of_ones_own():
    torch.manual_seed(0)
    layers = [each for _ in range(9) for each in (Shifted(), inv.Swap())]
    net = Sequential(Split(), *layers, Merge(), grid="exact")
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.snap(x))
    assert net.peak >= max(t.abs().max().item() for _, value in net.trace(x) for t in leaves(value))
    expected, _ = outcome(with_strategy(net, Store()), x)
    found, _ = outcome(with_strategy(net, Reconstruct()), x)
    same(found, expected)


# The range


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def adding(*values, grid="exact"):
    return Sequential(Split(), *(Coupling(Constant(value)) for value in values), Merge(), grid=grid)


@pytest.mark.parametrize("backprop", [Store(), Reconstruct()])
@pytest.mark.parametrize("method", ["forward", "forward_and_log_det"])
def test_a_value_at_the_limit_is_an_error(backprop, method):
    net = adding(8000.0, -100.0, -7000.0)
    net.backprop = backprop
    call = getattr(net, method)
    x = torch.zeros(2, 2, requires_grad=True)
    call(x)
    assert net.peak == 8000.0
    net = adding(8192.0, -100.0, -7000.0)  # it comes back: only the sum between them tells
    net.backprop = backprop
    call = getattr(net, method)
    with pytest.raises(inv.StreamRangeError, match="must be below 8192 in size, got 8192") as caught:
        call(x)
    assert caught.value.peak == caught.value.limit == 8192
    assert "such as Grid(38, torch.float64); net.calibrate(x) proposes them" in str(caught.value)
    net.grid = Grid(38)
    call(x)
    net.grid = Grid(40, on_range="record")
    call(x)
    assert net.peak == 8192


def test_the_range_is_checked_backwards_at_the_entry_and_for_no_numbers():
    net = adding(-8000.0)
    with pytest.raises(inv.StreamRangeError, match="got 8200"):
        net.inverse(torch.full((1, 2), 200.0, dtype=torch.float64))
    with pytest.raises(inv.StreamRangeError, match="got 9000"):
        net(torch.full((1, 2), 9000.0))
    for value in (float("nan"), float("inf")):
        with pytest.raises(inv.StreamRangeError, match=f"got {value}.$"):
            adding(value)(torch.zeros(1, 2))
    norm = Sequential(Split(), Coupling(nn.BatchNorm1d(1)), Merge(), grid=Grid(52))
    with pytest.raises(inv.StreamRangeError, match="The functions' buffers have moved already"):
        norm(torch.tensor([[1.9, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    assert adding()(torch.zeros(0, 2)).shape == (0, 2)


def test_calibrate_proposes_and_changes_nothing():
    net = deep(4).train()
    net.grid = Grid(50)  # the limit is 8
    x = 20 * torch.randn(4, 2, 8, 8)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(inv.StreamRangeError):
        copy.deepcopy(net)(x)
    grid = net.calibrate(x)
    assert net.grid == Grid(50)
    same(net.state_dict(), before)
    net.grid = grid
    y = net(x)
    assert net.peak * 4 <= grid.limit < net.peak * 8
    assert torch.equal(net.inverse(y.detach()), net.snap(x))
    net.grid = None
    with pytest.raises(ValueError, match="calibrate needs a grid"):
        net.calibrate(x)


# Under what transforms and traces


def test_whole_network_compiled_and_exported():
    net = deep(3).eval()
    x = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), net(x))
        program = torch.export.export(net, (x,))
        assert torch.equal(program.module()(x), net(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_functions_compiled_each_by_itself():
    net = deep(5, backprop=Reconstruct())
    x = adverse()
    net.compile_functions(backend="aot_eager")
    expected, _ = outcome(with_strategy_of(net, Store()), x, copies=False)
    found, _ = outcome(with_strategy_of(net, Reconstruct()), x, copies=False)
    for key in expected:
        if not key.startswith("buffer"):
            same({key: found[key]}, {key: expected[key]})
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.snap(x))


def with_strategy_of(net, strategy):
    net.backprop = strategy
    return net


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func's own
def test_derivatives_by_transforms():
    torch.manual_seed(0)
    net = Sequential(Split(), *(Coupling(nn.Linear(2, 2)) for _ in range(3)), Merge(), grid="exact")
    plain = copy.deepcopy(net)
    plain.grid = None
    x = torch.randn(1, 4)
    expected = torch.func.jacrev(plain)(x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(net)(x).float(), expected)


@pytest.mark.parametrize("hooked", [False, True])
def test_inference_keeps_nothing_of_a_plain_function(hooked):
    """Torch's layers make the same bits without gradients; what else is called may not, and is run with them."""
    layers = [layer for _ in range(12) for layer in (nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))]
    net = Sequential(Split(), Coupling(nn.Sequential(*layers)), Merge(), grid="exact").eval()
    seen = []
    if hooked:
        layers[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    x = torch.randn(4, 8, 32, 32)
    with torch.no_grad():
        y, memory = measure_memory(lambda: net(x))
        assert seen == [True] * hooked
        assert (memory.peak > 24 * x[:, :4].nbytes) == hooked
        assert torch.equal(net.inverse(y), net.snap(x))
    assert torch.equal(net(x), y)


def test_a_function_that_is_no_python_code():
    class Tanh(nn.Module):
        forward = staticmethod(torch.tanh)

    net, x = Sequential(Split(), Coupling(Tanh()), Merge(), grid="exact"), torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.snap(x))


LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Relaid(nn.Module):
    """Gives its result in a memory format of its own."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.inner = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return self.inner(x).contiguous(memory_format=self.layout)


@each_grid
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("of_x", [*LAYOUTS, "transposed"])
@pytest.mark.parametrize(("of_weights", "of_result"), [(w, r) for w in LAYOUTS for r in LAYOUTS])
def test_no_layout_but_that_of_the_input_counts(grid, train, of_x, of_weights, of_result):
    torch.manual_seed(0)
    net = Sequential(Split(), *(Coupling(Relaid(of_result)) for _ in range(3)), Merge(), grid=grid).train(train)
    net.to(memory_format=of_weights)
    x = torch.randn(4, 16, 9, 9)
    x = x.transpose(2, 3) if of_x == "transposed" else x.contiguous(memory_format=of_x)
    expected, _ = outcome(with_strategy(net, Store()), x)
    for strategy in (Recompute(), Reconstruct()):
        found, _ = outcome(with_strategy(net, strategy), x)
        same(found, expected)
    with torch.no_grad():
        y = net(x)
        assert torch.equal(y, expected["output 0"])
        assert torch.equal(net.inverse(y), net.snap(x))
        assert torch.equal(net.inverse(net.encode(x)), net.snap(x))


@each_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_that_read_their_input_twice(grid, dtype):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.a(torch.relu(x)) + self.b(x)

    torch.manual_seed(0)
    net = Sequential(Split(), *(Coupling(Residual()) for _ in range(10)), Merge(), grid=grid).to(dtype)
    x = torch.randn(3, 16, 8, 8)
    expected, _ = outcome(with_strategy(net, Store()), x)
    for strategy in (Recompute(), Reconstruct()):
        found, _ = outcome(with_strategy(net, strategy), x)
        same(found, expected)


def test_one_sample_of_a_function_that_mixes_samples_is_one():
    for function in (nn.Softmax(0), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))):
        grid, plain = (Sequential(Split(), Coupling(function), Merge(), grid=g).eval() for g in ("exact", None))
        x = torch.randn(1, 4)
        if isinstance(function, nn.Sequential):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                grid(x)
        else:
            torch.testing.assert_close(grid(x).float(), plain(x))


def test_no_number_has_no_grid():
    net = Sequential(Split(), Coupling(nn.Tanh()), grid="exact")
    with pytest.raises(ValueError, match="holds values of size nan"):
        net.calibrate(torch.full((2, 4), torch.nan))
    empty = Sequential(Split(), Coupling(nn.PReLU()), grid="exact", backprop=Reconstruct())
    assert empty(torch.randn(2, 4, 0, 4))[0].shape == (2, 2, 0, 4)


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("train", [True, False])
def test_down_to_one_pixel_and_back(train, of_x):
    """Of one pixel, all layouts are the same; what grows from it again has one of its own."""
    torch.manual_seed(0)
    downs = [Coupling(bottleneck(4 * 4**i, 16 * 4**i, 2), downsample=PixelUnshuffle(2)) for i in range(2)]
    blocks = [Coupling(bottleneck(4 * 4**i)) for i in range(3)]
    layers = [blocks[0], downs[0], blocks[1], downs[1], blocks[2]]
    net = Sequential(PixelUnshuffle(2), Split(), *layers, Merge(), grid="exact").train(train)
    x = torch.randn(4, 2, 8, 8).contiguous(memory_format=of_x)
    expected, _ = outcome(with_strategy(net, Store()), x)
    found, _ = outcome(with_strategy(net, Reconstruct()), x)
    same(found, expected)
    with torch.no_grad():
        y = net(x)
        assert y.shape[2:] == (1, 1)
        assert torch.equal(net.inverse(y), net.snap(x))
        assert torch.equal(net.inverse(y.clone().contiguous()), net.snap(x))


def test_functions_that_are_not_torchs_own_run_without_data():
    class Own(nn.Module):
        def forward(self, x):
            return x.tanh()

    with torch.device("meta"):
        net, x = Sequential(inv.Split(), Coupling(Own()), inv.Merge(), grid="exact"), torch.rand(2, 4)
    assert net(x).is_meta


def test_the_layout_of_one_channel_does_not_depend_on_whether_gradients_are_wanted():
    """A channel of a channels-last image is none; where it went, dropout masks after the grid fell elsewhere."""
    inner = Sequential(Split(), Coupling(nn.Conv2d(1, 1, 1)), Merge(), grid="exact").double()
    x = torch.rand(2, 2, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = PixelUnshuffle(2)(inner(x)).stride()
    for strategy in (Store(), Recompute(), Reconstruct()):
        inner.backprop = strategy
        assert PixelUnshuffle(2)(inner(x)).stride() == expected
