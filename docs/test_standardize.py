"""Standardize keeps every law, and trains alike whatever is kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from standardize import Standardize

from invertible import Sequential
from invertible.testing import LAWS, check_backprop
from invertible.testing.strategies import tensors

images = tensors(channels=st.just(3))
deviations = st.lists(st.floats(0.25, 4), min_size=3, max_size=3)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@given(x=images, std=deviations)
def test_law(law, x, std):
    law(Standardize(mean=[0.5, 0.4, 0.4], std=std), x)


@given(x=images, std=deviations)
def test_training(x, std):
    layer = Standardize(mean=[0.5, 0.4, 0.4], std=std)
    check_backprop(Sequential(layer, layer), x)  # the input of the second is reconstructed


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="expected 3 channels"):
        Standardize(mean=[0, 0, 0], std=[1, 1, 1])(torch.zeros(1, 4))
