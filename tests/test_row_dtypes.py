"""In single precision every layer keeps the laws of its inverse within the tolerance that its row declares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invertible._value import map_value
from invertible.testing import (
    is_deterministic,
    is_onto_if_bijective,
    keeps_form,
    log_det_matches_autograd,
    projects_if_injective,
    recovers_its_input,
    treats_samples_alone,
)
from tests.catalogue import ROWS

LAWS = (recovers_its_input, is_onto_if_bijective, projects_if_injective, keeps_form, treats_samples_alone)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=5)
@given(data=st.data())
def test_single_precision(name, data):
    row = ROWS[name]
    layer = row.build(data.draw).float()
    x = row.input(data.draw, layer)
    if layer.grid is None:  # else its values are those of the grid, in the grid's dtype
        x = map_value(torch.Tensor.float, x)
    condition = row.condition and row.condition(x)
    for law in LAWS:
        if law not in row.exempt:
            law(layer, x, condition=condition, atol=row.single)
    if not {log_det_matches_autograd, is_deterministic} & set(row.exempt):
        layer.eval()
        y, log_det = layer.forward_and_log_det(x, condition=condition)
        _, back = layer.inverse_and_log_det(y, condition=condition)
        torch.testing.assert_close(log_det, -back, atol=row.single * max(y_size(y), 1), rtol=1e-4)


def y_size(value):
    """How many elements a sample has: as many logarithms are added up."""
    sizes = []
    map_value(lambda t: sizes.append(t[0].numel()) or t, value)
    return sum(sizes)
