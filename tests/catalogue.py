"""One row per layer: all that the tests of the contract know about it. Rows of one layer are told apart by a word."""

import torch
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible.testing import log_det_matches_autograd
from invertible.testing.strategies import pairs, tensors
from tests import rows_mixing, rows_residual, rows_sampling, rows_transforms
from tests.rows import ConditionalTanh, Row, Scale, image, seeded, smooth, streams, with_mode


def draw_unshuffle(draw):
    order = draw(st.sampled_from(["channel_major", "pixel_major"]))
    factors = st.integers(1, 3)
    factor = draw(st.one_of(factors, st.lists(factors, min_size=1, max_size=3)))
    return inv.PixelUnshuffle(factor, order=order)


def unshuffle_input(draw, module):
    factor = module.downscale_factor
    if isinstance(factor, int):
        return draw(tensors(channels=st.integers(1, 3), multiple_of=factor))
    x = draw(tensors(channels=st.integers(1, 3), dims=st.just(len(factor))))
    return x.repeat(1, 1, *factor) + torch.linspace(0, 1, 5, dtype=x.dtype)[draw(st.integers(0, 4))]


def draw_pad_split(draw):
    in_channels = draw(st.integers(1, 6))
    return inv.PadSplit(in_channels, 2 * draw(st.integers((in_channels + 1) // 2, 6)))


def draw_permute(draw):
    channels = draw(st.integers(1, 6))
    return draw(
        st.sampled_from(
            [
                inv.Permute.reversed(channels),
                inv.Permute.random(channels, seed=draw(st.integers(0, 99))),
                inv.Permute(draw(st.permutations(range(channels)))),
            ]
        )
    )


def draw_coupling(draw):
    norm = draw(st.booleans(), label="norm")
    return with_mode(draw, seeded(draw, lambda: inv.Coupling(smooth(3, norm=norm))))


def draw_downsampling_coupling(draw):
    def make():
        return inv.Coupling(smooth(2, 8, stride=2), downsample=inv.PixelUnshuffle(2, order="pixel_major"))

    return with_mode(draw, seeded(draw, make))


def draw_sequential(draw):
    """A thin i-RevNet body with two nested stages."""

    def make():
        stage = inv.Sequential(
            *(inv.Coupling(smooth(6, norm=True)) for _ in range(draw(st.integers(0, 3)))), inv.Swap()
        )
        down = inv.Coupling(smooth(6, 24, stride=2), downsample=inv.PixelUnshuffle(2))
        return inv.Sequential(inv.PixelUnshuffle(2), inv.Split(), stage, down, inv.Merge(), inv.Permute.reversed(48))

    return with_mode(draw, seeded(draw, make))


def on_grid(net):
    net.grid = "exact"
    return net


def draw_injective_sequential(draw):
    def make():
        return inv.Sequential(inv.PadSplit(3, 8), inv.Coupling(smooth(4)), inv.Coupling(smooth(4)), inv.Merge())

    return with_mode(draw, seeded(draw, make))


def draw_inverse(draw):
    def make():
        inner = inv.Sequential(inv.Split(), inv.Coupling(smooth(2, norm=True)), inv.Merge())
        return inv.Inverse(inv.Inverse(inner) if draw(st.booleans()) else inner)

    return with_mode(draw, seeded(draw, make))


def draw_parallel(draw):
    def make():
        return inv.Parallel(inv.PixelUnshuffle(2), inv.Coupling(smooth(2, norm=True)))

    return with_mode(draw, seeded(draw, make))


x2d = torch.zeros(2, 3, 4, 4)

ROWS = {
    "Identity": Row(inv.Identity, lambda draw: inv.Identity(), lambda draw, m: draw(tensors())),
    "Identity nested": Row(
        inv.Identity,
        lambda draw: inv.Identity(),
        lambda draw, m: (lambda p: (p[0], (p[1], p[0] + 1)))(draw(pairs())),
        rejects={
            "Identity(): expected a tensor, or a tuple of tensors, got an object of type int.": lambda: (
                inv.Identity().forward_and_log_det(3)
            ),
            "Identity(): expected a tensor of shape (batch, channels, ...), got a tensor of shape (3,).": lambda: (
                inv.Identity().off_range(torch.zeros(3))
            ),
        },
    ),
    "Swap": Row(
        inv.Swap,
        lambda draw: inv.Swap(),
        lambda draw, m: draw(pairs()),
        rejects={
            "Swap(): expected a pair of tensors (x1, x2), got a tensor of shape (2, 3, 4, 4). Split it first": lambda: (
                inv.Swap()(x2d)
            ),
            "expected a pair of tensors (x1, x2), got a tuple of a tensor of shape (2, 3, 4, 4).": lambda: inv.Swap()(
                (x2d,)
            ),
            "expected a pair of tensors (x1, x2), got an object of type list.": lambda: inv.Swap().inverse([x2d, x2d]),
        },
    ),
    "Split": Row(
        inv.Split,
        lambda draw: inv.Split(),
        lambda draw, m: draw(tensors(channels=st.sampled_from([2, 4, 6]))),
        rejects={
            "Split(): expected a tensor, got a tuple of a tensor": lambda: inv.Split()((x2d, x2d)),
            "Split(): expected a tensor, got an object of type ndarray.": lambda: inv.Split()(x2d.numpy()),
            "the number of channels must be even, got a tensor of shape (2, 3, 4, 4).": lambda: inv.Split()(x2d),
            "expected a tensor of shape (batch, channels, ...), got a tensor of shape (4,).": lambda: inv.Split()(
                torch.zeros(4)
            ),
            "Split(): expected a pair of tensors": lambda: inv.Split().inverse(x2d),
        },
    ),
    "Merge": Row(
        inv.Merge,
        lambda draw: inv.Merge(),
        lambda draw, m: draw(pairs()),
        rejects={
            "Merge(): expected a pair of tensors": lambda: inv.Merge()(x2d),
            "both streams must have the same number of channels": lambda: inv.Merge()((x2d, x2d[:, :2])),
            "both streams must have the same batch and spatial size": lambda: inv.Merge()((x2d, x2d[:1])),
            "both streams must have one dtype, got torch.float32 and torch.float64": lambda: inv.Merge()(
                (x2d, x2d.double())
            ),
            "both streams must be on one device, got cpu and meta": lambda: inv.Merge()((x2d, x2d.to("meta"))),
            "the number of channels must be even": lambda: inv.Merge().inverse(x2d),
        },
    ),
    "PadSplit": Row(
        inv.PadSplit,
        draw_pad_split,
        lambda draw, m: draw(tensors(channels=st.just(m.in_channels))),
        rejects={
            "PadSplit(8, 6): out_channels must be at least in_channels, got 6 for 8.": lambda: inv.PadSplit(8, 6),
            "PadSplit(3, 5): out_channels must be even, got 5.": lambda: inv.PadSplit(3, 5),
            "PadSplit(0, 2): in_channels must be at least 1, got 0.": lambda: inv.PadSplit(0, 2),
            "PadSplit: in_channels must be an integer, got 3.5.": lambda: inv.PadSplit(3.5, 8),
            "PadSplit(4, 6): expected 4 channels, got a tensor of shape (2, 3, 4, 4).": lambda: inv.PadSplit(4, 6)(x2d),
            "PadSplit(4, 8): expected 4 channels in each stream": lambda: inv.PadSplit(4, 8).inverse((x2d, x2d)),
        },
    ),
    "PixelUnshuffle": Row(
        inv.PixelUnshuffle,
        draw_unshuffle,
        unshuffle_input,
        rejects={
            "PixelUnshuffle(downscale_factor=3): height and width must be divisible by 3, "
            "got a tensor of shape (2, 3, 4, 4).": lambda: inv.PixelUnshuffle(3)(x2d),
            "length must be divisible by 2": lambda: inv.PixelUnshuffle(2)(torch.zeros(1, 1, 3)),
            "depth, height and width must be divisible by (1, 1, 2)": lambda: inv.PixelUnshuffle((1, 1, 2))(
                torch.zeros(1, 1, 2, 2, 3)
            ),
            "channels must be divisible by 4, got a tensor of shape (2, 3, 4, 4).": lambda: inv.PixelUnshuffle(
                2
            ).inverse(x2d),
            "expected 1 spatial dimensions, one per factor": lambda: inv.PixelUnshuffle([2])(x2d),
            "expected one to three spatial dimensions, got a tensor of shape (2, 3).": lambda: inv.PixelUnshuffle(2)(
                x2d[..., 0, 0]
            ),
            "downscale_factor must be at least 1, one for all or for each of one to three dimensions, got 0.": lambda: (
                inv.PixelUnshuffle(0)
            ),
            "PixelUnshuffle: downscale_factor must be an integer, got 2.0.": lambda: inv.PixelUnshuffle((2.0, 2)),
            "PixelUnshuffle: downscale_factor must be an integer, got '22'.": lambda: inv.PixelUnshuffle("22"),
            "order must be 'channel_major', 'pixel_major', 'checkerboard' or 'patch', got 'rows'.": lambda: (
                inv.PixelUnshuffle(2, order="rows")
            ),
        },
    ),
    "Permute": Row(
        inv.Permute,
        draw_permute,
        lambda draw, m: draw(tensors(channels=st.just(len(m.permutation)))),
        rejects={
            "Permute: expected each of the channels 0 ... 2 once, got [0, 1, 1].": lambda: inv.Permute([0, 1, 1]),
            "Permute: expected at least one channel, got [].": lambda: inv.Permute([]),
            "Permute: a channel must be an integer, got 0.9.": lambda: inv.Permute([0.9, 1.9]),
            "Permute(channels=2): expected 2 channels, got a tensor of shape (2, 3, 4, 4).": lambda: inv.Permute(
                [1, 0]
            )(x2d),
        },
    ),
    "Coupling": Row(
        inv.Coupling,
        draw_coupling,
        lambda draw, m: draw(streams(3)),
        rejects={
            "Coupling(): expected a pair of tensors": lambda: inv.Coupling(nn.Tanh())(x2d),
            "Coupling(): both streams must have one dtype": lambda: inv.Coupling(nn.Tanh())((x2d, x2d.double())),
            "Coupling(): both streams must have the same batch": lambda: inv.Coupling(nn.Tanh())((x2d, x2d[..., :2])),
            "Coupling(): expected a floating-point tensor, got dtype torch.int64.": lambda: inv.Coupling(nn.Tanh())(
                (x2d.long(), x2d.long())
            ),
            "expected a floating-point tensor, got dtype torch.complex64.": lambda: inv.Coupling(nn.Tanh())(
                (x2d.cfloat(), x2d.cfloat())
            ),
            "the function must return a tensor of shape (2, 3, 4, 4), got a tensor of shape (2, 5, 4, 4).": lambda: (
                inv.Coupling(nn.Conv2d(3, 5, 1))((x2d, x2d))
            ),
            "the function must return a tensor, got a tuple": lambda: inv.Coupling(
                nn.AdaptiveMaxPool2d(4, return_indices=True)
            )((x2d, x2d)),
            "Coupling: function must be of type Module, got an object of type builtin_function_or_method.": lambda: (
                inv.Coupling(torch.tanh)
            ),
            "Coupling: transform must be of type CouplingTransform": lambda: inv.Coupling(nn.Tanh(), nn.Tanh()),
            "Coupling: downsample must be of type InvertibleModule": lambda: inv.Coupling(
                nn.Tanh(), downsample=nn.PixelUnshuffle(2)
            ),
        },
    ),
    "Coupling downsampling": Row(inv.Coupling, draw_downsampling_coupling, lambda draw, m: draw(streams(2))),
    "Coupling with a scaling downsample": Row(
        inv.Coupling,
        lambda draw: inv.Coupling(nn.Tanh(), downsample=Scale(draw(st.sampled_from([0.5, 1.5])))),
        lambda draw, m: draw(pairs()),
    ),
    "Coupling of unequal streams": Row(
        inv.Coupling,
        lambda draw: seeded(draw, lambda: inv.Coupling(smooth(3, 2))),
        lambda draw, m: (lambda x: (x[:, :2], x[:, 2:]))(image(draw, 5)),
    ),
    "Coupling with a condition": Row(
        inv.Coupling,
        lambda draw: inv.Coupling(ConditionalTanh()),
        lambda draw, m: draw(pairs()),
        condition=lambda x: x[0].flatten(1)[:, :1] + 2,
    ),
    "Parallel": Row(
        inv.Parallel,
        draw_parallel,
        lambda draw, m: (lambda p: (torch.cat(p, 1), p))(draw(streams(2))),
        rejects={
            "Parallel: expected at least one layer, got none.": lambda: inv.Parallel(),
            "Parallel: expected an InvertibleModule, got an object of type Tanh. A function without": lambda: (
                inv.Parallel(nn.Tanh())
            ),
            "Parallel(): expected a tuple of 2 streams, got a tensor of shape (2, 3, 4, 4).": lambda: inv.Parallel(
                inv.Identity(), inv.Identity()
            )(x2d),
            "Parallel(): expected 1 streams, got a tuple of": lambda: inv.Parallel(inv.Identity())((x2d, x2d)),
        },
    ),
    "Inverse": Row(
        inv.Inverse,
        draw_inverse,
        lambda draw, m: image(draw, 4),
        rejects={
            "Inverse: expected an InvertibleModule, got an object of type Tanh.": lambda: inv.Inverse(nn.Tanh()),
            "Inverse: expected a bijective layer, got PadSplit(3, 8).": lambda: inv.Inverse(inv.PadSplit(3, 8)),
        },
    ),
    "Sequential": Row(
        inv.Sequential,
        draw_sequential,
        lambda draw, m: image(draw, multiple_of=4),
        rejects={
            "Sequential: expected an InvertibleModule, got an object of type ReLU. A function without an inverse goes "
            "into a Coupling.": lambda: inv.Sequential(inv.Split(), nn.ReLU()),
            "Sequential: expected an InvertibleModule, got an object of type int.": lambda: inv.Sequential(3),
            "expected a pair of tensors": lambda: inv.Sequential(inv.PixelUnshuffle(2), inv.Coupling(nn.Tanh()))(x2d),
            "'str' object cannot be interpreted as an integer": lambda: inv.Sequential(inv.Split())["0"],
            "Sequential(): expected a tensor, or a tuple of tensors, got an object of type list.": lambda: (
                inv.Sequential(inv.Split()).forward_and_log_det([1])
            ),
            "Sequential(): expected a tensor of shape (batch, channels, ...), got a tensor of shape ().": lambda: (
                inv.Sequential(inv.Split()).forward_and_log_det(torch.tensor(1.0))
            ),
            "Sequential: a slice cannot turn the order round, got step -1. The swapped map is Inverse(net)": lambda: (
                inv.Sequential(inv.Split())[::-1]
            ),
            "Sequential: has no log-determinant, because layer 1, Coupling(), is not isometric and follows layer 0, "
            "PadSplit(3, 8), which is not bijective.": lambda: inv.Sequential(
                inv.PadSplit(3, 8), inv.Coupling(nn.Tanh())
            ).forward_and_log_det(x2d),
        },
    ),
    "Sequential on a grid": Row(
        inv.Sequential,
        lambda draw: on_grid(draw_sequential(draw)),
        lambda draw, m: m.snap(image(draw, multiple_of=4)),
        rejects={
            "Sequential: every layer must keep its values on the grid, got layer '0', Scale()": lambda: inv.Sequential(
                Scale(), grid="exact"
            ),
            "inverse takes the torch.float64 values that forward returned, got torch.float32": lambda: inv.Sequential(
                grid="exact"
            ).inverse(x2d),
        },
    ),
    "Sequential injective": Row(
        inv.Sequential,
        draw_injective_sequential,
        lambda draw, m: image(draw),
        exempt=(log_det_matches_autograd,),
    ),
}
ROWS |= rows_transforms.ROWS | rows_mixing.ROWS | rows_sampling.ROWS | rows_residual.ROWS
