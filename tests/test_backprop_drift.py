"""No gradient is wrong without a word."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible import Coupling, DriftError, DriftWarning, Recompute, Reconstruct, Sequential, Store
from invertible.backprop._drift import Probes, _sample
from tests.networks import deep, function, outcome, with_strategy


class Off(inv.InvertibleModule):
    """Its inverse is off by a relative error."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x, *, condition=None):
        return 2 * x

    def inverse(self, y, *, condition=None):
        return (1 + self.error) * y / 2


def chain(error, **options):
    return Sequential(inv.Permute.reversed(4), Off(0.0), Off(error), Off(0.0), backprop=Reconstruct(**options)).double()


def step(net, x=None):
    x = torch.randn(3, 4, dtype=torch.float64) if x is None else x
    net(x.requires_grad_()).sum().backward()


@given(error=st.floats(1e-12, 0.9), sign=st.sampled_from([-1, 1]))
def test_the_figure_is_the_relative_error(error, sign):
    net = chain(sign * error, drift_warn=1, drift_error=1)
    step(net)
    assert math.isclose(net.drift, error, rel_tol=1e-3, abs_tol=1e-15)


def test_it_warns_and_raises_at_its_thresholds():
    step(chain(0.9e-4))
    with pytest.warns(
        DriftWarning, match=r"Sequential: the reconstructed inputs are off by 1e-04 .* drift_warn=0\.0001"
    ):
        step(chain(1.1e-4))
    with pytest.warns(DriftWarning):
        step(chain(0.9e-2))
    with pytest.raises(DriftError, match=r"off by 1e-02 \(relative\), above drift_error=0\.01, .*anchor_every=10"):
        step(chain(1.1e-2))
    step(chain(1.1e-2, drift_warn=0.1, drift_error=0.1))
    with pytest.raises(DriftError):
        step(chain(1e-3, drift_warn=0, drift_error=1e-4))


def test_it_raises_before_an_optimizer_can_use_the_gradients():
    net = chain(0.5)
    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1)
    with pytest.raises(DriftError):  # noqa: PT012 (the step must not be reached)
        net(parameter * 1).sum().backward()
        optimizer.step()
    assert torch.equal(parameter, torch.ones_like(parameter))
    assert math.isclose(net.drift, 0.5, rel_tol=1e-9)
    assert net.drift_flag


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_raises(bad):
    with pytest.raises(DriftError, match="the reconstructed inputs are not finite") as error:
        step(chain(bad))
    assert not math.isfinite(error.value.drift)
    net = chain(bad, on_drift="record")
    step(net)
    assert not math.isfinite(net.drift)
    assert net.drift_flag


def test_record_reads_nothing():
    net = chain(0.5, on_drift="record")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(net)
    assert isinstance(net._drift.figure, torch.Tensor)  # not read yet
    assert net.drift_flag.dtype is torch.bool
    assert net.drift_flag
    assert math.isclose(net.drift, 0.5, rel_tol=1e-9)
    net = chain(1e-3, on_drift="record")
    step(net)
    assert not net.drift_flag


def test_the_figure_is_read_once_per_backward(monkeypatch):
    """Two networks and two runs of each in one backward pass: one read per network, at the end."""
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("a second read"))
    nets = [Sequential(*[Coupling(nn.Tanh()) for _ in range(5)], backprop=Reconstruct()) for _ in "ab"]
    pair = (torch.ones(2, 3, requires_grad=True), torch.ones(2, 3))
    sum(t.sum() for net in nets for _ in "ab" for t in net(pair)).backward()
    assert len(reads) == 2
    assert all(0 <= net.drift < 1e-6 for net in nets)


