"""A budget of bytes: what reviews found. Planning must leave no trace, and the plan's choices no mark on gradients."""

import collections
import copy
import functools
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import invertible as inv
from invertible import Budget, Coupling, Recompute, Reconstruct, Sequential, Store
from invertible.backprop import Choice, _budget
from invertible.backprop.plan import Decision


class Runs(nn.Module):
    """A linear layer that does something before it computes."""

    def __init__(self, before, **attributes):
        super().__init__()
        self.linear, self.before = nn.Linear(4, 4), before
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        self.before(self)
        return self.linear(x)


def stack(*functions, **options):
    return Sequential(inv.Split(), *map(Coupling, functions), inv.Merge(), **options)


def gradients(net, x, strategy):
    net = copy.deepcopy(net)
    net.backprop = strategy
    x = x.clone().requires_grad_()
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [x.grad, *(p.grad for p in net.parameters())]


def budgets(net, x, count):
    net.backprop = Store()
    plan = net.plan(x.clone().requires_grad_())
    return [plan.least + i * (plan.most - plan.least) // (count - 1) for i in range(count)]


@functools.lru_cache(maxsize=8)
def _positions(size):
    return torch.linspace(0, 1, size)


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x * _positions(x.shape[1]))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it, but not from pytest
@pytest.mark.parametrize("strategy", [Budget(1), Budget(10**6), Recompute(), Reconstruct()])
@pytest.mark.parametrize("trained", [True, False])
def test_a_tensor_without_data_in_a_cache_is_refused(strategy, trained):
    net, x = stack(Cached(), Cached(), backprop=Store()).requires_grad_(trained), torch.randn(16, 8)
    _positions.cache_clear()
    if strategy == Budget(1):
        strategy = Budget(net.plan(x).least)
    _positions.cache_clear()
    net.backprop = strategy
    if not isinstance(strategy, Budget):
        net.plan(x)
    with pytest.raises(RuntimeError, match=r"^Coupling\(.*must not keep tensors that it made while planning"):
        net(x).sum().backward()
    _positions.cache_clear()
    net(x)
    _positions.cache_clear()


def bottleneck(width):
    return nn.Sequential(nn.Conv2d(width, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, width, 1))


@pytest.mark.parametrize("grid", [None, "exact"])
@pytest.mark.parametrize("products", [(1,), (4,), (1, 4)])
def test_products_beside_those_of_couplings_inside_are_not_given_back(monkeypatch, grid, products):
    """The way back runs S and F in another order, and those in the middle look alike."""
    torch.manual_seed(0)
    inner = Sequential(inv.Split(), Coupling(bottleneck(8)), inv.Merge())
    net = Sequential(inv.Split(), Coupling(bottleneck(16), downsample=inner), inv.Merge(), grid=grid)
    x, decision = torch.randn(2, 32, 6, 6), Decision(Choice.RECONSTRUCT, products)
    expected = gradients(net, x, Store())
    monkeypatch.setattr(_budget, "decisions", lambda net, *_: [(net[1], decision)])
    found = gradients(net, x, Budget(1, Reconstruct(on_drift="record")))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= (0 if grid else 1e-4) * b.norm()


@pytest.mark.parametrize(
    ("before", "make"),
    [
        (lambda f: f.kept.add_(1), lambda: torch.zeros(())),
        (lambda f: f.__setattr__("kept", f.kept.mul_(0.9).add_(1)), lambda: torch.ones(4)),
        (lambda f: f.kept[0].add_(1), lambda: [torch.zeros(3)]),
        (lambda f: f.kept.__setitem__(0, f.kept[0] + 1), lambda: np.zeros(1)),
        (lambda f: f.kept["a"].__iadd__(1), lambda: {"a": np.zeros((2, 3))}),
        (lambda f: f.kept.update(forward=1), lambda: collections.Counter(a=3)),
        (lambda f: f.kept.move_to_end("a"), lambda: collections.OrderedDict(a=3, b=4)),
        (lambda f: f.kept.append(9), lambda: collections.deque([1, 2], maxlen=2)),
        (lambda f: f.kept.add(9), lambda: {1, 2}),
    ],
)
def test_planning_puts_attributes_back(before, make):
    net = stack(Runs(before, kept=make()), Runs(before, kept=make()), backprop=Store())
    kept = [coupling.function.kept for coupling in net[1:3]]
    net.plan(torch.randn(2, 8))
    for coupling, same in zip(net[1:3], kept, strict=True):
        assert coupling.function.kept is same
        assert type(same) is type(make())
        assert repr(same) == repr(make())


