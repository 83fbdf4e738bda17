"""The first batch initialises once: in training, in the trained direction, under every strategy, on all processes."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from invertible import (
    ActNorm,
    BatchNorm,
    Budget,
    ConstantAffine,
    Coupling,
    Inverse,
    InvertibleLinear,
    Merge,
    Recompute,
    Reconstruct,
    Sequential,
    Sigmoid,
    Split,
    Store,
)
from tests.distributed import on_two
from tests.networks import assert_same, function, outcome, with_strategy

STRATEGIES = [Recompute(), Recompute(every=2), Reconstruct(), Reconstruct(anchor_every=2), Budget(2**20)]
SMALL = {"bucket_cap_mb": 1e-4}


def moments(y):
    dims = [0, *range(2, y.ndim)]
    return y.mean(dims), y.var(dims, correction=0)


def assert_normal(y):
    mean, var = moments(y)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(var, torch.ones_like(var), atol=1e-5, rtol=1e-5)


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("size", [(), (3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("method", ["forward", "forward_and_log_det"])
def test_the_first_batch_is_normalised_and_no_other(size, method):
    norm = ActNorm(2)
    x = 3 * torch.randn(8, 2, *size) + torch.tensor([5.0, -100.0]).view(2, *[1] * len(size))
    y = getattr(norm, method)(x)
    if method == "forward_and_log_det":
        y, log_det = y
        var = moments(x)[1].prod().log() / 2 * x[0, 0].numel()
        torch.testing.assert_close(log_det, -var.repeat(8), atol=1e-4, rtol=1e-5)
    assert_normal(y)
    before = state(norm)
    torch.testing.assert_close(moments(norm(x + 7))[0], 7 / norm.std)
    assert same(before, state(norm))


def test_it_is_the_trained_direction_that_initialises():
    x = 3 * torch.randn(8, 2, 3) + 5
    norm = ActNorm(2)
    before = state(norm)
    assert torch.equal(norm.eval()(x), x)
    assert torch.equal(norm.train().inverse(x), x)
    norm.inverse_and_log_det(x)
    assert same(before, state(norm))
    net = Inverse(norm)
    net.inverse(x)
    norm.off_range(x)
    assert same(before, state(norm))
    y, log_det = net.forward_and_log_det(x)
    assert norm.initialized
    assert_normal(y)
    torch.testing.assert_close(log_det, -moments(x)[1].prod().log().repeat(8) / 2 * 3)
    torch.testing.assert_close(net.inverse(y), x)


def test_channels_that_do_not_vary_keep_their_scale():
    """FrEIA's issue 121: such a channel is divided by 0."""
    x = torch.stack([torch.zeros(6), torch.full((6,), 0.1), torch.full((6,), 1e8), torch.randn(6) * 1e-12], 1)
    norm = ActNorm(4)
    y = norm(x)
    assert norm.std[:3].tolist() == [1, 1, 1]
    assert y.isfinite().all()
    assert y[:, :3].abs().max() < 1e-6
    assert_normal(y[:, 3:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_first_batch_that_is_not_finite_changes_nothing(bad):
    norm = ActNorm(2)
    before = state(norm)
    x = torch.randn(4, 2)
    x[1, 1] = bad
    with pytest.raises(ValueError, match="the first batch must be finite"):
        norm(x)
    assert same(before, state(norm))
    assert_normal(norm(torch.randn(4, 2)))


def test_an_empty_batch_is_no_first_batch():
    norm = ActNorm(2)
    assert norm(torch.zeros(0, 2, 3)).shape == (0, 2, 3)
    assert not norm.initialized
    assert_normal(norm(torch.randn(4, 2) + 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    norm = ActNorm(2)
    x = (3 * torch.randn(8, 2, 4) + 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = norm.forward_and_log_det(x)
    assert y.dtype == log_det.dtype == dtype
    torch.testing.assert_close(moments(y.double())[0], torch.zeros(2).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(norm.inverse(y), x, atol=1e-9 if dtype == torch.float64 else 0.1, rtol=0)


@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy", "assign", "in place"])
def test_what_was_initialised_stays_so(how):
    first, norm = ActNorm(2), ActNorm(2)
    first(torch.randn(4, 2) + 5)
    if how == "deepcopy":
        norm = copy.deepcopy(first)
    elif how == "in place":  # as torch.distributed.checkpoint loads
        for key, value in norm.state_dict().items():
            value.copy_(first.state_dict()[key])
    else:
        norm.load_state_dict(first.state_dict(), assign=how == "assign")
    before = state(first)
    norm(torch.randn(4, 2) - 5)
    assert same(state(norm), before)
    norm.load_state_dict(ActNorm(2).state_dict())
    assert_normal(norm(torch.randn(4, 2) - 5))  # and what was not, was not
    norm.reset_parameters()
    assert_normal(norm(torch.randn(4, 2) + 5))


def test_a_function_that_contains_one():
    """In the inverse it works on copies: what it learns there is forgotten."""
    coupling = Coupling(nn.Sequential(ActNorm(2), nn.Tanh()))
    pair = (torch.randn(4, 2), torch.randn(4, 2) + 5)
    coupling.inverse(pair)
    norm = coupling.function[0]
    assert not norm.initialized
    coupling(pair)
    assert norm.initialized
    torch.testing.assert_close(norm.mean, pair[1].mean(0))


def network():
    torch.manual_seed(0)
    coupling = Coupling(nn.Sequential(ActNorm(2), *function(2, dims=1, norm=False)))
    layers = [InvertibleLinear(4), ActNorm(4), Split(), coupling, Merge(), ActNorm(4), InvertibleLinear(4), ActNorm(4)]
    return Sequential(*layers).double()


def batch(seed=0, size=4):
    return 3 * torch.randn(size, 4, 5, generator=torch.Generator().manual_seed(seed)).double() + 2


def norms(net):
    return [part for part in net.modules() if isinstance(part, ActNorm)]


@pytest.mark.parametrize("wrap", [lambda net: net, Inverse], ids=["forward", "inverse"])
@pytest.mark.parametrize("method", ["forward", "forward_and_log_det"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_the_first_step_has_the_gradients_of_store(strategy, method, wrap):
    if method == "forward_and_log_det" and wrap is Inverse:
        return
    if method == "forward_and_log_det":
        net = Sequential(InvertibleLinear(4), ActNorm(4), InvertibleLinear(4), ActNorm(4)).double()
    else:
        net = network()
    steps = [outcome(wrap(with_strategy(net, each)), batch(), method=method) for each in (Store(), strategy)]
    (expected, one), (found, other) = steps
    assert_same(found, expected, 1e-12)
    assert same(dict(one.named_buffers()), dict(other.named_buffers()))
    assert all(norm.initialized for norm in norms(other))
    if isinstance(strategy, Recompute):
        assert all(torch.equal(found[k], expected[k]) for k in found)
    (expected, _), (found, _) = (outcome(each, batch(1), method=method) for each in (one, other))  # and the second one
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_one_layer_twice_and_two_batches_before_backward(strategy):
    def accumulated(strategy):
        net = network()
        net = Sequential(net[0], net[1], net[6], net[1], net[0], backprop=strategy).double()
        loss = sum((net(batch(seed)) * torch.linspace(0.5, 1.5, 80).view(4, 4, 5)).sum() for seed in range(2))
        loss.backward()
        found = {k: p.grad for k, p in net.named_parameters()}
        return found | {k: b.clone() for k, b in net.named_buffers()}

    assert_same(accumulated(strategy), accumulated(Store()), 1e-12)


def test_a_change_between_forward_and_backward_is_found():
    net = network()
    net.backprop = Reconstruct()
    net(batch())
    y = net(batch())
    net[5].mean.zero_()
    with pytest.raises(RuntimeError, match="its buffer 'mean' was changed between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_initialised_or_in_eval_it_compiles_whole(training):
    norm = ActNorm(3).train(training)
    x = torch.randn(4, 3, 2) + 5
    if training:
        norm(x)
        norm.load_state_dict(norm.state_dict())
    torch.compiler.reset()
    for method in (norm.inverse, norm.forward_and_log_det):
        torch.testing.assert_close(torch.compile(method, backend="aot_eager", fullgraph=True)(x), method(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at what it should not
@pytest.mark.parametrize("strategy", [Store(), Reconstruct()], ids=repr)
def test_a_compiled_first_step_initialises(strategy):
    torch.compiler.reset()
    start = Sequential(ActNorm(4), Split(), Coupling(nn.Tanh()), Merge(), ActNorm(4)).double()
    expected, plain = outcome(start, batch())
    net = with_strategy(start, strategy)
    found, _ = outcome(net, batch(), copies=False, compiled=torch.compile(net, backend="aot_eager"))
    assert_same(found, expected, 1e-12)
    assert all(norm.initialized for norm in norms(net))
    expected, _ = outcome(plain, batch(1))
    found, _ = outcome(net, batch(1), copies=False, compiled=torch.compile(net, backend="aot_eager"))
    assert_same(found, expected, 1e-12)


def test_export_in_training_wants_a_first_batch():
    norm = ActNorm(3)
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="can't be initialised while exporting"):
        torch.export.export(norm, (x,), strict=False)
    norm(x)
    program = torch.export.export(norm, (x,), strict=False)
    torch.testing.assert_close(program.module()(x + 1), norm(x + 1))


def test_planning_is_no_first_batch():
    net = network()
    net.backprop = Budget(2**20)
    net.plan(batch())
    assert not any(norm.initialized for norm in norms(net))
    net(batch())
    assert all(norm.initialized for norm in norms(net))


def loss_of(y):
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).square().sum()


def trained(net, run, batches):
    """Two steps; the parameters and buffers after each."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    found = []
    for step in range(2):
        for x, share in batches(step):
            (loss_of(run(x)) * share).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(
            {k: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for k, p in net.named_parameters()}
        )
        found.append({k: b.clone() for k, b in net.named_buffers()})
    return found


def whole(p):
    return p.full_tensor() if isinstance(p, DTensor) else p


def half(rank, step):
    return batch(10 * step + rank, 3 + rank)  # batches need not be of one size


def one_of_two(rank, strategies):
    found = []
    for strategy in strategies:
        net = with_strategy(network(), strategy)
        found.append(trained(net, DistributedDataParallel(net, **SMALL), lambda step: [(half(rank, step), 1.0)]))
        net = with_strategy(network(), strategy)
        mesh = init_device_mesh("cpu", (2,))
        for layer in net:
            fully_shard(layer, mesh=mesh)
        found.append(trained(net, fully_shard(net, mesh=mesh), lambda step: [(half(rank, step), 1.0)]))
    return found, one_without(rank, bad=False), one_without(rank, bad=True)


def one_without(rank, *, bad):
    """One process has no samples, the other one may have bad ones."""
    norm = ActNorm(2)
    x = torch.randn(4, 2) / (0 if bad else 1) if rank == 0 else torch.zeros(0, 2)
    try:
        norm(x)
    except ValueError as error:
        return str(error), state(norm)
    return "", state(norm)


def test_two_processes_have_the_statistics_of_both_batches():
    """Under DDP and FSDP2."""

    def apart(step):
        return [(half(0, step), 0.5), (half(1, step), 0.5)]

    net = network()
    net(torch.cat([half(rank, 0) for rank in range(2)]))  # the statistics of all samples
    expected = trained(net, net, apart)
    (first, good, bad), (second, also_good, also_bad) = on_two(one_of_two, [Store(), Reconstruct(), Recompute()])
    for found in (*first, *second):
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs, 1e-9)
    assert same(good[1], also_good[1])
    assert good[1]["initialized"]
    for message, kept in (bad, also_bad):
        assert "the first batch must be finite" in message
        assert same(kept, state(ActNorm(2)))


@pytest.mark.parametrize("strategy", [Store(), Recompute(), Reconstruct()], ids=repr)
@pytest.mark.parametrize("inside", [False, True])
def test_a_backward_pass_of_the_other_direction_is_no_first_batch(strategy, inside):
    """Reconstruction runs the layer forwards there, as a layer of the chain and as a coupling's S."""
    torch.manual_seed(0)
    layers = [ActNorm(2), ConstantAffine(2.0)]
    if inside:
        layers = [Split(), *(Coupling(nn.Linear(2, 2), downsample=ActNorm(2)) for _ in "ab"), Merge()]
    net, plain = Sequential(*layers, backprop=strategy), Sequential(*copy.deepcopy(layers))
    x = torch.rand(4, 4 if inside else 2)
    for each in (net, plain):
        each.inverse(x.clone().requires_grad_()).square().sum().backward()
    for (key, p), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, msg=key)
    assert not any(part.initialized for part in net.modules() if isinstance(part, ActNorm))


@pytest.mark.parametrize("s", [BatchNorm(2), Sigmoid()], ids=repr)
def test_a_coupling_keeps_its_input_if_what_it_downsamples_by_asks_for_it(s):
    net = Sequential(ConstantAffine(9.0), Split(), Coupling(nn.Linear(2, 2), downsample=s), Merge())
    x = torch.randn(8, 4)
    found = []
    for strategy in (Store(), Reconstruct()):
        each = copy.deepcopy(net)
        each.backprop = strategy
        each(x).sum().backward()
        found.append([p.grad for p in each.parameters()])
    torch.testing.assert_close(*found)
