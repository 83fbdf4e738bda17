"""A layer is run again as it ran: statistics, random numbers, autocast, modes and buffers."""

from types import MethodType

import pytest
import torch
from torch import nn

import invertible as inv
import zoo
from invertible import Coupling, Inverse, Recompute, Reconstruct, Sequential, Store
from invertible._function import is_plain
from invertible.backprop import is_replaying
from tests.networks import Averaged, Functional, UsersAffine, assert_same, deep, function, off, outcome, with_strategy

SAVING = [Reconstruct(), Recompute(), Recompute(every=2)]


def around(*functions):
    return Sequential(inv.Split(), *map(Coupling, functions), inv.Merge())


class Normed(nn.Module):
    """A norm layer in front of a function, whatever shape it wants."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return torch.sin(self.norm(x))


@pytest.mark.parametrize("strategy", SAVING)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(2), (4, 4)),
        (nn.BatchNorm1d(2), (4, 4, 5)),
        (nn.BatchNorm2d(2, momentum=None), (4, 4, 5, 5)),
        (nn.BatchNorm2d(2, track_running_stats=False), (4, 4, 5, 5)),
        (nn.BatchNorm3d(2, affine=False), (4, 4, 3, 3, 3)),
        (nn.InstanceNorm1d(2, track_running_stats=True), (4, 4, 5)),
        (nn.InstanceNorm2d(2, track_running_stats=True, affine=True), (4, 4, 5, 5)),
        (nn.InstanceNorm3d(2, track_running_stats=True), (4, 4, 3, 3, 3)),
        (nn.GroupNorm(2, 2), (4, 4, 5, 5)),
        (nn.LocalResponseNorm(2), (4, 4, 5, 5)),
        (nn.LayerNorm([2, 5, 5]), (4, 4, 5, 5)),
        (nn.RMSNorm([2, 5, 5]), (4, 4, 5, 5)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_statistics_move_once_per_step(norm, shape, training, strategy):
    net = around(*(Normed(norm) for _ in range(3))).double().train(training)
    x = torch.randn(shape, dtype=torch.float64)
    for direction in (net, Inverse(net)):
        expected, _ = outcome(direction, x)
        net.backprop = strategy
        assert_same(outcome(direction, x)[0], expected, 1e-9)
        net.backprop = None


def test_batches_are_counted_once():
    net = deep(3)
    net.backprop = Reconstruct()
    for _ in range(5):
        net(torch.randn(4, 8, 4, 4, dtype=torch.float64)).sum().backward()
    assert {int(b) for key, b in net.named_buffers() if key.endswith("tracked")} == {5}


def test_synchronized_batch_norm_is_replayed_without_its_statistics():
    """Its own synchronisation needs several GPUs; here the replay's setting alone is looked at."""
    from invertible.backprop._replay import Replay, Survey

    norm = nn.SyncBatchNorm(2)
    replay = Replay(Survey([norm]), [])
    buffers = dict(norm._buffers)
    with replay.again():
        assert not norm.track_running_stats
        assert norm.running_mean is norm.running_var is norm.num_batches_tracked is None
    assert norm.track_running_stats
    assert all(norm._buffers[key] is value for key, value in buffers.items())
    net = around(nn.SyncBatchNorm(2).eval()).double().eval()
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    assert_same(outcome(with_strategy(net, Reconstruct()), x)[0], outcome(net, x)[0])


class Replaced(Averaged):
    """A buffer that is replaced, not written."""

    def forward(self, x):
        self.mean = 0.5 * self.mean + x.detach().abs().mean()
        return torch.tanh(x / self.mean)


@pytest.mark.parametrize("strategy", SAVING)
@pytest.mark.parametrize("kind", [Averaged, Replaced])
def test_a_buffer_that_is_read_and_written_is_replayed_from_its_entry_value(kind, strategy):
    shared = kind()
    net = around(shared, kind(), shared, nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1))).double()
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    expected, _ = outcome(net, x)
    assert_same(outcome(with_strategy(net, strategy), x)[0], expected)
    for_inverse = Inverse(around(kind(), kind()).double())
    expected, _ = outcome(for_inverse, x)
    for_inverse.layer.backprop = strategy
    assert_same(outcome(for_inverse, x)[0], expected)
    for method in ("inverse", "inverse_and_log_det"):
        expected, _ = outcome(net, x, method=method)
        assert_same(outcome(with_strategy(net, strategy), x, method=method)[0], expected)


def test_a_subclass_of_batch_norm_may_read_what_it_counts():
    class Renormed(nn.BatchNorm2d):
        def forward(self, x):
            mean = self.running_mean.view(1, -1, 1, 1).clone()
            return super().forward(x) + mean

    net = around(*(Normed(Renormed(2, momentum=0.9)) for _ in range(3))).double()
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64) + 1
    assert_same(outcome(with_strategy(net, Reconstruct()), x)[0], outcome(net, x)[0])