def test_the_worst_of_several_runs_in_one_backward_counts():
    good, net = torch.zeros(3, 4, dtype=torch.float64), chain(0.5, on_drift="record")
    a = net(torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    b = net(good.requires_grad_())
    (a.sum() + b.sum()).backward()
    assert math.isclose(net.drift, 0.5, rel_tol=1e-9)


def test_zeros_are_compared_absolutely():
    net = Sequential(*[Coupling(function(2, norm=False)) for _ in range(5)], backprop=Reconstruct())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = tuple(torch.zeros(4, 2, 5, 5, requires_grad=True) for _ in "ab")
        sum(t.sum() for t in net(pair)).backward()
    assert net.drift < 1e-6


def test_locate_names_the_first_bad_layer():
    inner = Sequential(inv.Swap(), inv.Parallel(Off(0.0), Off(0.3)))
    net = Sequential(inv.Split(), Coupling(nn.Tanh()), inner, Coupling(nn.Tanh()), inv.Merge())
    net.backprop = Reconstruct(locate=True)
    with pytest.raises(DriftError, match=r"the first bad one enters layer '2\.1\.1', Off\(\), the 3\. that computes"):
        step(net, torch.randn(3, 4))
    net.backprop = Reconstruct()
    with pytest.raises(DriftError, match=r"Reconstruct\(locate=True\) names the layer"):
        step(net, torch.randn(3, 4))


class Ramp(nn.Linear):
    """Its state is in an attribute, which no replay puts back."""

    steps = 0.0

    def forward(self, x):
        self.steps += 1
        return super().forward(x) * self.steps


@pytest.mark.parametrize("grid", [None, "exact"])
@pytest.mark.parametrize(("bad", "options"), [(0, {}), (0, {"locate": True}), (1, {"anchor_every": 2}), (2, {})])
def test_a_function_that_does_not_repeat_itself_is_found_in_every_layer(bad, options, grid):
    """Gradients were wrong without a word if it was in a layer whose input is kept: the first one, or an anchor."""
    functions = [Ramp(4, 4) if i == bad else nn.Linear(4, 4) for i in range(3)]
    net = Sequential(inv.Split(), *map(Coupling, functions), inv.Merge(), backprop=Reconstruct(**options), grid=grid)
    with pytest.raises(DriftError) as caught:
        net(torch.randn(3, 8)).square().sum().backward()
    if grid is None and bad < 2:
        said = "layer '{0}', Coupling(), the {0}. that computes something, was run again on the same input and returned"
        assert said.format(bad + 1) in str(caught.value)


class Growing(Ramp):
    """Another function in each run, by far."""

    def forward(self, x):
        return super().forward(x) * 1000**self.steps


def test_locate_says_of_an_anchor_that_it_returned_something_else():
    """What had entered it was kept, and a layer before it is further off."""
    functions = [nn.Linear(4, 4), Growing(4, 4), Ramp(4, 4), nn.Linear(4, 4)]
    options = Reconstruct(anchor_every=3, locate=True)
    net = Sequential(inv.Split(), *map(Coupling, functions), inv.Merge(), backprop=options)
    with pytest.raises(DriftError, match=r"the first bad one is what was returned again by layer '3', Coupling\(\)"):
        net(torch.randn(3, 8)).square().sum().backward()


AGAIN = (
    r"layer '1', Coupling\(\), the 1\. .*, was run again on the same input and did not return the same bits \(off by"
)


class Once(nn.Module):
    """Is another function at one element, in its first run."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        y = x.tanh() + 0
        y[-1, -1, -1, -1] += float(self.runs == 1)
        return y


@pytest.mark.parametrize(("anchors", "said"), [(None, "inputs are not the true ones bit for bit"), (1, AGAIN)])
def test_on_a_grid_one_element_that_is_not_repeated_is_found(anchors, said):
    """Among more elements than the probes have, in a layer whose input is kept, too."""
    coupling = Coupling(Once())
    net = Sequential(inv.Split(), coupling, inv.Merge(), backprop=Reconstruct(anchor_every=anchors), grid="exact")
    with pytest.raises(inv.InexactInverseError, match=said):
        net(torch.randn(9, 8, 9, 9, requires_grad=True)).square().sum().backward()


def test_what_repeats_itself_is_not_off_even_if_it_is_not_finite():
    net = Sequential(inv.Split(), Coupling(nn.Linear(4, 4)), inv.Merge(), backprop=Reconstruct())
    net(torch.full((3, 8), math.inf)).sum().backward()  # of one layer, whose input is kept
    assert net.drift == 0


def test_bfloat16_streams_are_found():
    """The inverse of a sum in eight bits is not its input."""
    torch.manual_seed(0)
    net = with_strategy(deep(30), Reconstruct()).bfloat16()
    x = torch.randn(4, 8, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with pytest.warns(DriftWarning, match=r"Sequential: values of torch\.bfloat16 enter Coupling\(\)"):
        y = net(x)
    with pytest.raises(DriftError, match=r"off by .*e-0[12]"):
        y.sum().backward()


@pytest.mark.parametrize("strategy", [Reconstruct(anchor_every=1), Recompute(), Store()])
def test_bfloat16_streams_that_are_kept_need_no_warning(strategy):
    net = with_strategy(deep(3), strategy).bfloat16()
    net(torch.randn(4, 8, 8, 8, dtype=torch.bfloat16)).sum().backward()
    with_strategy(deep(1), Reconstruct()).bfloat16()(torch.randn(4, 8, 8, 8, dtype=torch.bfloat16)).sum().backward()


def test_bfloat16_functions_at_depth_are_found_and_anchors_bound_them():
    torch.manual_seed(0)
    net = deep(60, channels=8).float()
    x = torch.randn(4, 16, 16, 16)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    expected, _ = outcome(net, x, autocast=autocast())

    def error(strategy):
        found, trained = outcome(with_strategy(net, strategy), x, autocast=autocast())
        keys = [k for k in expected if k.startswith("parameter")]
        a, b = (torch.cat([each[k].flatten() for k in keys]) for each in (found, expected))
        return float((a - b).norm() / b.norm()), trained.drift

    silent = Reconstruct(drift_warn=1, drift_error=1)
    wrong, drift = error(silent)
    assert wrong > 3e-4
    assert drift > 1e-4
    with pytest.warns(DriftWarning):
        outcome(with_strategy(net, Reconstruct(drift_error=1)), x, autocast=autocast())
    better, drift = error(Reconstruct(anchor_every=5, drift_warn=1, drift_error=1))
    assert better < wrong / 100


@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_probes_are_elements_of_the_tensor_spread_over_it(shape):
    x = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    for view in (x, x.transpose(0, -1)):
        probes = _sample(view)
        assert len(set(probes.tolist())) > 0.85 * min(1024, x.numel())
    if x.numel() > 1024:
        assert _sample(x).sort().values.diff().max() < 3 * x.numel() / 1024


def test_probes_know_a_changed_tensor():
    x = torch.randn(7, 300, dtype=torch.float16)
    probes = Probes([x])
    x_hat = x + 0.125 * x
    assert math.isclose(probes.drift([x_hat]).item(), 0.125, rel_tol=0.02)
    assert probes.drift([x]).item() == 0
