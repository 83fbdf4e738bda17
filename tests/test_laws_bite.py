"""The laws refuse layers with the bugs that peers have shipped."""

import pytest
import torch

from invertible import testing as laws
from tests.broken_layers import BROKEN, Layer, Scales


@pytest.mark.parametrize("broken", BROKEN, ids=[type(each.layer).__name__ for each in BROKEN])
def test_law_refuses(broken):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(Exception, match=broken.words):
        broken.law(broken.layer, x)


def test_every_law_is_seen_to_bite():
    assert {each.law for each in BROKEN} == set(laws.LAWS)


def test_the_layers_that_are_broken_are_right_otherwise():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    laws.check(Layer(), x)
    laws.check(Scales(), x)
