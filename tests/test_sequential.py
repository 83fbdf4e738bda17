"""What the laws cannot say of the containers: keys, slices, traces, notes, conditions, derived properties."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from invertible import (
    Coupling,
    Exactness,
    Identity,
    Inverse,
    Merge,
    PadSplit,
    Parallel,
    Permute,
    PixelUnshuffle,
    Sequential,
    Split,
    Swap,
)
from tests.rows import ConditionalTanh


def numbered(n):
    return Sequential(*(Permute.random(4, seed=i) for i in range(n)))


def test_it_behaves_like_a_list():
    layers = [Identity() for _ in range(5)]
    net = Sequential(*layers)
    assert len(net) == 5
    assert list(net) == layers
    assert list(reversed(net)) == layers[::-1]
    assert net[1] is layers[1]
    assert net[-1] is layers[-1]
    assert list(net[1:4:2]) == layers[1:4:2]
    assert layers[2] in net
    with pytest.raises(IndexError):
        net[5]


def test_empty_is_the_identity():
    x = torch.ones(2, 3)
    net = Sequential()
    assert net(x) is x
    assert net.inverse(x) is x
    assert net.exactness is Exactness.EXACT
    assert net.isometric
    assert torch.equal(net.forward_and_log_det(x)[1], torch.zeros(2))


@given(st.integers(0, 6), st.integers(-7, 7), st.integers(-7, 7))
def test_slices_share_layers_and_keep_keys(n, start, stop):
    net = numbered(n)
    part = net[start:stop]
    assert list(part) == list(net)[start:stop]
    assert set(part.state_dict()) <= set(net.state_dict())
    assert [name for name, _ in part.named_children()] == [str(i) for i in range(n)][start:stop]


@given(st.integers(0, 5), st.integers(-6, 6))
def test_insert_is_the_lists_own(n, index):
    net, new = numbered(n), Permute.reversed(4)
    expected = list(net)
    expected.insert(index, new)
    assert net.insert(index, new) is net
    assert list(net) == expected
    assert [name for name, _ in net.named_children()] == [str(i) for i in range(n + 1)]


def test_append_keeps_the_keys_of_slices_and_names():
    whole = numbered(6)
    part = whole[2:5].append(Identity())  # torch.nn.Sequential overwrites a layer here
    assert len(part) == 4
    assert [name for name, _ in part.named_children()][:3] == ["2", "3", "4"]
    assert len(whole) == 6
    named = Sequential(OrderedDict(down=PixelUnshuffle(2))).append(Split())
    assert [name for name, _ in named.named_children()] == ["down", "1"]


def test_append_refuses_before_it_changes():
    net = numbered(2)
    with pytest.raises(TypeError, match="expected an InvertibleModule"):
        net.append(nn.ReLU())
    assert len(net) == 2


def test_trace_gives_every_layers_name_and_value_both_ways():
    stage = Sequential(Coupling(nn.Tanh()), Coupling(nn.Tanh()))
    net = Sequential({"down": PixelUnshuffle(2), "split": Split(), "stage": stage, "merge": Merge()})
    x = torch.rand(2, 3, 4, 4)
    forward = list(net.trace(x))
    assert [name for name, _ in forward] == ["down", "split", "stage.0", "stage.1", "merge"]
    y = forward[-1][1]
    assert torch.equal(y, net(x))
    backward = list(net.trace_inverse(y))
    assert [name for name, _ in backward] == ["merge", "stage.1", "stage.0", "split", "down"]
    assert torch.equal(backward[-1][1], net.inverse(y))
    inputs = [x, *(value for _, value in forward[:-1])]
    for (_, recovered), true in zip(backward, reversed(inputs), strict=True):
        torch.testing.assert_close(recovered, true)


def test_errors_say_where():
    net = Sequential(Split(), Sequential(Swap(), Parallel(Identity(), PixelUnshuffle(2))))
    with pytest.raises(ValueError, match="height and width") as caught:
        net(torch.zeros(1, 2, 3, 3))
    assert caught.value.__notes__ == [
        "in Parallel, stream 1 of 2, forward",
        "in Sequential, layer 1 of 2, forward",
        "in Sequential, layer 1 of 2, forward",
    ]
    with pytest.raises(ValueError, match="batch, channels") as caught:
        Sequential(Identity(), Inverse(Split())).inverse(torch.zeros(1))
    assert caught.value.__notes__ == ["in Inverse, forward of the layer inside", "in Sequential, layer 1 of 2, inverse"]


def test_hooks_and_names_see_a_network_as_usual():
    net = Sequential(PixelUnshuffle(2), Split(), Merge())
    seen = []
    for layer in net:
        layer.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    net(torch.zeros(1, 1, 2, 2))
    assert seen == ["PixelUnshuffle", "Split", "Merge"]


def test_the_condition_reaches_every_layer_in_every_direction():
    inner = Sequential(Coupling(ConditionalTanh()), Inverse(Coupling(ConditionalTanh())))
    both = Parallel(Sequential(Split(), Coupling(ConditionalTanh()), Merge()), Identity())
    net = Sequential(Split(), inner, both, Merge())
    x, condition = torch.rand(2, 4, 3, 3, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    y = net(x, condition=condition)
    assert not torch.equal(y, net(x, condition=condition + 1))
    torch.testing.assert_close(net.inverse(y, condition=condition), x)
    torch.testing.assert_close(net.forward_and_log_det(x, condition=condition)[0], y)
    torch.testing.assert_close(net.inverse_and_log_det(y, condition=condition)[0], x)
    assert net.off_range(y, condition=condition).max() < 1e-12
    assert torch.equal([value for _, value in net.trace(x, condition=condition)][-1], y)
    torch.testing.assert_close([value for _, value in net.trace_inverse(y, condition=condition)][-1], x)
    alone = both((x[:, :2], x[:, 2:]), condition=condition)
    assert not torch.equal(alone[0], both((x[:, :2], x[:, 2:]), condition=condition + 1)[0])


@pytest.mark.parametrize(
    ("net", "bijective", "isometric", "exactness"),
    [
        (Sequential(Split(), Swap()), True, True, Exactness.EXACT),
        (Sequential(PadSplit(3, 8), Swap()), False, True, Exactness.EXACT),
        (Sequential(Split(), Coupling(nn.Tanh())), True, False, Exactness.ROUNDING),
        (Parallel(Identity(), PadSplit(1, 4)), False, True, Exactness.EXACT),
        (Parallel(Identity(), Inverse(Sequential(Coupling(nn.Tanh())))), True, False, Exactness.ROUNDING),
        (Coupling(nn.Tanh(), downsample=PixelUnshuffle(2)), True, False, Exactness.ROUNDING),
    ],
)
def test_the_weakest_layer_decides(net, bijective, isometric, exactness):
    assert (net.bijective, net.isometric, net.exactness, net.stochastic) == (bijective, isometric, exactness, False)


def test_log_det_of_injective_layers_followed_by_moves_only():
    net = Sequential(Split(), Coupling(nn.Tanh()), Merge(), PadSplit(2, 6), Swap(), Merge())
    _, log_det = net.forward_and_log_det(torch.rand(3, 2))
    assert torch.equal(log_det, torch.zeros(3))
    nested = Sequential(Sequential(PadSplit(2, 6), Merge()), Split(), Coupling(nn.Tanh()))
    with pytest.raises(ValueError, match="layer 2, Coupling\\(\\), is not isometric and follows layer 0, Sequential"):
        nested.inverse_and_log_det((torch.rand(3, 3), torch.rand(3, 3)))


def test_a_trace_enters_plain_sequentials_only_and_says_where():
    class Doubled(Sequential):
        def forward(self, x, *, condition=None):
            return 2 * super().forward(x, condition=condition)

        def inverse(self, y, *, condition=None):
            return super().inverse(y / 2, condition=condition)

    net = Sequential(Doubled(Identity()), Sequential(Identity(), Split()))
    x = torch.ones(1, 2)
    assert [name for name, _ in net.trace(x)] == ["0", "1.0", "1.1"]
    assert torch.equal(next(net.trace(x))[1], 2 * x)
    with pytest.raises(ValueError, match="must be even") as caught:
        list(net.trace(torch.ones(1, 3)))
    assert caught.value.__notes__ == ["in Sequential, layer 1 of 2, forward"] * 2


def test_positions_may_be_any_integer():
    net = numbered(3)
    assert net[np.int64(1)] is net[1]
