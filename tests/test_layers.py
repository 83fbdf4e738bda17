"""What the laws cannot say of the layers that move elements: exactly where each element goes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from invertible import Identity, InvertibleModule, PadSplit, Permute, PixelUnshuffle, Sequential, Split, Swap
from invertible.testing import check
from invertible.testing.strategies import tensors


@given(st.data())
def test_pixel_unshuffle_by_the_index_formula(data):
    """Element by element, against the docstring's formula in any number of dimensions."""
    factors = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    order = data.draw(st.sampled_from(["channel_major", "pixel_major"]))
    channels = data.draw(st.integers(1, 3))
    size = [data.draw(st.integers(1, 2)) for _ in factors]
    x = torch.arange(2 * channels * torch.tensor([f * s for f, s in zip(factors, size, strict=True)]).prod())
    x = x.view(2, channels, *(f * s for f, s in zip(factors, size, strict=True)))
    y = PixelUnshuffle(factors, order=order)(x)
    blocks = list(itertools.product(*map(range, factors)))
    assert y.shape == (2, channels * len(blocks), *size)
    for c, (k, offset), where in itertools.product(
        range(channels), enumerate(blocks), itertools.product(*map(range, size))
    ):
        out = c * len(blocks) + k if order == "channel_major" else k * channels + c
        fine = tuple(w * f + o for w, f, o in zip(where, factors, offset, strict=True))
        assert torch.equal(y[(slice(None), out, *where)], x[(slice(None), c, *fine)])


@given(st.integers(1, 4).flatmap(lambda r: st.tuples(st.just(r), tensors(dims=st.just(2), multiple_of=r))))
def test_channel_major_is_torchs_own(case):
    factor, x = case
    assert torch.equal(PixelUnshuffle(factor)(x), nn.PixelUnshuffle(factor)(x))
    y = PixelUnshuffle(factor)(x)
    assert torch.equal(PixelUnshuffle(factor).inverse(y), nn.PixelShuffle(factor)(y))


def test_the_two_orders_are_two_networks():
    rgb = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    first, _ = Split()(PixelUnshuffle(2)(rgb))
    assert first.flatten().tolist() == [0, 0, 0, 0, 1, 1]
    first, _ = Split()(PixelUnshuffle(2, order="pixel_major")(rgb))
    assert first.flatten().tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.complex64]
)
@pytest.mark.parametrize(
    "layer",
    [PixelUnshuffle(2), PadSplit(4, 8), Split(), Permute.reversed(4), Identity()],
    ids=lambda m: type(m).__name__,
)
def test_moving_layers_take_any_dtype(layer, dtype):
    x = (torch.rand(2, 4, 4, 4) * 200).to(dtype)
    y = layer(x)
    back = layer.inverse(y)
    assert back.dtype == dtype
    assert torch.equal(back, x)
    assert layer.forward_and_log_det(x)[1].is_floating_point()
    assert layer.off_range(y).max() == 0


@given(st.integers(1, 9), st.integers(0, 4))
def test_pad_split_leaves_no_stream_empty(channels, more):
    out = 2 * ((channels + 1) // 2 + more)
    x1, x2 = PadSplit(channels, out)(torch.ones(1, channels))
    half = (channels + 1) // 2
    assert x1.flatten().tolist() == [1] * half + [0] * (out // 2 - half)
    assert x2.flatten().tolist() == [1] * (channels - half) + [0] * (out // 2 - channels + half)


def test_off_range_measures_the_padding():
    layer = PadSplit(3, 8)
    y1, y2 = layer(torch.rand(2, 3))
    assert layer.off_range((y1, y2)).max() == 0
    y1[0, -1], y2[0, -1] = 3, 4
    torch.testing.assert_close(layer.off_range((y1, y2)), torch.tensor([5.0, 0.0]))


def test_moving_is_free_where_the_docs_say_so():
    x = torch.rand(2, 4, 2, 2)
    storage = x.untyped_storage().data_ptr()
    for layer in (Split(), PadSplit(4, 4), Identity(), Swap()):
        value = (x, x) if isinstance(layer, Swap) else x
        results = layer(value)
        for result in results if isinstance(results, tuple) else (results,):
            assert result.untyped_storage().data_ptr() == storage


def test_permute_is_drawn_once_and_kept_in_the_state():
    state = torch.get_rng_state()
    a, b = Permute.random(64, seed=1), Permute.random(64, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.permutation, Permute.random(64, seed=1).permutation)
    assert not torch.equal(a.permutation, b.permutation)
    assert not list(a.parameters())
    b.load_state_dict(a.state_dict())
    x = torch.rand(1, 64)
    assert torch.equal(a(x), b(x))
    assert torch.equal(b.inverse(b(x)), x)
    assert torch.equal(Permute.reversed(3)(torch.tensor([[1, 2, 3]])), torch.tensor([[3, 2, 1]]))


def test_permute_refuses_a_checkpoint_that_is_no_permutation():
    layer = Permute([2, 0, 1])
    bad = {"permutation": torch.tensor([0, 0, 1])}
    with pytest.raises(ValueError, match=r"permutation: expected each of the channels 0 ... 2 once, got \[0, 0, 1\]"):
        layer.load_state_dict(bad)
    assert layer.permutation.tolist() == [2, 0, 1]


def test_networks_are_built_on_the_meta_device():
    with torch.device("meta"):
        net = Sequential(PixelUnshuffle(2), Permute.random(12, seed=0), Split())
    y1, _ = net(torch.empty(2, 3, 8, 8, device="meta"))
    assert y1.shape == (2, 6, 4, 4)


class Shift(InvertibleModule):
    """A user's own layer, with two methods only."""

    def forward(self, x, *, condition=None):
        return x + 1

    def inverse(self, y, *, condition=None):
        return y - 1


def test_a_users_layer_of_two_methods():
    net = Sequential(Shift(), Shift())
    x = torch.rand(2, 3)
    torch.testing.assert_close(net.inverse(net(x)), x)
    with pytest.raises(
        NotImplementedError, match=r"Shift\(\): has no log-determinant. Define forward_and_log_det in Shift"
    ):
        net.forward_and_log_det(x)
    with pytest.raises(NotImplementedError) as caught:
        check(Shift(), torch.rand(2, 3, dtype=torch.float64))
    assert any("law: log_det_matches_autograd" in note for note in caught.value.__notes__)
