"""RevNets: counts and layout against the paper's table and its code, the unit by hand, gradients, memory, refusals."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import zoo
from invertible import Budget, Coupling, Recompute, Reconstruct, Sequential, Store
from invertible.testing import measure_memory
from zoo import network
from zoo.resnet import Residual, Shortcut
from zoo.revnet import RevNet, Stage, Transition

NAMES = ["revnet38", "revnet56", "revnet104", "revnet110", "revnet164"]
STRATEGIES = [Recompute(), Recompute(every=3), Reconstruct(), Reconstruct(anchor_every=2), Budget(4_000_000)]


def meta(name, **options):
    with torch.device("meta"):
        return zoo.create(name, **options)


def thin(*, bottleneck, units=(3, 2, 4), classes=5):
    """A network of three stages that is quick, with a stem like that for ImageNet."""
    stem = nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
    )
    channels = (16, 32, 48) if bottleneck else (8, 16, 28)
    return RevNet(
        stem, 8, stem_stride=4, units=units, channels=channels, strides=(1, 2, 2), bottleneck=bottleneck,
        num_classes=classes,
    )  # fmt: skip


@pytest.fixture(params=[True, False], ids=["bottlenecks", "3 by 3"])
def net(request):
    return thin(bottleneck=request.param)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("revnet56", 1000, 27_553_128),  # 28M in Table 1 of the i-RevNet paper
        ("revnet104", 1000, 45_428_072),
        ("revnet38", 10, 464_890),
        ("revnet38", 100, 475_060),
        ("revnet110", 10, 1_729_194),
        ("revnet164", 10, 1_748_778),
    ],
)
def test_parameters(name, classes, count):
    """The count of the code's layers, written out again, agrees."""
    found = sum(p.numel() for p in meta(name, num_classes=classes).parameters())
    assert found == count == counted(CODE[name], classes)


CODE = {  # the code's own figures: units, filters, use_bottleneck, init_filter
    "revnet56": ([2, 2, 3, 2], [128, 128, 256, 512, 832], True, 7),
    "revnet104": ([2, 2, 11, 2], [128, 128, 256, 512, 832], True, 7),
    "revnet38": ([3, 3, 3], [32, 32, 64, 112], False, 3),
    "revnet110": ([9, 9, 9], [32, 32, 64, 128], False, 3),
    "revnet164": ([9, 9, 9], [32, 32, 64, 128], True, 3),
}


def counted(figures, classes):
    units, filters, bottleneck, kernel = figures
    filters = [filters[0], *(4 * f if bottleneck else f for f in filters[1:])]

    def function(i, o, first):
        m = o // 4
        inner = i * m + 2 * m + 9 * m * m + 2 * m + m * o if bottleneck else 9 * i * o + 2 * o + 9 * o * o
        return inner + (0 if first else 2 * i)

    total = 3 * filters[0] * kernel**2 + 2 * filters[0]
    for stage, count in enumerate(units):
        for unit in range(count):
            i, o = filters[stage if unit == 0 else stage + 1] // 2, filters[stage + 1] // 2
            total += function(i, o, stage == unit == 0) + function(o, o, False)
            total += 2 * i * o if bottleneck and unit == 0 else 0
    return total + 2 * filters[-1] + (filters[-1] + 1) * classes


