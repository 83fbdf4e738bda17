"""``channels_last`` from the image to the features, through the replay, back, and in the gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zoo
from invertible import Coupling, Merge, PadSplit, PixelUnshuffle, Recompute, Reconstruct, Sequential, Split, Store
from invertible._value import is_channels_last, leaves

STRATEGIES = st.sampled_from([Store(), Recompute(), Recompute(every=2), Reconstruct(), Reconstruct(anchor_every=2)])
GRIDS = st.sampled_from([None, "exact", "exact32"])
ORDERS = st.sampled_from(["channel_major", "pixel_major"])


def block(channels, wider, dims, stride):
    conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    return nn.Sequential(
        norm(channels), nn.ReLU(), conv(channels, channels, 3, stride, 1), norm(channels), nn.ReLU(),
        conv(channels, wider, 3, padding=1),
    )  # fmt: skip


def watched(net):
    """The layouts of all that goes in and out of layers, and of functions."""
    streams, inputs, outputs = [], [], []

    def of_layer(_, args, y):
        streams.extend(map(is_channels_last, (*leaves(args), *leaves(y))))

    def of_function(_, args, y):
        inputs.append(is_channels_last(args[0]))
        outputs.append(is_channels_last(y))

    for layer in net:
        layer.register_forward_hook(of_layer)
        if isinstance(layer, Coupling):
            layer.function.register_forward_hook(of_function)
    return streams, inputs, outputs


@settings(max_examples=10)
@given(STRATEGIES, GRIDS, ORDERS, st.integers(1, 3), st.sampled_from([2, 3]), st.booleans(), st.integers(2, 3))
def test_it_is_kept_throughout(strategy, grid, order, batch, dims, injective, side):
    form = torch.channels_last if dims == 2 else torch.channels_last_3d
    torch.manual_seed(0)
    split = PadSplit(2 * 2**dims, 2 * 2**dims + 4) if injective else Split()
    width = 2**dims + 2 * injective
    wide = width * 2**dims
    layers = [
        PixelUnshuffle(2, order=order),
        split,
        Coupling(block(width, width, dims, 1)),
        Coupling(block(width, wide, dims, 2), downsample=PixelUnshuffle(2, order=order)),
        Coupling(block(wide, wide, dims, 1)),
        Merge(),
    ]
    net = Sequential(*layers, backprop=strategy, grid=grid).to(memory_format=form)
    x = torch.rand(batch, 2, *[4 * side] * dims).contiguous(memory_format=form).requires_grad_()
    streams, inputs, outputs = watched(net)
    y = net(x)
    forward = len(inputs)
    y.square().mean().backward()
    assert forward == 3
    assert len(inputs) == (3 if strategy == Store() else 6)
    assert all(streams)
    assert all(outputs) or dims == 3  # torch's convolutions of volumes on a CPU choose for themselves
    # On a grid a function reads contiguous values, or the way back could not tell how they had lain.
    assert set(inputs) == {grid is None}
    assert is_channels_last(x.grad)
    with torch.no_grad():
        back = net.inverse(y)
    assert is_channels_last(back)
    assert set(inputs) == {grid is None}


def test_an_i_revnet_keeps_it():
    net = zoo.create("irevnet_small").to(memory_format=torch.channels_last)
    net.backprop = Reconstruct()
    streams, inputs, outputs = watched(net.body)
    x = torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    net(x).square().mean().backward()
    assert len(inputs) == 2 * sum(isinstance(layer, Coupling) for layer in net.body)
    assert all(streams + inputs + outputs)
    assert is_channels_last(x.grad)
