"""The report says what the bits of a network depend on, and names the layer."""

import pytest
import torch
from torch import nn

import invertible as inv
from invertible import Coupling, Sequential
from invertible.testing import exactness_report
from tests.networks import Conditioned
from tests.test_grid import adverse, deep


def test_a_network_of_convolutions():
    net, x = deep(4, "exact32").eval(), adverse(4, size=16)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    report = exactness_report(net, x)
    assert report.exact
    whole = {"gradients", "there and back"}
    assert [row.layers for row in report.rows if row.what not in whole] == [5] * (len(report.rows) - 2)
    assert report["gradients"].layers > 10
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert torch.backends.mkldnn.enabled
    if report["channels last"].differ:
        assert report["channels last"].size < 1e-4  # a step of the grid
    assert "again                    same bits\n" in str(report)


def test_in_training_samples_depend_on_each_other():
    report = exactness_report(deep(4).train(), adverse(4, size=16))
    assert report.exact
    row = report["one sample alone"]
    assert (row.differ, row.first) == (5, "layer '2', Coupling()")
    assert "one sample alone         other bits in 5 of 5 (by " in str(report)


def test_what_a_function_refuses_cannot_be_compared():
    net = Sequential(inv.Split(), Coupling(nn.BatchNorm1d(3)), inv.Merge(), grid="exact")
    report = exactness_report(net, torch.randn(4, 6))
    assert report.exact
    assert [report[what].layers for what in ("one sample alone", "half of the batch")] == [0, 1]


def test_dropout_condition_and_a_single_sample():
    net = Sequential(inv.Split(), Coupling(Conditioned(2)), Coupling(nn.Dropout(0.4)), inv.Merge(), grid="exact")
    report = exactness_report(net.float(), torch.randn(4, 4, 5, 5), condition=torch.randn(4, 2))
    assert report.exact
    report = exactness_report(net.eval(), torch.randn(1, 4, 5, 5), condition=torch.randn(1, 2))
    assert report.exact
    assert report["one sample alone"].layers == 0
    assert "one sample alone         cannot be compared" in str(report)


class Noisy(nn.Module):
    """Draws from a generator that nobody knows of."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.generator = torch.Generator()

    def forward(self, x):
        return self.inner(x) + 1e-7 * torch.rand(x.shape, generator=self.generator)


class ByMode(nn.Module):
    """Looks whether gradients are enabled, and at inference mode."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x) if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else x


@pytest.mark.parametrize("train", [True, False])
def test_the_guilty_layer_is_named(train):
    good = [Coupling(nn.Linear(3, 3)) for _ in range(3)]
    net = Sequential(inv.Split(), *good[:2], Sequential({"bad": Coupling(Noisy())}), good[2], grid="exact")
    report = exactness_report(net.train(train), torch.randn(2, 6))
    assert not report.exact
    for what in ("again", "backwards", "without gradients"):
        assert (report[what].differ, report[what].first) == (1, "layer '3.bad', Coupling()")
        assert 1e-9 < report[what].size < 1e-6
    assert report["gradients"].differ > 0
    assert "NOT EXACT in 1 of 4" in str(report)


def test_grad_modes_make_no_difference():
    assert exactness_report(Sequential(inv.Split(), Coupling(ByMode()), grid="exact"), torch.randn(2, 6)).exact


@pytest.mark.slow
def test_compiled_functions():
    report = exactness_report(deep(2).eval(), adverse(4, size=16), compiled=True)
    assert report.exact
    assert report["compiled functions"].layers == 3


def test_refuses_what_has_no_grid():
    with pytest.raises(TypeError, match="expected a Sequential, got Linear"):
        exactness_report(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="the network has no grid"):
        exactness_report(deep(2, None), adverse())


def test_a_condition_for_each_sample_and_a_function_that_wants_its_batch():
    class Labelled(nn.Module):
        def forward(self, x, condition):
            assert len(x) == 4
            return torch.tanh(x + condition[:, None])

    net = Sequential(inv.Split(), Coupling(Labelled()), grid="exact")
    with torch.inference_mode():
        report = exactness_report(net, torch.randn(4, 6), condition=torch.arange(4))
    assert report.exact
    assert report["half of the batch"].layers == 0
    assert report["batch in reverse"].layers == 1


def test_statistics_that_a_function_reads_and_moves_have_no_way_back():
    net = Sequential(inv.Split(), Coupling(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))), grid="exact")
    report = exactness_report(net, torch.randn(4, 16))
    assert not report.exact
    assert report["there and back"].differ == 1
    assert report["backwards"].differ == 0
    assert report["gradients"].differ == 0
    assert exactness_report(net.eval(), torch.randn(4, 16)).exact
