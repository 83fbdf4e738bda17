"""What the laws cannot say of the coupling: its equation, its buffers, the function's misuse, zero batches."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

from invertible import (
    Coupling,
    Exactness,
    Inverse,
    InvertibleModule,
    Merge,
    PadSplit,
    Parallel,
    PixelUnshuffle,
    Sequential,
    Split,
)
from invertible.testing import inverse_moves_no_buffer, recovers_its_input
from tests.rows import ConditionalTanh, seeded, smooth, streams

IN_PLACE = "the function must not write to its input, but it did, and the stream is lost"


@given(st.data())
def test_the_equation_of_the_paper(data):
    """(x, x̃) -> (S x̃, S x + F x̃)."""
    x, x_tilde = data.draw(streams(2))
    down = PixelUnshuffle(2, order="pixel_major")
    function = seeded(data.draw, lambda: smooth(2, 8, stride=2))
    y, y_tilde = Coupling(function, downsample=down)((x, x_tilde))
    assert torch.equal(y, down(x_tilde))
    assert torch.equal(y_tilde, down(x) + function(x_tilde))


def test_the_function_is_evaluated_once_per_direction():
    calls = []
    function = nn.Tanh()
    function.register_forward_hook(lambda *_: calls.append(1))
    coupling = Coupling(function)
    x = torch.rand(2, 3), torch.rand(2, 3)
    for method in (coupling, coupling.inverse, coupling.forward_and_log_det, coupling.inverse_and_log_det):
        calls.clear()
        method(x)
        assert len(calls) == 1


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm, cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "InstanceNorm with statistics": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 4, 1)),
}


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "wrap", [lambda c: c, Sequential, lambda c: Sequential(Inverse(c))], ids=["bare", "seq", "inv"]
)
def test_buffers_move_in_the_trained_direction_alone(norm, wrap):
    """Whatever is nested in what: net(x) moves once, net.inverse never; Inverse(net)(x) once, its inverse never."""
    coupling = Coupling(nn.Sequential(NORMS[norm](), nn.Conv1d(4, 4, 1))).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    for trained in (wrap(coupling), Inverse(wrap(coupling))):
        start = state(coupling)
        y = trained(x)
        once = state(coupling)
        assert not same(start, once)
        trained.inverse(y)
        trained.inverse_and_log_det(y)
        trained.off_range(y)
        assert same(state(coupling), once)
        coupling.load_state_dict(start)
        trained.forward_and_log_det(x)
        assert same(state(coupling), once)


def test_moving_statistics_are_those_of_the_function_alone():
    coupling = Coupling(nn.BatchNorm1d(4))
    alone = copy.deepcopy(coupling.function)
    x = torch.randn(8, 4), torch.randn(8, 4)
    coupling(x)
    alone(x[1])
    assert same(state(alone), state(coupling.function))


def test_an_inverse_between_forward_and_backward_does_not_disturb_it():
    net = Sequential(Split(), Coupling(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))), Merge())
    x = torch.randn(8, 4, requires_grad=True)
    y = net(x)
    net.inverse(y.detach())
    y.sum().backward()
    assert x.grad is not None


def test_buffers_come_back_when_the_function_raises():
    coupling = Coupling(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(3, 4)))
    buffers = list(coupling.buffers())
    with pytest.raises(RuntimeError):
        coupling.inverse((torch.rand(2, 4), torch.rand(2, 4)))
    assert all(a is b for a, b in zip(buffers, coupling.buffers(), strict=True))
    assert coupling.function[0].num_batches_tracked == 0


def test_late_errors_say_that_buffers_have_moved():
    coupling = Coupling(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5)))
    x = torch.rand(2, 4), torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"The function's buffers have moved already\.$"):
        coupling(x)
    with pytest.raises(ValueError, match=r"got a tensor of shape \(2, 5\)\.$"):
        coupling.inverse(x)
    with pytest.raises(ValueError, match=r"got a tensor of shape \(2, 5\)\.$"):
        coupling.eval()(x)


def test_bad_input_is_refused_before_buffers_move():
    coupling = Coupling(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="same batch"):
        coupling((torch.rand(3, 4), torch.rand(2, 4)))
    assert coupling.function.num_batches_tracked == 0


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_an_in_place_function_is_found(direction):
    coupling = Coupling(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=IN_PLACE):
        getattr(coupling, direction)((torch.randn(2, 3), torch.randn(2, 3)))
    later = Coupling(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)))
    getattr(later, direction)((torch.randn(2, 3), torch.randn(2, 3)))
    with torch.inference_mode():
        getattr(later, direction)((torch.randn(2, 3), torch.randn(2, 3)))


def test_dtypes_of_the_function():
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for stream, function, right in [
        (single, half, True),
        (double, single, True),
        (single, single, True),
        (single, double, False),
        (half, single, False),
        (single, torch.int64, False),
        (single, torch.complex64, False),
    ]:

        class Cast(nn.Module):
            def forward(self, x, dtype=function):
                return x.to(dtype)

        coupling, x = Coupling(Cast()), (torch.ones(2, 3, dtype=stream), torch.ones(2, 3, dtype=stream))
        if right:
            assert {t.dtype for t in coupling(x)} == {stream}
            assert {t.dtype for t in coupling.inverse(x)} == {stream}
        else:
            with pytest.raises(
                TypeError, match=f"the function's output must fit into the stream's dtype {stream}, got"
            ):
                coupling(x)


def test_autocast_keeps_the_streams_wide():
    coupling = Coupling(nn.Linear(3, 3))
    x = torch.rand(2, 3), torch.rand(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = coupling(x)
        back = coupling.inverse(y)
    assert {t.dtype for t in (*y, *back)} == {torch.float32}
    torch.testing.assert_close(back, x)


def test_dropout_makes_it_stochastic_in_train_alone():
    coupling = Coupling(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    assert coupling.stochastic
    assert Sequential(Parallel(Inverse(coupling))).stochastic
    assert not coupling.eval().stochastic
    assert not Coupling(nn.Dropout(0.0)).stochastic
    recovers_its_input(coupling.double(), (torch.rand(2, 3).double(), torch.rand(2, 3).double()))


def test_a_condition_goes_only_to_a_function_that_names_it():
    class Named(nn.Module):
        def forward(self, x, condition=None):
            return x * (0 if condition is None else condition)

    x = torch.ones(2, 3), torch.ones(2, 3)
    assert torch.equal(Coupling(Named())(x, condition=torch.tensor(2.0))[1], torch.full((2, 3), 3.0))
    assert torch.equal(Coupling(Named())(x)[1], torch.ones(2, 3))
    assert torch.equal(Coupling(nn.Identity())(x, condition=torch.tensor(2.0))[1], torch.full((2, 3), 2.0))


def test_a_batch_of_zero_passes_as_in_torch():
    net = Sequential(PixelUnshuffle(2), Split(), Coupling(nn.Conv2d(6, 6, 3, padding=1)), Merge())
    x = torch.zeros(0, 3, 4, 4)
    y = net(x)
    assert y.shape == (0, 12, 2, 2)
    assert net.inverse(y).shape == x.shape
    assert net.forward_and_log_det(x)[1].shape == (0,)
    assert net.off_range(y).shape == (0,)


def test_an_injective_downsample_has_no_log_det():
    coupling = Coupling(nn.Linear(2, 4), downsample=Sequential(PadSplit(2, 4), Merge()))
    assert not coupling.bijective
    x = torch.rand(3, 2), torch.rand(3, 2)
    torch.testing.assert_close(coupling.inverse(coupling(x)), x)
    with pytest.raises(ValueError, match="has no log-determinant, because downsample is not bijective"):
        coupling.forward_and_log_det(x)
    with pytest.raises(ValueError, match="has no log-determinant, because downsample is not bijective"):
        coupling.inverse_and_log_det(coupling(x))


def test_keeping_buffers_holds_for_shared_and_nested_modules():
    norm = nn.BatchNorm1d(3).double()
    net = Sequential(Coupling(norm), Coupling(nn.Sequential(norm, nn.Tanh())))
    x = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    inverse_moves_no_buffer(net, x)
    recovers_its_input(net, x)


def test_the_function_may_be_partly_in_training():
    """What moves buffers may be a child in train of a function in eval."""
    coupling = Coupling(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))).eval()
    coupling.function[0].train()
    x = torch.rand(4, 3), torch.rand(4, 3)
    coupling.inverse(x)
    assert coupling.function[0].num_batches_tracked == 0
    coupling(x)
    assert coupling.function[0].num_batches_tracked == 1


def test_misfits_of_functions_without_buffers_say_nothing_of_buffers():
    with pytest.raises(ValueError, match=r"got a tensor of shape \(2, 5\)\.$"):
        Coupling(nn.Linear(3, 5))((torch.rand(2, 3), torch.rand(2, 3)))


def test_a_function_on_another_device_is_refused():
    class Elsewhere(nn.Module):
        def forward(self, x):
            return x.to("meta")

    with pytest.raises(ValueError, match="the function's output must be on the stream's device cpu, got meta"):
        Coupling(Elsewhere())((torch.rand(2, 3), torch.rand(2, 3)))


def test_a_compiled_function_still_gets_its_condition():
    coupling = Coupling(torch.compile(ConditionalTanh(), backend="eager"))
    x = torch.rand(2, 3), torch.rand(2, 3)
    condition = torch.rand(2, 1)
    assert torch.equal(coupling(x, condition=condition)[1], x[0] + torch.tanh(x[1] * condition))


def test_the_exactness_of_downsample_counts():
    class Solver(Sequential):
        exactness = Exactness.ITERATIVE

    assert Coupling(nn.Tanh(), downsample=Solver()).exactness is Exactness.ITERATIVE


@pytest.mark.parametrize(
    "random",
    [nn.MultiheadAttention(4, 1, dropout=0.5), nn.RReLU(), StochasticDepth(0.5, "row"), Coupling(nn.Dropout())],
)
def test_random_parts_are_found_or_declare_themselves(random):
    if isinstance(random, StochasticDepth):
        random.stochastic = True
    function = nn.Sequential(nn.Linear(4, 4), random)
    assert Coupling(function).stochastic
    assert Sequential(Coupling(nn.Tanh()), Coupling(function)).stochastic  # any, not all
    assert Parallel(Coupling(nn.Tanh()), Coupling(function)).stochastic
    if not isinstance(random, StochasticDepth):
        assert not Coupling(function).eval().stochastic


def test_the_default_log_det_of_the_inverse_moves_no_buffer():
    class Bare(InvertibleModule):  # defines no inverse_and_log_det
        def __init__(self):
            super().__init__()
            self.coupling = Coupling(nn.BatchNorm1d(3))

        def forward(self, x, *, condition=None):
            return self.coupling(x)

        def inverse(self, y, *, condition=None):
            return self.coupling.inverse(y)

        def forward_and_log_det(self, x, *, condition=None):
            return self.coupling.forward_and_log_det(x)

    layer, x = Bare(), (torch.rand(4, 3), torch.rand(4, 3))
    layer.inverse_and_log_det(x)
    assert layer.coupling.function.num_batches_tracked == 0
    Inverse(layer).forward_and_log_det(x)
    assert layer.coupling.function.num_batches_tracked == 1


def test_in_place_functions_are_harmless_where_writes_are_not_counted():
    coupling = Coupling(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))).eval()
    with torch.inference_mode():
        x = torch.randn(4, 3), torch.randn(4, 3)
        before = x[1].clone()
        y = coupling(x)
        assert torch.equal(x[1], before)
        torch.testing.assert_close(coupling.inverse(y), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_inference_compiles_whole_and_gives_the_same():
    inner = Sequential(Coupling(nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))), Inverse(Coupling(nn.Tanh())))
    net = Sequential(PixelUnshuffle(2), Split(), inner, Merge()).eval()
    x = torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        y = net(x)
        for method, value in (("forward", x), ("inverse", y), ("forward_and_log_det", x), ("off_range", y)):
            compiled = torch.compile(getattr(net, method), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(value), getattr(net, method)(value))


def test_inverses_in_several_threads_leave_the_statistics_alone():
    coupling = Coupling(nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 64)))
    buffers, before = list(coupling.buffers()), state(coupling)
    x = torch.rand(64, 64), torch.rand(64, 64)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: coupling.inverse(x), range(200)))
    assert all(a is b for a, b in zip(buffers, coupling.buffers(), strict=True))
    assert same(before, state(coupling))
