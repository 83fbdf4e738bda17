"""Every layer keeps every law, and refuses what it documents to refuse."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invertible.testing import LAWS, check
from tests.catalogue import ROWS


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", ROWS)
@given(data=st.data())
def test_layer_keeps_law(name, law, data):
    row = ROWS[name]
    if law in row.exempt:
        return
    module = row.build(data.draw)
    x = row.input(data.draw, module)
    law(module, x, condition=row.condition and row.condition(x))


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=1)  # every law once more
@given(data=st.data())
def test_check_leaves_no_trace(name, data):
    row = ROWS[name]
    module = row.build(data.draw)
    x = row.input(data.draw, module)
    modes = [part.training for part in module.modules()]
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    check(module, x, condition=row.condition and row.condition(x), exempt=row.exempt)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module.modules()] == modes


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, row in ROWS.items() for words in row.rejects])
def test_layer_refuses(name, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        ROWS[name].rejects[words]()