def test_statistics_of_a_norm_written_by_hand_move_once():
    net = around(*(Functional() for _ in range(3))).double()
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64) + 1
    for direction in (net, Inverse(net)):
        net.backprop = None
        expected, _ = outcome(direction, x)
        for strategy in SAVING:
            net.backprop = strategy
            assert_same(outcome(direction, x)[0], expected)


def test_a_buffer_that_was_changed_meanwhile_is_refused():
    net = around(Normed(nn.BatchNorm2d(2))).eval()
    net.backprop = Reconstruct()
    y = net(torch.randn(4, 4, 5, 5))
    net.train()(torch.randn(4, 4, 5, 5))
    with pytest.raises(RuntimeError, match=r"BatchNorm2d\(.*\): its buffer 'num_batches_tracked' was changed between"):
        y.sum().backward()


class Noisy(nn.Module):
    """Random in a way of its own, in ``eval`` too."""

    def forward(self, x):
        return torch.tanh(x + torch.rand_like(x)) * torch.bernoulli(torch.full_like(x, 0.5))


@pytest.mark.parametrize("strategy", SAVING)
def test_random_numbers_are_drawn_again(strategy):
    parts = [Noisy(), function(2, dropout=0.4), nn.RReLU(), nn.FeatureAlphaDropout(0.5)]
    net = around(*parts, *(Noisy() for _ in range(2))).double()
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    for mode in (True, False):
        for direction in (net, Inverse(net)):
            expected, _ = outcome(direction.train(mode), x)
            net.backprop = strategy
            assert_same(outcome(direction, x)[0], expected, 1e-11)
            net.backprop = None


class NoisyLinear(nn.Linear):
    """One of torch's own layers by its class, and more."""

    def forward(self, x):
        return super().forward(x) + torch.rand(())


class NoisyCall(nn.Linear):
    """Noisy before its forward is reached."""

    def __call__(self, x):
        return super().__call__(x) * torch.rand(())


class NoisyWithin(nn.Conv1d):
    """Noisy in what forward calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * torch.rand(()), bias)


class NoisyOrder(nn.Sequential):
    """Noisy in what it iterates over."""

    def __iter__(self):
        return reversed(list(super().__iter__())) if torch.rand(()) < 0.5 else super().__iter__()


class Columns(nn.Module):
    """A function of vectors by one of sequences."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return self.convolution(x[:, :, None])[:, :, 0]


NOISY = {
    "subclass": lambda: NoisyLinear(2, 2),
    "call": lambda: NoisyCall(2, 2),
    "convolution": lambda: NoisyWithin(2, 2, 1),
    "container": lambda: NoisyOrder(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)),
}


def noise_of(kind):
    """A function of torch's own layers that somebody else has made random; and what undoes it."""
    linear = nn.Linear(2, 2)
    undo = []
    if kind == "hook":
        linear.register_forward_hook(lambda module, args, result: result + torch.rand(()))
    elif kind == "pre-hook":
        linear.register_forward_pre_hook(lambda module, args: args[0] * torch.rand(()))
    elif kind == "own forward":
        linear.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight) * torch.rand(()), linear)
    elif kind == "hook for all":

        def hook(module, args, result):
            return result * torch.rand(()) if type(module) is nn.Linear else result

        undo.append(nn.modules.module.register_module_forward_hook(hook))
    elif kind == "parametrization":
        nn.utils.parametrize.register_parametrization(linear, "weight", Noisy())
    elif kind in NOISY:
        linear = NOISY[kind]()
    if isinstance(linear, nn.Conv1d):
        linear = Columns(linear)
    return nn.Sequential(linear, nn.Tanh()), undo


@pytest.mark.parametrize("kind", NOISY)
def test_what_replaces_a_part_of_torchs_own_layers_is_none_of_them(kind):
    """Of these alone it is known that they compute the same with gradients and without."""
    assert is_plain(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), zoo.Bottleneck(4, 4)))
    assert not is_plain(nn.Sequential(NOISY[kind]()))
    replaced = nn.Conv1d(2, 2, 1)
    replaced._conv_forward = lambda *args: args[0]
    assert not is_plain(replaced)


@pytest.mark.parametrize("strategy", SAVING)
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "own forward", "hook for all", "parametrization", *NOISY])
def test_random_numbers_that_torchs_own_layers_would_not_draw_are_drawn_again(kind, strategy):
    made, undo = zip(*(noise_of(kind) for _ in range(3)), strict=True)
    net = around(*made).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    try:
        expected, _ = outcome(net, x)
        assert_same(outcome(with_strategy(net, strategy), x)[0], expected, 1e-11)
    finally:
        for handles in undo:
            for handle in handles:
                handle.remove()


