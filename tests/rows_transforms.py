"""Couplings by what they do to a stream and what they see: their rows of the catalogue."""

import torch
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible.testing import treats_samples_alone
from invertible.testing.strategies import tensors
from tests.rows import Row, seeded, with_mode

CONV = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

x1d, x2d = torch.zeros(2, 4, 3), torch.zeros(2, 4, 4, 4)


class Strong(nn.Module):
    """A smooth function of streams with any space, whose output is far from zero, as that of a trained one."""

    def __init__(self, channels, out, dims, *, gain=3.0):
        super().__init__()
        kernel = () if dims == 0 else (1,)
        self.inner = nn.Sequential(CONV[dims](channels, out, *kernel), nn.Tanh())
        self.gain = gain

    def forward(self, x):
        return self.gain * self.inner(x)


def stream_of(draw, channels, dims):
    return draw(tensors(channels=st.just(channels), dims=st.just(dims)))


def pair_of(draw, channels, dims):
    x = stream_of(draw, sum(channels), dims)
    return x[:, : channels[0]].contiguous(), x[:, channels[0] :].contiguous()


def couplings(transform, *, multiple_of=1):
    """How to draw a coupling of this transform, with drawn channels and dimensions, and its input."""

    def build(draw):
        channels, dims = multiple_of * draw(st.integers(1, 2), label="channels"), draw(st.integers(0, 3), label="dims")
        other, own = draw(st.integers(1, 2), label="other channels"), transform(draw)
        made = seeded(draw, lambda: Strong(other, own.parameters_per_element * channels, dims))
        coupling = inv.Coupling(made, own)
        coupling.sizes = (channels, other), dims
        return coupling

    return build, lambda draw, module: pair_of(draw, *module.sizes)


def affine(draw):
    scale = draw(st.sampled_from(["half-to-one", "sigmoid", "exp-clamped"]), label="scale")
    clamp = draw(st.sampled_from([None, 0.5, 1]), label="clamp") if scale == "exp-clamped" else None
    return inv.Affine(scale=scale, clamp=clamp)


def volume_preserving(draw):
    return inv.VolumePreserving(max_scale=draw(st.sampled_from([1.1, 2, 5.0]), label="max_scale"))


def spline(draw):
    # Flat bins magnify rounding, and steep ones what gradcheck's finite differences are off by.
    return inv.RationalQuadraticSpline(
        bins=draw(st.integers(1, 6), label="bins"),
        bound=draw(st.sampled_from([0.5, 1, 3.0]), label="bound"),
        min_width=0.05,
        min_height=0.05,
        min_derivative=0.1,
    )


def conditional(channels, extra, out, dims):
    return inv.Conditional(Strong(channels + extra, out, dims, gain=1))


def draw_conditional(draw):
    dims = draw(st.integers(0, 3), label="dims")
    coupling = seeded(draw, lambda: inv.Coupling(conditional(2, 2, 4, dims), inv.Affine()))
    coupling.sizes = (2, 2), dims
    return coupling


class Pooled(nn.Module):
    """Encodes a pair of a larger image and a vector."""

    def __init__(self):
        super().__init__()
        self.image, self.vector = nn.Conv2d(1, 2, 1), nn.Linear(3, 2)

    def forward(self, condition):
        image, vector = condition
        return torch.tanh(self.image(image).mean((2, 3)) + self.vector(vector))


def draw_encoded(draw):
    """Conditions through containers: one for both branches, one encoder for both; on a grid or not."""

    def make():
        encoder = Pooled()
        f, g = (inv.Conditional(Strong(n + 2, out, 2, gain=1), encoder=encoder) for n, out in ((2, 4), (1, 1)))
        left = inv.Sequential(inv.Split(), inv.Coupling(f, inv.VolumePreserving(max_scale=4)), inv.Merge())
        right = inv.Inverse(inv.Sequential(inv.Split(), inv.Coupling(g), inv.Merge()))
        grid = draw(st.sampled_from([None, "exact", "exact32"]), label="grid")
        return inv.Sequential(inv.Split(channels=4), inv.Parallel(left, right), inv.Merge(channels=4), grid=grid)

    return with_mode(draw, seeded(draw, make))


def encoded_input(draw, net):
    x = stream_of(draw, 6, 2)
    return x if net.grid is None else net.snap(x)


def larger_image_and_vector(x):
    """Of other shapes, and nothing in common with the input but the batch."""
    vector = x.double().flatten(1)[:, :1] + torch.arange(3.0)
    return torch.sin(vector).view(-1, 1, 3, 1) + torch.arange(5.0).double(), torch.cos(vector)


def vector_or_space(x):
    """Of the stream's space, or the same at every pixel."""
    return torch.sin(x[1]) if len(x[0]) % 2 else torch.cos(x[1].flatten(1)[:, :1] + torch.arange(2.0))