def test_a_step_count_is_that_of_store():
    def ramp(function):
        function.steps += 1

    for strategy in (Store(), Budget(10**9)):
        net = stack(Runs(ramp, steps=torch.zeros(())), backprop=strategy)
        for _ in range(2):
            net(torch.randn(2, 8)).sum().backward()
        assert net[1].function.steps == 2


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, type("Own", (nn.BatchNorm1d,), {})])
@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize("strategy", [Budget(10**7), Budget(1500)])
def test_a_norm_that_reads_its_count_is_planned_backwards_too(kind, method, strategy):
    """In training ``inverse`` runs functions on copies of their buffers, and those of counts had no data."""
    torch.manual_seed(0)
    net = stack(*(nn.Sequential(kind(4, momentum=None), nn.Linear(4, 4)) for _ in "ab"))
    x, found = torch.randn(6, 8), []
    for each in (strategy, Store()):
        again = copy.deepcopy(net)
        again.backprop = each
        for _ in "ab":
            getattr(again, method)(x).square().sum().backward()
        found.append(([p.grad for p in again.parameters()], list(again.buffers())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_dead_proxy_is_left_alone():
    gone = {1}
    net = stack(Runs(lambda f: None, proxy=weakref.proxy(gone)), backprop=Store())
    del gone
    net.plan(torch.randn(2, 8))


class Turned(nn.Module):
    """Works on the channels as the last dimension."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("shape", [(8, 8, 6), (8, 8, 6, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_transposed_outputs_on_a_grid_give_the_same_bits(shape, seed):
    torch.manual_seed(seed)
    net, x = stack(*(Turned() for _ in range(5)), grid="exact"), torch.randn(shape)
    expected = gradients(net, x, Store())
    for strategy in (Recompute(), Reconstruct(), *map(Budget, budgets(net, x, 4))):
        for a, b in zip(gradients(net, x, strategy), expected, strict=True):
            assert torch.equal(a, b)


def test_random_states_are_put_back():
    def draws(function):
        random.random()  # noqa: S311 (no secret)
        np.random.rand()
        torch.manual_seed(5)

    def states():
        return random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()

    net, before = stack(Runs(draws), backprop=Store()), states()
    net.plan(torch.randn(2, 8, device="meta"))
    after = states()
    assert before[0] == after[0]
    assert before[1][1] == after[1][1]
    assert (before[1][0] == after[1][0]).all()
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize("value", [3, None, (torch.randn(2, 4), 3)])
def test_what_is_no_tensor_is_refused_as_under_store(value):
    net, errors = stack(nn.Linear(4, 4)), []
    for strategy in (Store(), Budget(10**6)):
        net.backprop = strategy
        with pytest.raises(TypeError) as error:
            net(value)
        errors.append(str(error.value))
        with pytest.raises(TypeError, match=r"^Sequential\(.*: expected a tensor, or a tuple of tensors, got a"):
            net.plan(value)
    assert errors[0] == errors[1]


def test_a_budget_is_an_int():
    net, x = stack(nn.Linear(4, 4)), torch.randn(16, 8)
    for budget in (torch.tensor(5000), torch.tensor(5000), np.int64(5000), 5000):
        net.backprop = Budget(budget)
        net(x)
        assert type(net.backprop.bytes) is int
    assert len(_budget._plans[net]) == 1
    with pytest.raises(TypeError, match=r"^Budget: bytes must be an integer, got True\.$"):
        Budget(True)


def test_a_network_with_buffers_alone_is_planned_on_meta():
    assert Sequential(inv.Permute.reversed(8), backprop=Store()).plan(torch.randn(16, 8, device="meta")).peak > 0


def test_planning_through_a_network_on_a_grid_of_its_own():
    """What leaves the inner grid is looked for by its place in memory, which tensors without data have, too."""
    inner = Sequential(Coupling(nn.Tanh()), grid="exact")
    net = Sequential(Coupling(nn.Tanh()), inner, backprop=Budget(2**30))
    pair = tuple(torch.randn(2, 3, requires_grad=True) for _ in "ab")
    assert net.plan(pair).peak > 0
    expected = [t.detach() for t in net(pair)]
    net.backprop = Store()
    assert all(torch.equal(a, b) for a, b in zip(net(pair), expected, strict=True))
