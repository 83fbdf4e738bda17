"""Batch norm as a layer: torch's statistics, no inverse in training, one count per step under every strategy."""

import pytest
import torch
from torch import nn

from invertible import BatchNorm, Budget, Inverse, InvertibleLinear, Recompute, Reconstruct, Sequential, Store
from invertible.testing import check_backprop
from tests.networks import assert_same, outcome, with_strategy

STRATEGIES = [Recompute(), Recompute(every=2), Reconstruct(), Budget(2**20)]
TORCHS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def batch(*size, seed=0):
    return 3 * torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(seed)).double() + 2


def pair(dims, **options):
    mine, theirs = BatchNorm(3, **options).double(), TORCHS[dims](3, **options).double()
    if mine.affine:
        with torch.no_grad():
            mine.log_scale.copy_(torch.tensor([0.5, -0.5, 0.1]))
            mine.shift.copy_(torch.tensor([1.0, 2.0, -1.0]))
            theirs.weight.copy_(mine.log_scale.exp())
            theirs.bias.copy_(mine.shift)
    return mine, theirs


@pytest.mark.parametrize("options", [{}, {"eps": 0.1, "momentum": 0.3}, {"affine": False, "momentum": 1.0}], ids=repr)
@pytest.mark.parametrize("dims", range(4))
def test_equals_torchs_layer(dims, options):
    mine, theirs = pair(dims, **options)
    torch.testing.assert_close(mine.eval()(batch(*[2] * dims)), theirs.eval()(batch(*[2] * dims)))  # before training
    for step in range(3):
        mine.train()
        theirs.train()
        x = batch(*[2] * dims, seed=step).requires_grad_()
        found, expected = mine(x), theirs(x)
        torch.testing.assert_close(found, expected)
        for a, b in zip(*(torch.autograd.grad(y.square().sin().sum(), x) for y in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(mine.running_mean, theirs.running_mean)
        torch.testing.assert_close(mine.running_var, theirs.running_var)
        torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_log_det_takes_the_statistics_for_constants(training):
    norm, _ = pair(2)
    norm(batch(2, 2, seed=5))
    norm.train(training)
    x = batch(2, 2)
    var = x.var([0, 2, 3], correction=0) if training else norm.running_var.clone()
    y, log_det = norm.forward_and_log_det(x)
    expected = 4 * (norm.log_scale - (var + norm.eps).log() / 2).sum()
    torch.testing.assert_close(log_det, expected.repeat(4))
    torch.testing.assert_close(y, norm(x))
    assert torch.autograd.gradgradcheck(norm.forward_and_log_det, x.requires_grad_(), fast_mode=True)


def test_training_mode_has_no_inverse():
    norm = BatchNorm(3).double()
    y = norm(batch(2))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    net = Inverse(norm)
    for call in (norm.inverse, norm.inverse_and_log_det, norm.off_range, net, net.forward_and_log_det):
        with pytest.raises(ValueError, match=r"there is no inverse in training mode.* Call eval\(\) to go backwards"):
            call(y)
    net.inverse(batch(2, seed=1))  # not the trained direction: nothing moves
    net.inverse_and_log_det(batch(2, seed=1))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    norm.eval()
    torch.testing.assert_close(norm.inverse(norm(batch(2))), batch(2))


def test_one_value_per_channel_is_refused_and_none_is_not():
    norm = BatchNorm(3)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with pytest.raises(ValueError, match="expected more than one value per channel in training mode"):
        norm(torch.zeros(1, 3))
    y, log_det = norm.forward_and_log_det(torch.zeros(0, 3, 2))
    assert y.shape == (0, 3, 2)
    assert log_det.shape == (0,)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(dtype):
    norm = BatchNorm(3)
    x = batch(4, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = norm.forward_and_log_det(x)
    assert y.dtype == log_det.dtype == dtype
    exact, _ = BatchNorm(3).double().forward_and_log_det(x.double())
    torch.testing.assert_close(y.double(), exact, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)
    norm.eval()
    atol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(norm.inverse(norm(x)), x, atol=atol, rtol=0)


def network():
    torch.manual_seed(0)
    mixes = [InvertibleLinear(3) for _ in range(3)]
    return Sequential(mixes[0], BatchNorm(3), mixes[1], BatchNorm(3, affine=False), mixes[2], BatchNorm(3)).double()


@pytest.mark.parametrize("method", ["forward", "forward_and_log_det"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_each_batch_counts_once_under_every_strategy(strategy, method):
    (expected, one), (found, other) = (
        outcome(with_strategy(network(), each), batch(2), method=method) for each in (Store(), strategy)
    )
    assert_same(found, expected, 1e-11)
    assert all(torch.equal(b, dict(other.named_buffers())[k]) for k, b in one.named_buffers())
    torch.testing.assert_close(other[1].running_mean, 0.1 * other[0](batch(2)).mean([0, 2]))
    if isinstance(strategy, Recompute):
        assert all(torch.equal(found[k], expected[k]) for k in found)


def test_reconstruct_keeps_its_input_in_training_alone():
    net = network()
    net.backprop = Reconstruct()
    choices = [row.choice.value for row in net.plan(batch(2)).rows]
    assert [choices[i] for i in (1, 3, 5)] == ["recompute"] * 3
    assert choices[2] == choices[4] == "reconstruct"
    choices = [row.choice.value for row in net.eval().plan(batch(2)).rows]
    assert choices[1:] == ["reconstruct"] * 5
    check_backprop(net, batch(2))
    check_backprop(net.train(), batch(2))


def test_compiles_whole_in_both_modes():
    torch.compiler.reset()
    norm, twin = BatchNorm(3).double(), BatchNorm(3).double()
    for training in (True, False):
        norm.train(training)
        twin.train(training)
        found = torch.compile(norm.forward_and_log_det, backend="aot_eager", fullgraph=True)(batch(2))
        torch.testing.assert_close(found, twin.forward_and_log_det(batch(2)))
        torch.testing.assert_close(norm.running_var, twin.running_var)
    found = torch.compile(norm.inverse, backend="aot_eager", fullgraph=True)(batch(2))
    torch.testing.assert_close(found, twin.inverse(batch(2)))