affine_build, affine_input = couplings(affine)
volume_build, volume_input = couplings(volume_preserving, multiple_of=2)
spline_build, spline_input = couplings(spline)
vectors = inv.Conditional(nn.Linear(5, 3))
labelled = inv.Conditional(nn.Linear(5, 3), encoder=nn.Embedding(4, 2))


def condition_of(module_input, condition, function=vectors):
    inv.Coupling(function)(module_input, condition=condition)


pair1d = x1d[:, :3, 0], x1d[:, :3, 0]

ROWS = {
    "Coupling, affine": Row(
        inv.Coupling,
        affine_build,
        affine_input,
        rejects={
            "Affine: scale must be 'half-to-one', 'sigmoid' or 'exp-clamped', got 'exp'.": lambda: inv.Affine(
                scale="exp"
            ),
            "Affine: only the scale 'exp-clamped' has a clamp, got clamp=1.0 for 'half-to-one'.": lambda: inv.Affine(
                clamp=1.0
            ),
            "Affine: clamp must be positive and finite, got 0.": lambda: inv.Affine(scale="exp-clamped", clamp=0),
            "Affine: clamp must be a number, got '2'.": lambda: inv.Affine(scale="exp-clamped", clamp="2"),
            "the function must return a tensor of shape (2, 8, 3), got a tensor of shape (2, 4, 3).": lambda: (
                inv.Coupling(nn.Tanh(), inv.Affine())((x1d, x1d))
            ),
        },
    ),
    "Coupling, volume preserving": Row(
        inv.Coupling,
        volume_build,
        volume_input,
        rejects={
            "VolumePreserving: max_scale must be above 1 and at most 1e+06, got 1.": lambda: inv.VolumePreserving(
                max_scale=1
            ),
            "max_scale must be above 1 and at most 1e+06, got 100000000.0.": lambda: inv.VolumePreserving(
                max_scale=1e8
            ),
            "max_scale must be above 1 and at most 1e+06, got nan.": lambda: inv.VolumePreserving(
                max_scale=float("nan")
            ),
            "VolumePreserving: max_scale must be a number, got None.": lambda: inv.VolumePreserving(max_scale=None),
            "VolumePreserving(): the number of channels must be even, got a tensor of shape (2, 3, 3).": lambda: (
                inv.Coupling(nn.Tanh(), inv.VolumePreserving())((x1d[:, :3], x1d))
            ),
            "the number of channels must be even, got a tensor of shape (2, 1, 3).": lambda: (
                inv.VolumePreserving().inverse(x1d[:, :1], x1d[:, :2])
            ),
        },
    ),
    "Coupling, spline": Row(
        inv.Coupling,
        spline_build,
        spline_input,
        rejects={
            "RationalQuadraticSpline: bins must be at least 1, got 0.": lambda: inv.RationalQuadraticSpline(bins=0),
            "RationalQuadraticSpline: bins must be an integer, got 2.5.": lambda: inv.RationalQuadraticSpline(bins=2.5),
            "RationalQuadraticSpline: bound must be from 1e-30 to 1e+30, got -1.": lambda: inv.RationalQuadraticSpline(
                bound=-1
            ),
            "bound must be from 1e-30 to 1e+30, got 3e+38.": lambda: inv.RationalQuadraticSpline(bound=3e38),
            "bound must be from 1e-30 to 1e+30, got 1e-40.": lambda: inv.RationalQuadraticSpline(bound=1e-40),
            "min_width must be from 1e-05 to below 0.125, got 0.2.": lambda: inv.RationalQuadraticSpline(min_width=0.2),
            "min_height must be from 1e-05 to below 0.5, got 0.": lambda: inv.RationalQuadraticSpline(
                bins=2, min_height=0
            ),
            "min_derivative must be from 1e-05 to below 1, got 1.": lambda: inv.RationalQuadraticSpline(
                min_derivative=1
            ),
        },
    ),
    "Split unequal": Row(
        inv.Split,
        lambda draw: inv.Split(channels=draw(st.integers(1, 3))),
        lambda draw, m: draw(tensors(channels=st.integers(m.channels + 1, 5))),
        rejects={
            "Split(channels=4): expected more than 4 channels, got a tensor of shape (2, 4, 3).": lambda: inv.Split(
                channels=4
            )(x1d),
            "Split: channels must be at least 1, got 0.": lambda: inv.Split(channels=0),
            "Split: channels must be an integer, got 2.0.": lambda: inv.Split(channels=2.0),
            "Split(channels=1): expected 1 channels in the first stream and at least one in the second, "
            "got a tuple of a tensor of shape (2, 4, 3), a tensor of shape (2, 4, 3).": lambda: inv.Split(
                channels=1
            ).inverse((x1d, x1d)),
            "Unequal streams: Split(channels=...).": lambda: inv.Split()(x1d[:, :3]),
        },
    ),
    "Merge unequal": Row(
        inv.Merge,
        lambda draw: inv.Merge(channels=draw(st.integers(1, 3))),
        lambda draw, m: pair_of(draw, (m.channels, draw(st.integers(1, 3))), draw(st.integers(0, 3))),
        rejects={
            "Merge(channels=3): expected 3 channels in the first stream and at least one in the second, "
            "got a tuple of a tensor of shape (2, 4, 3), a tensor of shape (2, 2, 3).": lambda: inv.Merge(channels=3)(
                (x1d, x1d[:, :2])
            ),
            "at least one in the second, got": lambda: inv.Merge(channels=4)((x1d, x1d[:, :0])),
            "Merge(channels=5): expected more than 5 channels": lambda: inv.Merge(channels=5).inverse(x1d),
            "Merge: channels must be at least 1, got -1.": lambda: inv.Merge(channels=-1),
            "Unequal streams: Merge(channels=4).": lambda: inv.Merge()((x1d, x1d[:, :2])),
        },
    ),
    "Coupling, conditional": Row(
        inv.Coupling,
        draw_conditional,
        lambda draw, m: pair_of(draw, *m.sizes),
        condition=vector_or_space,
        rejects={
            "Conditional: function must be of type Module, got an object of type int.": lambda: inv.Conditional(3),
            "Conditional: encoder must be of type Module, got": lambda: inv.Conditional(nn.Tanh(), encoder=torch.sin),
            "Conditional(): the condition must have the shape (2, channels) for a stream of shape (2, 3), got a "
            "tensor of shape (3, 2). An encoder may change its shape: Conditional(function, encoder=...).": lambda: (
                condition_of(pair1d, torch.zeros(3, 2))
            ),
            "for a stream of shape (2, 3), got a tensor of shape (2, 2, 1).": lambda: condition_of(
                pair1d, torch.zeros(2, 2, 1)
            ),
            "for a stream of shape (2, 3), got a tensor of shape (2,).": lambda: condition_of(pair1d, torch.zeros(2)),
            "the condition must have the shape (2, channels) or (2, channels, 4, 4) for a stream of shape "
            "(2, 4, 4, 4), got a tensor of shape (2, 2, 4, 1).": lambda: condition_of(
                (x2d, x2d), torch.zeros(2, 2, 4, 1)
            ),
            "the encoded condition must have the shape (2, channels) for a stream of shape (2, 3), got a tensor of "
            "shape (4, 1).": lambda: condition_of(
                pair1d, torch.zeros(4, 2), inv.Conditional(nn.Linear(4, 3), encoder=nn.Linear(2, 1))
            ),
            "Conditional(): the condition must be on the device of the stream, cpu, got meta.": lambda: condition_of(
                pair1d, torch.zeros(2, 2, device="meta")
            ),
            "Conditional(): the condition must not be complex, got dtype torch.complex64.": lambda: condition_of(
                pair1d, torch.zeros(2, 2) + 1j
            ),
            "Conditional(): the condition must be a tensor, or a tuple of tensors, got an object of type list.": (
                lambda: condition_of(pair1d, [1, 2], labelled)
            ),
            "the condition must be a tensor, or a tuple of tensors, got an object of type dict.": lambda: condition_of(
                pair1d, {"a": torch.zeros(2)}, labelled
            ),
            "the condition must be a tensor, or a tuple of tensors, got an object of type int.": lambda: condition_of(
                pair1d, (torch.zeros(2), 3), labelled
            ),
            "Conditional(): the condition must be a tensor, got an object of type list.": lambda: condition_of(
                pair1d, [1, 2]
            ),
            "An encoder may take several: Conditional(function, encoder=...).": lambda: condition_of(pair1d, (x1d,)),
            "the condition must be a tensor, got a tuple of a tensor of shape (2, 4, 3).": lambda: condition_of(
                pair1d, (x1d,)
            ),
            "Coupling(): the function needs a condition, got None. Pass it to the network: net(x, condition=...).": (
                lambda: condition_of(pair1d, None)
            ),
        },
    ),
    "Sequential, conditional": Row(
        inv.Sequential,
        draw_encoded,
        encoded_input,
        condition=larger_image_and_vector,
        exempt=(treats_samples_alone,),  # on a grid: products of one row have other bits than those of several
        rejects={
            "every layer must keep its values on the grid, got layer '0', Coupling(), which does not": lambda: (
                inv.Sequential(inv.Coupling(nn.Tanh(), inv.Affine()), grid="exact")
            ),
            "got layer '0', Coupling()": lambda: inv.Sequential(
                inv.Coupling(nn.Tanh(), inv.RationalQuadraticSpline()), grid="exact"
            ),
        },
    ),
}
"""One row per layer: all that the tests of the contract know about it. Rows of one layer are told apart by a word."""
