"""The comparison of strategies finds what it is for, and names it."""

import itertools

import pytest
import torch
from torch import nn

import invertible as inv
import zoo
from invertible import Budget, Coupling, Recompute, Reconstruct, Sequential, Store
from invertible.testing import check_backprop
from tests.networks import Conditioned, UsersAffine, deep, function
from tests.rows import Scale


def test_it_reports_what_a_step_costs():
    net = deep(6, dropout=0.2)
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    state, values = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    report = check_backprop(net, x, strategies=(Recompute(), Recompute(every=3), Reconstruct()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.backprop is None
    store, *others, reconstruct = report.rows
    assert [row.evaluations for row in report.rows] == [6, 12, 12, 12]
    assert all(row.memory.kept < store.memory.kept / 2 for row in others)
    assert reconstruct.memory.kept < min(row.memory.kept for row in others)
    assert 0 < reconstruct.drift < 1e-12
    assert all(row.values == 0 and row.gradients < 1e-9 and row.buffers and row.random for row in report.rows)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "strategy",
        "values",
        "gradients",
        "buffers",
        "random",
        "kept",
        "peak",
        "F",
        "runs",
        "drift",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["Store()", "Recompute()", "Recompute(every=3)", "Reconstruct()"]


def test_it_takes_any_module_with_chains_inside():
    net = zoo.irevnet_small(num_classes=3, blocks=(3, 3, 3))
    report = check_backprop(net, torch.rand(4, 3, 32, 32), limit=1e-2)
    assert report.rows[2].memory.kept < report.rows[0].memory.kept / 2
    pair = tuple(torch.randn(3, 4, 5, 5, dtype=torch.float64) for _ in "ab")
    check_backprop(
        Sequential(Coupling(Conditioned(4)), UsersAffine(4)).double(), pair, condition=torch.rand(3, 4).double()
    )
    with pytest.raises(ValueError, match="no Sequential inside that could take a strategy"):
        check_backprop(nn.Linear(2, 2), torch.ones(1, 2))


def refused(layer, words):
    net = Sequential(inv.Split(), Coupling(function(2)), Sequential(layer), Coupling(function(2)), inv.Merge()).double()
    with pytest.raises(AssertionError, match=words):
        check_backprop(net, torch.randn(4, 4, 5, 5, dtype=torch.float64))


def test_it_names_a_layer_with_a_wrong_inverse():
    class Wrong(inv.InvertibleModule):
        def forward(self, x, *, condition=None):
            return 2 * x[0], x[1]

        def inverse(self, y, *, condition=None):
            return y[0] / 2.2, y[1]

    refused(Wrong(), r"Reconstruct\(\): .* is off by .* layer '2\.0', Wrong\(\): its inverse is off by")


def test_it_names_a_function_that_is_not_repeatable():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = 0

        def forward(self, x):
            self.count += 1
            return torch.tanh(x * self.count)

    refused(Coupling(Counts()), r"layer '2\.0', Coupling\(\): run again on the same input it returns something else")


def test_it_names_a_wrong_rule():
    class Hasty(Scale):
        def forward(self, x, *, condition=None):
            return x[0] * 2, x[1] * 2

        def inverse(self, y, *, condition=None):
            return y[0] / 2, y[1] / 2

        def fused_rule(self, method, y, grad, grad_log_det, *, condition):
            x = tuple((t / 2).detach().requires_grad_() for t in y)
            return x, x, grad  # the factor is forgotten

    refused(Hasty(), r"layer '2\.0', Hasty\(\): the gradient of its input 1 is off by 5e-01")


def test_rounding_that_adds_up_is_told_from_a_wrong_layer():
    torch.manual_seed(0)
    net = deep(12).float()
    with pytest.raises(AssertionError, match="Every layer by itself is right: rounding adds up"):
        check_backprop(net, torch.randn(4, 8, 5, 5), strategies=(Reconstruct(),), limit=1e-7)


def test_store_is_the_same_as_itself():
    for strategy in itertools.repeat(Store(), 2):
        assert check_backprop(deep(2), torch.randn(2, 8, 4, 4).double(), strategies=(strategy,)).rows[1].gradients == 0


class Unsteady(nn.Linear):
    """Noise from a generator that is not replayed."""

    generator = torch.Generator()

    def forward(self, x):
        return super().forward(x) + 1e-7 * torch.randn(x.shape, generator=self.generator)


def test_on_a_grid_it_names_the_layer_that_does_not_repeat_its_bits():
    layers = [Coupling(nn.Linear(4, 4)), Coupling(Unsteady(4, 4)), Coupling(nn.Linear(4, 4))]
    net = Sequential(inv.Split(), *layers, inv.Merge(), grid="exact")
    x = torch.randn(16, 8)
    with pytest.raises(
        AssertionError, match=r"is layer '2', Coupling\(\): run again on the same input it returns some"
    ):
        check_backprop(net, x)
    net[2].function = nn.Linear(4, 4)
    assert [row.gradients for row in check_backprop(net, x).rows] == [0, 0, 0]


def test_a_budget_is_reported_with_its_bytes():
    net, x = deep(6), torch.randn(4, 8, 8, 8, dtype=torch.float64)
    least, most = net.plan(x).least, net.plan(x).most
    report = check_backprop(net, x, strategies=[Budget((least + most) // 2)])
    assert str(report).splitlines()[2].startswith(f"Budget(bytes={(least + most) // 2})  0e+00")
    assert report.rows[0].memory.kept > report.rows[1].memory.kept
    assert report.rows[0].evaluations < report.rows[1].evaluations


def test_a_wrong_inverse_is_named_under_a_budget_too():
    class Wrong(inv.InvertibleModule):
        def forward(self, x, *, condition=None):
            return 2 * x[0], x[1]

        def inverse(self, y, *, condition=None):
            return y[0] / 2.2, y[1]

    around = [[Coupling(function(2)) for _ in range(6)] for _ in range(2)]
    net = Sequential(inv.Split(), *around[0], Wrong(), *around[1], inv.Merge()).double()
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"Budget\(bytes=\d+\): .* layer '7', Wrong\(\): its inverse is off by"):
        check_backprop(net, x, strategies=[Budget(net.plan(x).least)])
