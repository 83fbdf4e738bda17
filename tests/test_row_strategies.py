"""Every layer trains alike whatever is kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invertible import Sequential
from invertible.testing import check_backprop
from tests.catalogue import ROWS


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=4)
@given(data=st.data())
def test_layer_trains_alike_under_every_strategy(name, data):
    row = ROWS[name]
    layer = row.build(data.draw)
    x = row.input(data.draw, layer)
    net = layer if isinstance(layer, Sequential) else Sequential(layer)
    check_backprop(net, x, condition=row.condition and row.condition(x))