@pytest.mark.parametrize(
    ("name", "size", "channels", "sizes", "couplings"),
    [
        ("revnet56", 224, [512, 1024, 2048, 3328], [56, 28, 14, 7], [2, 2, 4, 2]),
        ("revnet104", 224, [512, 1024, 2048, 3328], [56, 28, 14, 7], [2, 2, 20, 2]),
        ("revnet38", 32, [32, 64, 112], [32, 16, 8], [6, 4, 4]),
        ("revnet110", 32, [32, 64, 128], [32, 16, 8], [18, 16, 16]),
        ("revnet164", 32, [128, 256, 512], [32, 16, 8], [16, 16, 16]),
    ],
)
def test_the_layout_of_every_network(name, size, channels, sizes, couplings):
    net = meta(name)
    found = []
    for stage in net.stages:
        stage.register_forward_hook(lambda _, x, y: found.append([tuple(t.shape) for t in y]))
    assert net(torch.empty(2, 3, size, size, device="meta")).shape == (2, net.num_classes)
    assert found == [[(2, c // 2, s, s)] * 2 for c, s in zip(channels, sizes, strict=True)]
    assert [len(stage.body) for stage in net.stages] == couplings
    assert net.stem[0].out_channels == (128 if name in {"revnet56", "revnet104"} else 32)
    bottleneck = name not in {"revnet38", "revnet110"}
    for stage, wide in zip(net.stages, channels, strict=True):
        strided = net.stages[0] is not stage
        if isinstance(stage.entry, Transition):
            ways = [stage.entry.shortcut_1, stage.entry.shortcut_2]
            assert all(isinstance(way, nn.Conv2d if bottleneck else Shortcut) for way in ways)
            if bottleneck:
                assert all(w.kernel_size == (1, 1) and w.stride == (1 + strided,) * 2 and w.bias is None for w in ways)
        else:
            assert not bottleneck
            assert not strided
        for coupling in stage.body:
            widths = [part.out_channels for part in coupling.function if isinstance(part, nn.Conv2d)]
            assert widths == ([wide // 8, wide // 8, wide // 2] if bottleneck else [wide // 2] * 2)
            assert coupling.downsample is None
    first = net.stages[0].entry.f if bottleneck else net.stages[0].body[0].function
    functions = [m for m in net.modules() if isinstance(m, zoo.Bottleneck | Residual)]
    assert [f for f in functions if isinstance(f[0], nn.Conv2d)] == [first]  # the code's no_activation
    assert len(functions) == 2 * sum(CODE[name][0])


def test_a_unit_by_hand():
    """y1 = x1 + F(x2), y2 = x2 + G(y1), and the paper's way back."""
    stage = Stage(6, 6, units=2).double()
    f, g, *rest = (coupling.function for coupling in stage.body)
    x1, x2 = torch.randn(2, 3, 6, 5, 5, dtype=torch.float64).unbind()
    y1 = x1 + f(x2)
    y2 = x2 + g(y1)
    z1 = y1 + rest[0](y2)
    z2 = y2 + rest[1](z1)
    out = stage((x1, x2))
    assert torch.equal(out[0], z1)
    assert torch.equal(out[1], z2)
    assert isinstance(stage.body, Sequential)
    assert all(isinstance(layer, Coupling) for layer in stage.body)
    y2 = z2 - rest[1](z1)
    y1 = z1 - rest[0](y2)
    back = stage.body.inverse(out)
    torch.testing.assert_close(back, (y1 - f(y2 - g(y1)), y2 - g(y1)))
    torch.testing.assert_close(back, (x1, x2))


@pytest.mark.parametrize("bottleneck", [True, False])
def test_a_transition_by_hand(bottleneck):
    unit = Transition(4, 8, stride=2, bottleneck=bottleneck).double()
    x1, x2 = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64).unbind()

    def past(way, x):
        if bottleneck:
            return torch.einsum("oi,nihw->nohw", way.weight[:, :, 0, 0], x[:, :, ::2, ::2])
        mean = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        zeros = torch.zeros_like(mean[:, :2])
        return torch.cat([zeros, mean, zeros], 1)

    y1 = past(unit.shortcut_1, x1) + unit.f(x2)
    y2 = past(unit.shortcut_2, x2) + unit.g(y1)
    torch.testing.assert_close(unit((x1, x2)), (y1, y2))


def test_a_residual_function_by_hand():
    function = Residual(3, 4, stride=2)
    norm1, _, conv1, norm2, _, conv2 = function
    x = torch.randn(2, 3, 6, 6)
    inner = nn.functional.conv2d(norm1(x).relu(), conv1.weight, stride=2, padding=1)
    torch.testing.assert_close(function(x), nn.functional.conv2d(norm2(inner).relu(), conv2.weight, padding=1))
    assert [type(part) for part in Residual(3, 4, first=True)] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]


def test_parameters_are_registered_in_the_order_in_which_data_meets_them(net):
    met = []
    for name, module in net.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: met.append(name))
    net(torch.rand(2, 3, 32, 32))
    assert met == list(dict.fromkeys(name.rpartition(".")[0] for name, _ in net.named_parameters()))


def trained(net, x, strategy, grid):
    """Gradients and buffers after one backward pass of a copy."""
    net = copy.deepcopy(net)
    net.backprop, net.grid = strategy, grid
    net(x).square().sum().backward()
    return net, [p.grad for p in net.parameters()], list(net.buffers())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: type(each).__name__)
def test_gradients_are_those_of_stored_activations(net, strategy):
    net, x = net.double(), torch.rand(3, 3, 32, 48, dtype=torch.float64)
    _, plain, buffers = trained(net, x, Store(), None)
    other, grads, moved = trained(net, x, strategy, None)
    torch.testing.assert_close(grads, plain, rtol=1e-9, atol=1e-9 * max(g.abs().max() for g in plain).item())
    assert all(torch.equal(a, b) for a, b in zip(moved, buffers, strict=True))
    assert other.backprop == strategy
    if isinstance(strategy, Reconstruct):
        assert other.drift < 1e-12
        assert not other.drift_flag


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: type(each).__name__)
def test_on_a_grid_they_are_the_same_bits(net, strategy, autocast):
    x = torch.rand(3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, plain, _ = trained(net, x, Store(), "exact")
        other, grads, _ = trained(net, x, strategy, "exact")
        assert other(x).dtype == (torch.bfloat16 if autocast else torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
    assert all(g.abs().sum() > 0 for g, p in zip(grads, net.parameters(), strict=True) if p.ndim > 1)
    assert {chain.grid for chain in other.chains} == {other.grid}
    if isinstance(strategy, Reconstruct):
        assert other.drift == 0


def test_the_drift_is_the_largest_of_the_stages(net):
    net, x = net.train(), torch.rand(2, 3, 32, 32)
    assert net.drift is net.drift_flag is None
    net.backprop = Reconstruct(drift_warn=0, drift_error=1e9, on_drift="record")
    net(x).sum().backward()
    assert net.drift == max(chain.drift for chain in net.chains) > 0
    net.backprop = Reconstruct(drift_warn=0, drift_error=0, on_drift="record")
    net(x).sum().backward()
    assert net.drift_flag
    net.backprop = Store()
    assert net.drift is net.drift_flag is None


def test_a_budget_is_for_all_stages_together():
    """Each gets the least that it needs, and a part of the rest; it is refused in totals, before anything changes."""
    net, x = thin(bottleneck=True, units=(1, 3, 2)), torch.rand(2, 3, 32, 32)
    whole = net.plan(x)
    assert {row.layer for row in whole.rows} <= {name for name, _ in net.named_modules()}
    assert whole.peak == whole.most > 1.3 * whole.least
    alone = [chain.plan(each).least for chain, each in zip(net.chains, net._inputs(x), strict=True)]
    assert max(alone) <= whole.least < sum(alone) + sum(t.nbytes for each in net._inputs(x) for t in each)
    work = []
    for size in (whole.least, 10**10):
        net.backprop = Budget(size)
        found = net.plan(x)
        assert found.peak <= min(size, whole.most)
        assert (found.least, found.most) == (whole.least, whole.most)
        net(x).sum().backward()
        assert net.backprop == Budget(size)
        work.append(found.work)
    own = [chain.plan(each) for chain, each in zip(net.chains, net._inputs(x), strict=True)]
    assert [row.what for each in own for row in each.rows] == [row.what for row in found.rows]
    assert work == sorted(work, reverse=True)
    assert work[0] > work[-1] == 0
    net.backprop = Budget(whole.least - 1)
    before = {key: t.clone() for key, t in net.state_dict().items()}
    words = f"Budget: RevNet needs {whole.least} bytes at least for this input, got {whole.least - 1}. Take a smaller"
    for refused in (net, net.plan):
        with pytest.raises(ValueError, match=words):
            refused(x)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    net.backprop = None
    assert [chain.backprop for chain in net.chains] == [None] * 2
    assert net.backprop is None


def test_a_budget_is_divided_for_each_kind_of_input(monkeypatch):
    net = thin(bottleneck=False, units=(1, 3, 2))
    x, larger, made = torch.rand(2, 3, 32, 32), torch.rand(4, 3, 32, 64), []
    share = network.share
    monkeypatch.setattr(network, "share", lambda *given: made.append(1) or share(*given))
    least = net.plan(x).least
    net.backprop = Budget(least)
    with torch.no_grad():
        net(larger)
    assert not made
    net(x)
    shares = [chain.backprop for chain in net.chains]
    with pytest.raises(ValueError, match="Budget: RevNet needs"):
        net(larger)
    again = pickle.loads(pickle.dumps(copy.deepcopy(net)))  # noqa: S301
    assert again.backprop == Budget(least)
    net(x)
    again(x)
    assert [chain.backprop for chain in net.chains] == [chain.backprop for chain in again.chains] == shares
    assert len(made) == 2
    net.stages[0].eval().requires_grad_(False)
    net.stages[1].eval().requires_grad_(False)
    net.stem.eval().requires_grad_(False)
    net(x).sum().backward()
    assert len(made) == 3
    assert [chain.backprop for chain in net.chains] != shares
    net.chains[0].backprop = Store()  # from here on they have strategies of their own
    assert net.backprop == Store()
    net(x)
    assert len(made) == 3


@pytest.mark.slow
def test_a_budget_holds_for_the_chains_of_a_step():
    """What is outside of them is there in any case: it is what storing everything takes more than its plan."""
    with torch.device("meta"):
        net, x = thin(bottleneck=False, units=(1, 4, 3)), torch.empty(16, 3, 64, 64)
    peaks = []
    for size in (10**10, net.plan(x).least):
        net.backprop = Budget(size)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        _, memory = measure_memory(lambda: net(x).sum().backward(), "meta")
        peaks.append(memory.peak - net.plan(x).peak)
    assert peaks[1] <= 1.05 * peaks[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's compiler
def test_a_budget_in_a_network_that_is_compiled():
    net, x = thin(bottleneck=False, units=(1, 3, 2)), torch.rand(2, 3, 32, 32)
    net.backprop = Budget(net.plan(x).least)
    net(x)
    shares, net._divided = net._shares, {}
    net.backprop = net.backprop
    torch.compile(net, backend="eager")(x).sum().backward()
    assert net._shares == shares


def test_the_inverse_of_each_stage_comes_back(net):
    x = torch.rand(3, 3, 32, 64)
    for grid in (None, "exact"):
        net.grid = grid
        seen = []
        for stage in net.stages:
            stage.body.register_forward_hook(lambda body, x, y, seen=seen: seen.append((body, x[0], y)))
        net(x)
        assert len(seen) == 3
        for body, before, after in seen:
            assert body.bijective
            back = body.inverse(after)
            if grid:
                assert all(torch.equal(a, b) for a, b in zip(back, body.snap(before), strict=True))
            else:
                torch.testing.assert_close(back, before, atol=1e-4, rtol=1e-4)
        for stage in net.stages:
            stage.body._forward_hooks.clear()


@pytest.mark.parametrize("bottleneck", [True, False])
def test_no_byte_is_kept_per_unit(bottleneck):
    x = torch.rand(4, 3, 32, 32)

    def kept(units, strategy):
        net = thin(bottleneck=bottleneck, units=units)
        net.backprop = strategy
        runs = [measure_memory(lambda: net(x))[1].kept for _ in range(2)]
        return runs[1]  # what torch allocates once is not ours

    assert kept((6, 5, 7), Reconstruct()) == kept((3, 2, 4), Reconstruct())
    assert kept((6, 5, 7), Recompute()) > kept((3, 2, 4), Recompute())
    assert kept((6, 5, 7), Store()) > 1.5 * kept((3, 2, 4), Store())


def test_keys_do_not_change_and_weights_go_from_one_to_the_other(net):
    keys, x = list(net.state_dict()), torch.rand(2, 3, 32, 32)
    plain = net.eval()(x)
    other = thin(bottleneck=net.size_divisor == 1)
    for strategy in (None, *STRATEGIES):
        other.backprop, other.grid = strategy, "exact"
        assert list(other.state_dict()) == keys
        other.load_state_dict(net.state_dict())
        torch.testing.assert_close(other.eval()(x), plain)
    other.grid = None
    assert torch.equal(copy.deepcopy(other)(x), plain)
    assert net.features(x).shape == (2, net.feature_channels, 2, 2)


def test_gradients_reach_every_parameter(net):
    net.backprop = Reconstruct()
    net(torch.rand(2, 3, 64, 64)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n.endswith("weight"))


def test_sizes_that_no_stride_divides():
    """Kernels with strides round up, so that with bottlenecks any size will do."""
    net = thin(bottleneck=True)
    net.backprop = Reconstruct()
    net(torch.rand(2, 3, 35, 50)).sum().backward()
    assert net(torch.rand(2, 3, 35, 50)).shape == (2, 5)
    assert meta("revnet56")(torch.empty(2, 3, 233, 97, device="meta")).shape == (2, 1000)


REFUSALS = {
    "RevNet: height and width must be divisible by 4, got a tensor of shape (1, 3, 30, 32).": (
        lambda net: net(torch.zeros(1, 3, 30, 32))
    ),
    "RevNet: expected images of shape (batch, 3, height, width), got a tensor of shape (1, 1, 32, 32).": (
        lambda net: net.features(torch.zeros(1, 1, 32, 32))
    ),
    "RevNet: in training mode batch norm needs more than one value per channel in the last stage, "
    "got a tensor of shape (1, 3, 4, 4). Take a larger batch or image, or net.eval().": (
        lambda net: net(torch.zeros(1, 3, 4, 4))
    ),
    "RevNet: expected floating-point images, got dtype torch.uint8. Scale them: x / 255.": (
        lambda net: net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    ),
    "RevNet: expected a tensor of images, got an object of type tuple.": lambda net: net((torch.zeros(1),)),
    "RevNet: num_classes must be at least 0, got -1.": lambda net: zoo.revnet56(num_classes=-1),
    "RevNet: num_classes must be an integer, got '3'.": lambda net: zoo.revnet56(num_classes="3"),
    "RevNet: expected images of the weights' dtype, torch.float32, got torch.float64. Convert them, "
    "x.to(torch.float32), or the network, net.to(torch.float64).": (
        lambda net: net(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    ),
    "RevNet: in_channels must be at least 1, got 0.": lambda net: zoo.revnet56(in_channels=0),
    "RevNet: units must be at least 1 in each stage, and 2 in one, got (1, 1, 1).": (
        lambda net: thin(bottleneck=True, units=(1, 1, 1))
    ),
    "RevNet: units must be at least 1 in each stage, and 2 in one, got (3, 0, 1).": (
        lambda net: thin(bottleneck=True, units=(3, 0, 1))
    ),
    "RevNet: height and width must not be 0, got a tensor of shape (1, 3, 0, 4).": (
        lambda net: thin(bottleneck=True)(torch.zeros(1, 3, 0, 4))
    ),
    "RevNet: in training mode batch norm needs more than one value per channel in the last stage, "
    "got a tensor of shape (1, 3, 9, 16).": lambda net: thin(bottleneck=True)(torch.zeros(1, 3, 9, 16)),
    "backprop must be Store(), Recompute(), Reconstruct(), Budget(bytes) or None, got 'store'.": (
        lambda net: setattr(net, "backprop", "store")
    ),
    "zoo.create: revnet56 has no option 'units'; it has num_classes, in_channels.": lambda net: zoo.create(
        "revnet56", units=3
    ),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words):
    net = zoo.revnet38()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        REFUSALS[words](net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_stage_with_only_a_transition_has_no_chain():
    net = thin(bottleneck=True, units=(1, 2, 1))
    assert len(net.chains) == 1
    net.grid, net.backprop = "exact", Reconstruct()
    net(torch.rand(2, 3, 32, 32)).sum().backward()
    assert net.drift == 0


def test_its_functions_can_be_compiled(monkeypatch):
    found = []
    monkeypatch.setattr(Sequential, "compile_functions", lambda self, **options: found.append((self, options)))
    net = thin(bottleneck=True)
    net.compile_functions(dynamic=False)
    assert found == [(chain, {"dynamic": False}) for chain in net.chains]