def test_a_users_random_layer_is_kept_for_its_inverse_may_draw_in_another_order():
    class Both(inv.InvertibleModule):
        """Two couplings with a dropout each; backwards they come in the other order."""

        def __init__(self):
            super().__init__()
            self.a, self.b = (function(2, dropout=0.4) for _ in "ab")

        def forward(self, x, *, condition=None):
            first = x[0] + self.a(x[1])
            return first, x[1] + self.b(first)

        def inverse(self, y, *, condition=None):
            second = y[1] - self.b(y[0])
            return y[0] - self.a(second), second

    net = Sequential(inv.Split(), Both(), UsersAffine(2, dropout=0.2), Both(), inv.Merge()).double()
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    assert_same(outcome(with_strategy(net, Reconstruct()), x)[0], outcome(net, x)[0])


def test_the_streams_before_and_after_are_those_of_plain_autograd():
    """Between forward and backward the caller draws, too."""

    def run(strategy):
        net = around(function(2, dropout=0.5), Noisy())
        net.backprop = strategy
        torch.manual_seed(3)
        y = net(torch.ones(4, 4, 5, 5))
        noise = torch.rand(3)
        y.sum().backward()
        return torch.cat([noise, torch.rand(3)])

    expected = run(Store())
    for strategy in SAVING:
        assert torch.equal(run(strategy), expected)


@pytest.mark.parametrize("strategy", [*SAVING, Reconstruct(anchor_every=2)])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast_is_replayed(inside, strategy):
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    torch.manual_seed(1)
    net = around(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), Watch()) for _ in range(4)))
    x = torch.randn(2, 8, 8, 8)
    for dtype in (torch.bfloat16, torch.float16):
        expected, _ = outcome(net, x, autocast=torch.autocast("cpu", dtype), inside=inside)
        found, trained = outcome(with_strategy(net, strategy), x, autocast=torch.autocast("cpu", dtype), inside=inside)
        assert set(seen) == {dtype}
        assert off(found, expected)[0] < 1e-5
        assert trained.drift is None or trained.drift < 1e-6
        seen.clear()
    with torch.autocast("cpu", torch.bfloat16):  # a forward outside, its backward inside
        found, _ = outcome(with_strategy(net, strategy), x, autocast=torch.autocast("cpu", enabled=False))
    assert set(seen) == {torch.float32}
    assert off(found, outcome(net, x)[0])[0] < 1e-5


def test_weights_that_autocast_has_cached_without_a_graph_still_train():
    """The head shares its weight with a function that ran before it, in the same context, without a graph."""
    linear = nn.Linear(2, 2)
    net = Sequential(Coupling(linear), backprop=Reconstruct())
    with torch.autocast("cpu", torch.bfloat16):
        y = net((torch.ones(1, 2), torch.ones(1, 2)))[1]
        loss = linear(y.detach()).sum()
    (grad,) = torch.autograd.grad(loss, linear.weight)
    assert grad.any()


@pytest.mark.parametrize("strategy", SAVING)
@pytest.mark.parametrize("training", [True, False])
def test_a_switch_of_mode_before_backward_is_replayed(training, strategy):
    net = around(function(2, dropout=0.5), function(2)).double().train(training)
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)

    def gradients(strategy):
        net.backprop = strategy
        net.zero_grad()
        torch.manual_seed(5)
        y = net.train(training)(x)
        net.train(not training)
        y.square().sum().backward()
        assert all(part.training is not training for part in net.modules())
        return {k: p.grad for k, p in net.named_parameters()}

    assert_same(gradients(strategy), gradients(Store()))


def test_functions_know_that_they_are_replayed():
    said = []
    net = around(nn.Tanh(), nn.Tanh())
    net[1].function.register_forward_hook(lambda *_: said.append(is_replaying()))
    net.backprop = Reconstruct()
    y = net(torch.ones(1, 4, requires_grad=True))
    assert said == [False]
    y.sum().backward()
    assert said == [False, True]
    assert not is_replaying()


class Logged(inv.Swap):
    """Draws a number in one direction only, as for a log."""

    def forward(self, x, *, condition=None):
        torch.rand(1)
        return super().forward(x)


@pytest.mark.parametrize("strategy", [Reconstruct(), Recompute(), Recompute(every=2)])
def test_a_layer_that_moves_elements_may_draw(strategy):
    pair = tuple(torch.randn(2, 3, 2, 4, 4, dtype=torch.float64))
    net = Sequential(Coupling(function(2)), Logged(), Coupling(function(2)), Logged()).double()
    expected, _ = outcome(net, pair)
    assert_same(outcome(with_strategy(net, strategy), pair)[0], expected, 1e-9)


def test_a_coupling_whose_downsampling_draws_is_kept():
    """Run backwards in the fused rule, it would draw in another order."""
    drawing = Sequential(inv.Split(), Coupling(function(1, dropout=0.3, norm=False)), inv.Merge())
    couplings = [Coupling(function(2)), Coupling(function(2, dropout=0.3), downsample=drawing), Coupling(function(2))]
    net = Sequential(*couplings).double()
    pair = tuple(torch.randn(2, 3, 2, 4, 4, dtype=torch.float64))
    expected, _ = outcome(net, pair)
    assert_same(outcome(with_strategy(net, Reconstruct()), pair)[0], expected, 1e-9)
