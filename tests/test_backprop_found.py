"""What an independent review broke, each as it was found."""

import sys
import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import invertible as inv
from invertible import Coupling, Parallel, Recompute, Reconstruct, Sequential, Store
from invertible.testing import check_backprop, measure_memory
from tests.networks import Averaged, Functional, UsersAffine, assert_same, deep, function, outcome, with_strategy
from tests.rows import Scale

SAVING = [Reconstruct(), Recompute(), Recompute(every=2)]
saving = pytest.mark.parametrize("strategy", SAVING)


def around(*functions):
    return Sequential(inv.Split(), *map(Coupling, functions), inv.Merge())


def data(*shape):
    return torch.randn(*(shape or (4, 4, 5, 5)), dtype=torch.float64)


def test_zeros_that_enter_a_chain_stay_zeros():
    """They came back as noise of either sign, and ReLU let half of it through."""
    relu = lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1))  # noqa: E731
    net = Sequential(*[Coupling(relu()) for _ in range(4)])
    pair = (torch.randn(4, 2, 5, 5), torch.zeros(4, 2, 5, 5))
    assert_same(outcome(with_strategy(net, Reconstruct()), pair)[0], outcome(net, pair)[0], 1e-5)


@pytest.mark.parametrize("inner", [None, Reconstruct(anchor_every=100)])
@pytest.mark.parametrize("between", [[], [inv.Swap()]])
def test_zeros_of_an_injective_layer_stay_zeros_inside_a_network(between, inner):
    """Batch norm made gradients 7e-5 off of them; the layer after the padding keeps its input, wherever it is."""
    torch.manual_seed(1)
    wide = inv.Inverse(inv.Merge())
    body = Sequential(*[Coupling(function(8)) for _ in range(4)], backprop=inner)
    net = Sequential(wide, Coupling(nn.Tanh()), inv.Merge(), inv.PadSplit(4, 16), *between, body, inv.Merge())
    x = torch.randn(4, 4, 6, 6)
    assert_same(outcome(with_strategy(net, Reconstruct()), x)[0], outcome(net, x)[0], 2e-5)


def test_a_small_stream_is_not_hidden_by_a_large_one():
    class Off(inv.InvertibleModule):
        def forward(self, x, *, condition=None):
            return 2 * x[0], 2 * x[1]

        def inverse(self, y, *, condition=None):
            return y[0] / 2, y[1] / 3

    net = Sequential(Parallel(Scale(), Scale()), Off(), backprop=Reconstruct())
    pair = (1e4 * torch.randn(3, 4), 1e-3 * torch.randn(3, 4, requires_grad=True))
    with pytest.raises(inv.DriftError):
        net((pair[0].requires_grad_(), pair[1]))[0].sum().backward()


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_the_drift_of_very_small_and_very_large_values(size):
    class Off(Scale):
        def inverse(self, y, *, condition=None):
            return 1.5 * super().inverse(y)

    for layer, expected in ((Off(), 0.5), (Scale(), 0.0)):
        net = Sequential(Scale(), layer, Scale(), backprop=Reconstruct(drift_warn=1, drift_error=1))
        net((size * torch.randn(3, 4)).requires_grad_()).sum().backward()
        assert net.drift == pytest.approx(expected, abs=1e-5)


@saving
def test_frozen_parameters_may_not_change_either(strategy):
    net, x = with_strategy(deep(4, channels=2), strategy), data().requires_grad_()
    net[2].requires_grad_(False)
    y = net(x)
    with torch.no_grad():
        next(net[2].parameters()).mul_(1 + 1e-5)
    with pytest.raises(RuntimeError, match="a parameter was changed in place between forward and backward"):
        y.sum().backward()
    net.requires_grad_(False)
    y = torch.func.functional_call(net, {k: 1.5 * p for k, p in net.named_parameters()}, x)
    with pytest.raises(RuntimeError, match="its parameters are no longer those of the forward pass"):
        y.sum().backward()
    net.requires_grad_(True)
    y = torch.func.functional_call(net, {k: 1.5 * p.detach() for k, p in net.named_parameters()}, x)
    with pytest.raises(RuntimeError, match="its parameters are no longer those of the forward pass"):
        y.sum().backward()


