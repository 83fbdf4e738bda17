"""Every layer trains alike whatever is kept, in every method and with its input and output reconstructed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invertible import Inverse, Recompute, Reconstruct, Sequential
from invertible.testing import check_backprop, inverse_moves_no_buffer, log_det_matches_autograd
from tests.catalogue import ROWS
from tests.networks import METHODS, assert_same, outcome, with_strategy
from tests.rows import Same

STRATEGIES = [Recompute(), Recompute(every=2), Reconstruct(), Reconstruct(anchor_every=2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=2)
@given(data=st.data())
def test_layer_trains_alike_under_every_strategy(name, method, data):
    row = ROWS[name]
    layer = row.build(data.draw)
    x = row.input(data.draw, layer)
    condition = row.condition and row.condition(x)
    if method.endswith("log_det") and log_det_matches_autograd in row.exempt and not layer.stochastic:
        return  # it has none
    after = [] if method.endswith("log_det") and layer._is_tall else [Same()]  # only isometric layers may follow
    net = Sequential(Same(), layer, *after)
    if method.startswith("inverse"):
        with torch.no_grad():
            x = copy.deepcopy(net).eval()(x, condition=condition)
        if inverse_moves_no_buffer in row.exempt:
            net.eval()  # in training mode it has no inverse
    expected, _ = outcome(net, x, condition, method=method)
    for strategy in STRATEGIES:
        found, _ = outcome(with_strategy(net, strategy), x, condition, method=method)
        assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("name", ["ActNorm", "Coupling", "InvertibleLinear", "PixelUnshuffle"])
@settings(max_examples=2)
@given(data=st.data())
def test_layer_trains_backwards_alike(name, data):
    """The trained direction is the inverse."""
    row = ROWS[name]
    layer = row.build(data.draw)
    with torch.no_grad():
        y = copy.deepcopy(layer).eval()(row.input(data.draw, layer))
    net = Sequential(Same(), layer, Same())
    expected, _ = outcome(Inverse(net), y)
    for strategy in STRATEGIES:
        found, _ = outcome(Inverse(with_strategy(net, strategy)), y)
        assert_same(found, expected, 1e-9)


def test_check_backprop_needs_a_layer_before_the_one_that_is_tried():
    """The first layer that computes keeps its input, so that its inverse is not asked."""

    class Wrong(Same):
        def inverse(self, y, *, condition=None):
            return y * 3

    x = torch.rand(2, 3, dtype=torch.float64)
    check_backprop(Sequential(Wrong()), x)
    with pytest.raises(AssertionError, match="its inverse is off by"):
        check_backprop(Sequential(Same(), Wrong()), x)
