"""Every layer is compiled as one graph in both directions, and computes the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invertible import Exactness
from invertible._value import leaves
from invertible.testing import log_det_matches_autograd
from tests.catalogue import ROWS


@pytest.mark.slow  # seconds each
@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_log_det"])
@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=1)
@given(data=st.data())
def test_layer_is_compiled_whole(name, method, data):
    row = ROWS[name]
    layer = row.build(data.draw).eval()
    x = row.input(data.draw, layer)
    condition = row.condition and row.condition(x)
    whole = method == "forward" or layer.exactness is not Exactness.ITERATIVE  # an iteration breaks the graph
    torch._dynamo.reset()
    with torch.no_grad():
        value = layer(x, condition=condition) if method == "inverse" else x
        if method == "forward_and_log_det" and log_det_matches_autograd in row.exempt and not layer.stochastic:
            return  # it has none: an injective layer before one that is not isometric
        torch.manual_seed(1)
        expected = getattr(layer, method)(value, condition=condition)
        compiled = torch.compile(getattr(layer, method), backend="aot_eager", fullgraph=whole)
        torch.manual_seed(1)
        found = compiled(value, condition=condition)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(a, b)