@saving
def test_an_isometric_layer_may_have_parameters(strategy):
    class Rotation(inv.InvertibleModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        @property
        def isometric(self):
            return True

        def forward(self, x, *, condition=None):
            return x @ torch.matrix_exp(self.weight - self.weight.T)

        def inverse(self, y, *, condition=None):
            return y @ torch.matrix_exp(self.weight.T - self.weight)

    net, x = Sequential(Rotation(), Rotation()).double(), data(3, 4)
    assert_same(outcome(with_strategy(net, strategy), x)[0], outcome(net, x)[0], 1e-9)


@saving
def test_a_trained_tensor_from_outside_is_found_at_any_step(strategy):
    class Later(nn.Module):
        outside = None

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.conv(x) if self.outside is None else self.conv(x) * self.outside[0]

    net = with_strategy(around(Later(), Later()), strategy)
    net(torch.randn(4, 4, 5, 5)).sum().backward()
    for layer in net[1:3]:
        layer.function.outside = [torch.ones((), requires_grad=True)]  # in a list, where no module looks
    with pytest.raises(RuntimeError, match="is none of its parameters"):
        net(torch.randn(4, 4, 5, 5)).sum().backward()


@saving
def test_the_first_step_does_not_decide_what_a_norm_writes(strategy):
    class Renorm(nn.BatchNorm2d):
        pass

    def run(strategy):
        torch.manual_seed(0)
        net = with_strategy(around(*(nn.Sequential(Renorm(2), nn.Tanh()) for _ in range(3))), strategy)
        net(torch.zeros(4, 4, 5, 5)).sum().backward()
        net(torch.randn(4, 4, 5, 5)).sum().backward()
        return {k: b.double() for k, b in net.named_buffers()}

    assert_same(run(strategy), run(None), 1e-5)


@saving
@pytest.mark.parametrize("before", ["eval", "inverse"])
def test_a_run_that_writes_nothing_does_not_decide_what_is_written(before, strategy):
    def run(strategy):
        torch.manual_seed(0)
        net = with_strategy(around(*(Functional() for _ in range(3))), strategy)
        x = torch.randn(4, 4, 5, 5, requires_grad=True)
        (net.eval()(x) if before == "eval" else net.inverse(x)).sum().backward()
        net.train()(x).sum().backward()
        return dict(net.named_buffers())

    assert_same(run(strategy), run(None), 1e-5)


@saving
@pytest.mark.parametrize("method", ["inverse", "inverse_and_log_det"])
def test_the_untrained_direction_of_the_swapped_map_moves_nothing_in_the_replay(method, strategy):
    net = inv.Inverse(around(*(Averaged() for _ in range(3))).double())
    x = data()
    expected, _ = outcome(net, x, method=method)
    net.layer.backprop = strategy
    assert_same(outcome(net, x, method=method)[0], expected)


@saving
def test_another_network_is_trained_by_a_hook_in_between(strategy):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Sequential(inv.Split(), Coupling(function(1)), inv.Merge())

        def forward(self, x):
            return torch.tanh(self.body(x))

    net, other = around(*(Nested() for _ in range(3))).double(), around(*(Nested() for _ in range(3))).double()
    data_of = data()
    expected, _ = outcome(net, data_of)
    theirs, _ = outcome(other, data_of)
    net.backprop = other.backprop = strategy
    found = []

    def train_the_other(*_):
        with torch.enable_grad(), torch.random.fork_rng():  # inside a segment there are no gradients
            found.append(outcome(other, data_of)[0])

    net[2].register_forward_hook(train_the_other)
    mine, _ = outcome(net, data_of)
    assert_same(mine, expected)
    for each in found:
        assert_same(each, theirs)


def test_values_kept_for_another_strategy_are_freed_by_the_backward_pass():
    net = Sequential(
        *[Coupling(function(8)) for _ in range(3)], Sequential(inv.Swap(), backprop=Store()), Coupling(nn.Tanh())
    )
    net.backprop = Reconstruct()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    pair = tuple(torch.randn(4, 8, 16, 16) for _ in "ab")

    def step(retain):
        loss = sum(t.sum() for t in net(pair))
        loss.backward(retain_graph=retain)
        return loss

    step(False)
    loss, memory = measure_memory(lambda: step(False))
    assert memory.kept < pair[0].nbytes / 2  # the loss, and the probes of what entered
    assert not loss.isnan()
    loss = step(True)
    loss.backward()


@saving
def test_buffers_that_modules_share(strategy):
    class Both(nn.Module):
        def __init__(self, second):
            super().__init__()
            flat = torch.ones(2)
            self.a, self.b = Averaged(flat[0]), Averaged(second(flat))

        def forward(self, x):
            return self.b(self.a(x))

    def run(second, strategy):
        net = Sequential(Coupling(nn.Tanh()), Coupling(Both(second))).double()
        net.backprop = strategy
        net[1].function.b.mean = second(net[1].function.a.mean[None])
        torch.manual_seed(1)
        pair = tuple(data(3, 2).requires_grad_() for _ in "ab")
        sum(t.square().sum() for t in net(pair)).backward()
        return {"a": pair[0].grad, "b": pair[1].grad}

    same = lambda flat: flat if flat.ndim == 0 else flat[0]  # noqa: E731
    with pytest.raises(RuntimeError, match=r"its buffer 'mean' was written and shares memory with the buffer 'mean'"):
        run(same, strategy)


@pytest.mark.parametrize("outer", [Store(), *SAVING])
@saving
def test_a_network_in_a_function_that_runs_on_copies_of_its_buffers(outer, strategy):
    """In training ``inverse`` leaves buffers alone: the network inside took its copies for the true ones."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            norm = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.net = Sequential(inv.InvertibleLinear(4), inv.Split(), Coupling(norm), inv.Merge())

        def forward(self, x):
            return self.net(x).tanh()

    net = around(Inner(), Inner()).double()
    y = data(6, 8)

    def run(outer, strategy):
        net.zero_grad()
        net.backprop = outer
        for coupling in net[1:3]:
            coupling.function.net.backprop = strategy
        net.inverse(y).square().sum().backward()
        return {key: p.grad.clone() for key, p in net.named_parameters()}

    before = {key: b.clone() for key, b in net.named_buffers()}
    assert_same(run(outer, strategy), run(Store(), Store()), 1e-11)
    assert all(torch.equal(b, before[key]) for key, b in net.named_buffers())


@saving
def test_two_backwards_through_a_buffer_that_is_written(strategy):
    net = with_strategy(around(*(Averaged() for _ in range(3))).double(), strategy)
    x = data().requires_grad_()
    y = net(x).square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)


@saving
def test_parametrizations_cached_around_backward_alone_are_refused(strategy):
    net = with_strategy(Sequential(UsersAffine(2), UsersAffine(2)), strategy)
    for layer in net:
        nn.utils.parametrizations.weight_norm(layer.net[-1])
    pair = tuple(torch.randn(4, 2, 5, 5, requires_grad=True) for _ in "ab")
    y = sum(t.sum() for t in net(pair))
    with (
        parametrize.cached(),
        pytest.raises(RuntimeError, match="cannot be run again while parametrizations are cached"),
    ):
        y.backward()
    with parametrize.cached():
        sum(t.sum() for t in net(pair)).backward()
    assert all(p.grad is not None for p in net.parameters())


class WithInteger(inv.InvertibleModule):
    """Moves an integer stream along."""

    def forward(self, x, *, condition=None):
        return 2 * x[0], x[1] + 1

    def inverse(self, y, *, condition=None):
        return y[0] / 2, y[1] - 1


@pytest.mark.parametrize("own", [None, Reconstruct(anchor_every=9), Recompute(), Store()])
def test_integer_streams_in_branches_of_their_own(own):
    branch = Parallel(*(Sequential(inv.Permute.reversed(2), backprop=own) for _ in "ab"))
    net = Sequential(WithInteger(), WithInteger(), branch, WithInteger(), backprop=Reconstruct())
    x = torch.randn(3, 2, requires_grad=True)
    y = net((x, torch.arange(6).view(3, 2)))
    y[0].sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 8))
    assert torch.equal(y[1], torch.tensor([[4, 3], [6, 5], [8, 7]]))


@pytest.mark.parametrize("used", [0, 1])
def test_branches_of_other_strategies_of_which_one_is_used(used):
    def make(outer, a, b):
        torch.manual_seed(2)
        scale = lambda: Sequential(Scale(), Scale())  # noqa: E731
        branches = Parallel(scale(), scale())
        branches[0].backprop, branches[1].backprop = a, b
        return Sequential(Coupling(function(2)), Coupling(function(2)), branches, backprop=outer).double()

    pair = tuple(data(4, 2, 5, 5) for _ in "ab")
    grads = []
    for net in (make(None, None, None), make(Reconstruct(), Store(), Recompute()), make(Reconstruct(), None, Store())):
        given = tuple(t.clone().requires_grad_() for t in pair)
        net(given)[used].square().sum().backward()
        grads.append({str(i): t.grad for i, t in enumerate((*given, *net.parameters()))})
    assert_same(grads[1], grads[0])
    assert_same(grads[2], grads[0])


def test_a_mixin_may_define_the_directions():
    class Doubles:
        def forward(self, x, *, condition=None):
            y1, y2 = super().forward(x, condition=condition)
            return y1, 2 * y2

        def inverse(self, y, *, condition=None):
            return super().inverse((y[0], y[1] / 2), condition=condition)

    class Mixed(Doubles, Coupling):
        pass

    net, x = Sequential(inv.Split(), *(Mixed(function(2)) for _ in range(3)), inv.Merge()).double(), data()
    assert_same(outcome(with_strategy(net, Reconstruct()), x)[0], outcome(net, x)[0])


@saving
def test_a_condition_may_be_a_named_tuple(strategy):
    class Times(NamedTuple):
        t: torch.Tensor
        word: str

    class Timed(nn.Module):
        def forward(self, x, condition):
            assert condition.word == "now"
            return torch.tanh(x * condition.t)

    net = Sequential(*[Coupling(Timed()) for _ in range(3)], backprop=strategy)
    t = torch.full((2, 1), 0.5, requires_grad=True)
    sum(s.sum() for s in net((torch.ones(2, 3), torch.ones(2, 3)), condition=Times(t, "now"))).backward()
    assert t.grad.all()


# Hooks that do what hooks should not


@pytest.mark.parametrize("inner", [None, Store(), Recompute()])
def test_a_value_that_a_hook_changes_in_place_is_refused(inner):
    """Before a container with a strategy of its own only a drift would show it."""
    net = Sequential(Scale(), Scale(), Sequential(Scale(), backprop=inner), backprop=Reconstruct())

    def double(module, args, output):
        output.detach().mul_(2)

    net[1].register_forward_hook(double)
    with pytest.raises(RuntimeError, match="A value between two layers was changed in place, by a hook"):
        net(torch.randn(2, 3, requires_grad=True))


@pytest.mark.parametrize("cut", [torch.Tensor.detach, lambda y: y.detach().requires_grad_().view(y.shape)])
def test_a_hook_may_cut_the_graph(cut):
    """The value behind the cut is the same, but no gradient comes that way: the layer before keeps its output."""
    net = Sequential(*[Scale() for _ in range(4)], backprop=Reconstruct())
    taken = []

    def hook(module, args, output):
        taken.append(output)
        return cut(output)

    net[1].register_forward_hook(hook)
    x = torch.randn(2, 3, requires_grad=True)
    net(x)
    taken[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.25))


def test_a_kept_value_changed_in_place_raises():
    net = Sequential(*[Coupling(nn.Tanh()) for _ in range(3)], backprop=Reconstruct())
    taken = []
    net[1].register_forward_hook(lambda module, args, output: taken.append(output) or tuple(t * 1 for t in output))
    y = net((torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)))
    with torch.no_grad():
        taken[0][1].detach().mul_(2)
    with pytest.raises(RuntimeError, match="its output was changed in place between forward and backward"):
        sum(t.sum() for t in y).backward()


def test_a_norm_without_statistics_in_the_replay_is_explained():
    class Reads(nn.BatchNorm2d):
        __module__ = "torch.nn.modules.batchnorm"  # as a norm of torch's own would

        def forward(self, x):
            return super().forward(x) / self.running_var.sum()

    net = with_strategy(around(Reads(2), Reads(2)), Reconstruct())
    with pytest.raises(AttributeError) as error:
        net(torch.randn(4, 4, 5, 5)).sum().backward()
    assert any("where norms in training have no statistics" in note for note in error.value.__notes__)


def test_weights_cast_without_a_graph_are_not_reused_in_the_replay():
    """A function that two layers share, under autocast around both passes."""
    shared = nn.Conv2d(2, 2, 1)
    net = around(shared, shared, nn.Sequential(shared, nn.Tanh()))
    x = torch.randn(4, 4, 5, 5)
    expected, _ = outcome(net, x, autocast=torch.autocast("cpu", torch.bfloat16), inside=True)
    for strategy in SAVING:
        found, _ = outcome(with_strategy(net, strategy), x, autocast=torch.autocast("cpu", torch.bfloat16), inside=True)
        assert_same(found, expected, 1e-2)


def test_threads_do_not_lose_the_statistics_of_a_norm():
    net = with_strategy(around(*(nn.Sequential(nn.BatchNorm2d(2), nn.Tanh()) for _ in range(3))), Reconstruct())
    errors = []

    def train():
        try:
            for _ in range(10):
                torch.autograd.grad(net(torch.randn(4, 4, 3, 3)).sum(), list(net.parameters()))
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=train) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(b is not None for _, b in net.named_buffers())
    assert len(list(net.buffers())) == 9
    assert all(part.track_running_stats for part in net.modules() if isinstance(part, nn.BatchNorm2d))


# The tools


def test_check_backprop_and_odd_networks():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]))
            self.register_buffer("flags", torch.tensor([True, False]))
            self.register_buffer("holes", torch.tensor([torch.nan, 1.0]))

        def forward(self, x):
            return torch.tanh(x) + self.mask.exp().sum()

    report = check_backprop(around(Masked(), Masked()), torch.randn(3, 4))
    assert all(row.buffers for row in report.rows)
    shared = Coupling(nn.Tanh())
    report = check_backprop(Sequential(shared, shared, Coupling(shared.function)), (torch.ones(2, 3), torch.ones(2, 3)))
    assert [row.evaluations for row in report.rows] == [3, 6, 6]
    with torch.no_grad():
        assert check_backprop(deep(3), data(4, 8, 4, 4)).rows[2].gradients > 0


def test_check_backprop_compares_with_plain_autograd_throughout():
    class Wrong(Scale):
        def inverse(self, y, *, condition=None):
            return 0.5 * super().inverse(y)

    inner = Sequential(Scale(), Squared(), Wrong(), backprop=Reconstruct(drift_warn=9, drift_error=9))
    with pytest.raises(AssertionError):
        check_backprop(Sequential(Squared(), inner, Scale()), 1 + torch.rand(3, 4), strategies=(Recompute(),))


class Squared(Scale):
    """Its derivative depends on its input."""

    def forward(self, x, *, condition=None):
        return x.square()

    def inverse(self, y, *, condition=None):
        return y.sqrt()


def test_check_backprop_takes_its_limit_from_the_outputs():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.body = Sequential(Squared(), Squared(), Bent(), Squared())

        def forward(self, x):
            return self.body(1 + self.embedding(x).sigmoid())

    class Bent(Squared):
        def inverse(self, y, *, condition=None):
            return 1.002 * super().inverse(y)

    with pytest.raises(AssertionError, match="its inverse is off by 2e-03"):
        check_backprop(Embedded(), torch.tensor([[1], [2], [3]]).view(3, 1)[:, 0], strategies=(Reconstruct(),))


def test_measure_memory_does_not_nest():
    with pytest.raises(RuntimeError, match="a profiler is running already"):
        measure_memory(lambda: measure_memory(lambda: None))
