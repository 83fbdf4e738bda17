"""Whatever is kept, a training step leaves the same behind."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible import Coupling, Inverse, Parallel, Recompute, Reconstruct, Sequential, Store
from tests.networks import METHODS, UsersAffine, assert_same, deep, draw_network, function, outcome, with_strategy
from tests.rows import Scale

STRATEGIES = [Recompute(), Recompute(every=3), Reconstruct(), Reconstruct(anchor_every=2), Reconstruct(locate=True)]


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_every_strategy_gives_the_gradients_of_store(method, data):
    net, x, condition = draw_network(data.draw)
    if method.startswith("inverse"):
        with torch.no_grad():
            x = copy.deepcopy(net).eval()(x, condition=condition)
        net = Inverse(net) if data.draw(st.booleans(), label="as Inverse") else net
    if isinstance(net, Inverse):
        method = method.replace("inverse", "forward")
    grad = data.draw(st.booleans(), label="input requires grad")
    expected, _ = outcome(net, x, condition, method=method, grad=grad)
    strategy = data.draw(st.sampled_from(STRATEGIES), label="strategy")
    (net.layer if isinstance(net, Inverse) else net).backprop = strategy
    found, _ = outcome(net, x, condition, method=method, grad=grad)
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_layers_in_double_precision(method):
    net = deep(100, channels=3)
    x = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    expected, _ = outcome(net, x, method=method)
    found, trained = outcome(with_strategy(net, Reconstruct()), x, method=method)
    assert_same(found, expected, 1e-12)
    assert 0 < trained.drift < 1e-12


def test_through_every_container():
    """Branches of their own depth, a network inside a network, and the swapped map."""
    stage = Sequential(*[Coupling(function(2)) for _ in range(3)])
    inner = Inverse(Sequential(inv.Split(), Coupling(function(1)), inv.Merge()))
    net = Sequential(
        inv.PixelUnshuffle(2), inv.Split(), Parallel(inner, Sequential(Scale(), inner)), inv.Merge(), inv.Split(),
        stage,
        Coupling(function(2)), Inverse(stage), inv.Swap(), inv.Merge(), Inverse(inv.PixelUnshuffle(2)),
    ).double()  # fmt: skip
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    for method in METHODS:
        expected, _ = outcome(net, x, method=method)
        for strategy in STRATEGIES:
            assert_same(outcome(with_strategy(net, strategy), x, method=method)[0], expected, 1e-9)


def test_an_injective_network_and_what_comes_after_it():
    """The layer after the zero padding keeps its input, or batch norm would amplify what the zeros come back as."""
    torch.manual_seed(1)
    net = Sequential(inv.PadSplit(3, 8), inv.Swap(), *[Coupling(function(4)) for _ in range(4)], inv.Merge())
    x = torch.randn(4, 3, 6, 6)
    for method in ("forward", "inverse"):
        value = x if method == "forward" else net(x).detach()
        expected, _ = outcome(net, value, method=method)
        found, trained = outcome(with_strategy(net, Reconstruct()), value, method=method)
        assert_same(found, expected, 1e-4)
        assert trained.drift < 1e-5


def test_a_layer_of_the_users_own_needs_only_its_two_directions():
    class Cubed(inv.InvertibleModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.5))

        def forward(self, x, *, condition=None):
            return self.weight * (x + x**3)

        def inverse(self, y, *, condition=None):
            x = y / self.weight  # Newton's method, to the last bit
            for _ in range(60):
                x = x - (self.weight * (x + x**3) - y) / (self.weight * (1 + 3 * x**2))
            return x

    net = Sequential(*[Cubed() for _ in range(4)]).double()
    x = torch.rand(3, 2, dtype=torch.float64)
    assert_same(outcome(with_strategy(net, Reconstruct()), x)[0], outcome(net, x)[0], 1e-9)


def test_an_iterative_layer_is_kept():
    class Rough(Scale):
        """Its inverse is off by a thousandth."""

        @property
        def exactness(self):
            return inv.Exactness.ITERATIVE

        def inverse(self, y, *, condition=None):
            return super().inverse(y) * 1.001

    net = Sequential(Scale(), Rough(), Scale(), backprop=Reconstruct())
    x = torch.rand(3, 2, requires_grad=True)
    net(x).square().sum().backward()
    assert net.drift < 1e-6
    torch.testing.assert_close(x.grad, 2 * x * 1.5**6)


def test_a_subclass_that_changes_the_map_does_not_inherit_the_fused_rule():
    class Doubled(Coupling):
        def forward(self, x, *, condition=None):
            y1, y2 = super().forward(x)
            return y1, 2 * y2

        def inverse(self, y, *, condition=None):
            return super().inverse((y[0], y[1] / 2))

    net = Sequential(inv.Split(), *[Doubled(function(2)) for _ in range(3)], inv.Merge()).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    assert_same(outcome(with_strategy(net, Reconstruct()), x)[0], outcome(net, x)[0])


def test_a_container_of_the_users_own_is_one_layer():
    class Residual(inv.InvertibleModule):
        def __init__(self):
            super().__init__()
            self.body = Sequential(inv.Split(), Coupling(function(2)), inv.Merge())

        def forward(self, x, *, condition=None):
            return 2 * self.body(x)

        def inverse(self, y, *, condition=None):
            return self.body.inverse(y / 2)

    net = Sequential(Residual(), Residual()).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    assert_same(outcome(with_strategy(net, Reconstruct()), x)[0], outcome(net, x)[0])


def test_the_strategy_is_inherited_overridden_changed_and_sliced():
    inner = Sequential(*[Coupling(function(2)) for _ in range(2)])
    net = Sequential(inv.Split(), inner, Coupling(function(2)), inv.Merge(), backprop=Reconstruct()).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    keys, values = list(net.state_dict()), [v.clone() for v in net.state_dict().values()]
    expected, _ = outcome(with_strategy(net, Store()), x)
    for strategy in (None, Store(), Recompute(), Reconstruct(), Reconstruct(anchor_every=1)):
        inner.backprop = strategy
        assert_same(outcome(net, x)[0], expected)
    net.backprop = None
    assert_same(outcome(net, x)[0], expected)
    assert net.backprop is None
    assert list(net.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), values, strict=True))
    net.backprop = Recompute(every=2)
    assert net[1:].backprop == Recompute(every=2)
    assert copy.deepcopy(net).backprop == Recompute(every=2)
    assert "backprop=Recompute(every=2)" in repr(net)


def test_only_the_network_that_has_the_strategy_knows_its_drift():
    inner = Sequential(*[Coupling(function(2)) for _ in range(2)])
    net = Sequential(inv.Split(), inner, inv.Merge(), backprop=Reconstruct())
    assert net.drift is None
    assert net.drift_flag is None
    net(torch.randn(3, 4, 5, 5)).sum().backward()
    assert inner.drift is None
    assert 0 <= net.drift < 1e-5
    assert not net.drift_flag
    net.backprop = Store()
    net(torch.randn(3, 4, 5, 5)).sum().backward()


def test_generic_layers_and_conditions_in_both_log_determinants():
    torch.manual_seed(3)
    net = Sequential(*[UsersAffine(2) for _ in range(3)]).double()
    pair = tuple(torch.randn(3, 2, 5, 5, dtype=torch.float64) for _ in range(2))
    for method in METHODS:
        expected, _ = outcome(net, pair, method=method)
        assert_same(outcome(with_strategy(net, Reconstruct()), pair, method=method)[0], expected, 1e-9)


def test_strategies_refuse_bad_options():
    with pytest.raises(ValueError, match=r"Recompute: every must be at least 1, got 0\."):
        Recompute(every=0)
    with pytest.raises(TypeError, match=r"Recompute: every must be an integer, got 1\.5\."):
        Recompute(every=1.5)
    with pytest.raises(ValueError, match=r"Reconstruct: anchor_every must be at least 1, got -1\."):
        Reconstruct(anchor_every=-1)
    with pytest.raises(ValueError, match=r"drift_warn must be a number that is not negative, got nan\."):
        Reconstruct(drift_warn=float("nan"))
    with pytest.raises(ValueError, match=r"drift_warn must not be above drift_error, got 0\.1 and 0\.01\."):
        Reconstruct(drift_warn=0.1)
    with pytest.raises(ValueError, match=r'on_drift must be "raise" or "record", got \'warn\'\.'):
        Reconstruct(on_drift="warn")
    with pytest.raises(TypeError, match=r"backprop must be Store\(\), .* or None, got .* Add parentheses\."):
        Sequential(backprop=Reconstruct)
    with pytest.raises(TypeError, match=r"got 'reconstruct'\."):
        Sequential().backprop = "reconstruct"
