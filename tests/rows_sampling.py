"""Layers that change the size of space, pad, or draw random numbers: their rows of the catalogue."""

import torch
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible.testing import (
    derivatives_are_right,
    log_det_matches_autograd,
    projects_if_injective,
    treats_samples_alone,
)
from invertible.testing.strategies import tensors
from tests.rows import Row, image, seeded, smooth, with_mode

x2d = torch.zeros(2, 3, 4, 4)

ANEW = (  # each call draws other noise, so that two outputs of one input differ
    projects_if_injective,
    treats_samples_alone,
    log_det_matches_autograd,  # it is no Jacobian's: minus the log-density of the noise
)
WHOLE = (*ANEW, derivatives_are_right)  # finite differences leave the whole numbers


def factors(draw, allowed):
    """A factor for all dimensions, or one for each."""
    return draw(st.one_of(st.sampled_from(allowed), st.lists(st.sampled_from(allowed), min_size=1, max_size=3)))


def noise(draw, *shape):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1), label="seed"))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def divisible(draw, module, channels=2):
    """An input whose size is a small multiple of the factors."""
    factor = module.downscale_factor
    if isinstance(factor, int):
        return draw(tensors(channels=st.integers(1, channels), multiple_of=factor))
    size = [draw(st.integers(1, 2)) * each for each in factor]
    return noise(draw, draw(st.integers(1, 3)), draw(st.integers(1, channels)), *size)


def wavelet_factor(draw):
    return draw(st.one_of(st.just(2), st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3)))


def on_grid(layer):
    """The layer on a grid, alone, in a container."""
    return inv.Sequential(layer, grid="exact")


def draw_pad(draw):
    size = draw(st.one_of(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return inv.Pad(size, multiple_of=draw(st.integers(1, 3)) if draw(st.booleans()) else _alike(draw, size))


def _alike(draw, size):
    return [draw(st.integers(1, 3)) for _ in size] if isinstance(size, list) else draw(st.integers(1, 3))


def pad_input(draw, module):
    size = module.size if isinstance(module.size, tuple) else (module.size,) * draw(st.integers(1, 2))
    return noise(draw, draw(st.integers(1, 3)), draw(st.integers(1, 3)), *size)


def draw_padded_network(draw):
    """Images of 5 by 3 pixels, in a network that halves them."""

    def make():
        layers = [inv.PixelUnshuffle(2), inv.Split(), inv.Coupling(smooth(2, norm=True)), inv.Coupling(smooth(2))]
        return inv.Sequential(inv.Pad((5, 3), multiple_of=2), *layers, inv.Merge())

    return with_mode(draw, seeded(draw, make))


def padded_network_input(draw, module):
    return image(draw, 1).repeat(1, 1, 3, 2)[:, :, :5, :3] + torch.linspace(0, 1, 3, dtype=torch.float64)


def draw_augment(draw):
    distribution = draw(st.sampled_from([None, torch.distributions.Uniform(-1.0, 2.0)]))
    return inv.Augment(draw(st.integers(1, 3)), distribution=distribution)


def draw_levels(draw, module):
    x = draw(tensors(dims=st.integers(0, 3)))
    return ((x - x.floor()) * module.levels).floor()


def draw_flow(draw):
    """Dequantised, augmented, and then a coupling: what a density of images begins with."""

    def make():
        layers = [inv.PixelUnshuffle(2), inv.Augment(2), inv.Split(), inv.Coupling(smooth(3)), inv.Merge()]
        return inv.Sequential(inv.Dequantize(16), *layers)

    return with_mode(draw, seeded(draw, make))


def no_shape(shape):
    return torch.zeros(1)


class Wrong:
    """A distribution that knows nothing of shapes."""

    def __init__(self, sample, log_prob):
        self.sample, self.log_prob = sample, log_prob


def draw_reshape(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3), label="sizes")
    return inv.Reshape(sizes, draw(st.sampled_from([(-1,), (1, -1), sizes[::-1], (-1, sizes[0])])))


ROWS: dict[str, Row] = {
    "Reshape": Row(
        inv.Reshape,
        draw_reshape,
        lambda draw, m: torch.randn(draw(st.integers(1, 3)), *m.shape, dtype=torch.float64),
        rejects={
            "Reshape: both shapes must have as many elements, got (2, 3) and (5,).": lambda: inv.Reshape((2, 3), (5,)),
            "Reshape: both shapes must have as many elements, got (2, 3) and (-1, 4).": lambda: inv.Reshape(
                (2, 3), (-1, 4)
            ),
            "Reshape: shape must have one size at least, and each at least 1, got ().": lambda: inv.Reshape((), (1,)),
            "Reshape: new_shape must have one size at least, and each at least 1, got (-1, -1).": lambda: inv.Reshape(
                (4,), (-1, -1)
            ),
            "Reshape: a size of shape must be an integer, got 2.0.": lambda: inv.Reshape((2.0,), (2,)),
            "expected samples of shape (2, 3), got a tensor of shape (4, 3, 2).": lambda: inv.Reshape((2, 3), (6,))(
                torch.zeros(4, 3, 2)
            ),
        },
    ),
    "PixelUnshuffle checkerboard": Row(
        inv.PixelUnshuffle,
        lambda draw: inv.PixelUnshuffle(factors(draw, [2, 4]), order="checkerboard"),
        lambda draw, m: divisible(draw, m, 1),
        rejects={
            "PixelUnshuffle(downscale_factor=(2, 1), order='checkerboard'): a checkerboard needs even factors, for "
            "with odd ones its colours change places from block to block, got (2, 1).": lambda: inv.PixelUnshuffle(
                (2, 1), order="checkerboard"
            ),
        },
    ),
    "PixelUnshuffle patch": Row(
        inv.PixelUnshuffle,
        lambda draw: inv.PixelUnshuffle(factors(draw, [1, 2, 3]), order="patch"),
        divisible,
        rejects={
            "height and width must be divisible by 3, got a tensor of shape (2, 3, 4, 4).": lambda: inv.PixelUnshuffle(
                3, order="patch"
            )(x2d),
        },
    ),
    "Haar": Row(
        inv.Haar,
        lambda draw: inv.Haar(wavelet_factor(draw), lifting=draw(st.booleans())),
        divisible,
        rejects={
            "Haar: downscale_factor must be 2, or 1 or 2 for each of one to three dimensions, got 3.": lambda: inv.Haar(
                3
            ),
            "Haar: downscale_factor must be 2, or 1 or 2 for each of one to three dimensions, got 1.": lambda: inv.Haar(
                1
            ),
            "Haar: downscale_factor must be 2, or 1 or 2 for each of one to three dimensions, got [].": lambda: (
                inv.Haar([])
            ),
            "Haar: downscale_factor must be an integer, got 2.0.": lambda: inv.Haar(2.0),
            "Haar: lifting must be True or False, got 'no'.": lambda: inv.Haar(lifting="no"),
            "Haar(): height and width must be divisible by 2, got a tensor of shape (1, 1, 4, 3).": lambda: inv.Haar()(
                torch.zeros(1, 1, 4, 3)
            ),
            "Haar(downscale_factor=(1, 2), lifting=True): height and width must be divisible by (1, 2)": lambda: (
                inv.Haar((1, 2), lifting=True)(torch.zeros(1, 1, 3, 3))
            ),
            "Haar(lifting=True): channels must be divisible by 4, got a tensor of shape (2, 3, 4, 4).": lambda: (
                inv.Haar(lifting=True).inverse(x2d)
            ),
            "Haar(): expected a floating-point tensor, got dtype torch.uint8.": lambda: inv.Haar()(x2d.byte()),
            "Haar(): expected one to three spatial dimensions, got a tensor of shape (2, 3).": lambda: inv.Haar()(
                x2d[..., 0, 0]
            ),
            "expected 1 spatial dimensions, one per factor": lambda: inv.Haar([2])(x2d),
            "got layer '0', Haar(), which does not (keeps_grid).": lambda: on_grid(inv.Haar()),
            "Haar(lifting=True): on its grid values have the dtype torch.float64, got torch.float32.": lambda: on_grid(
                inv.Haar(lifting=True)
            )[0](x2d),
        },
    ),
    "Haar on a grid": Row(
        inv.Haar,
        lambda draw: on_grid(inv.Haar(wavelet_factor(draw), lifting=True)),
        lambda draw, m: m.snap(divisible(draw, m[0], 1)),
    ),
    "LeGall53": Row(
        inv.LeGall53,
        lambda draw: inv.LeGall53(wavelet_factor(draw)),
        divisible,
        rejects={
            "LeGall53: downscale_factor must be 2, or 1 or 2 for each of one to three dimensions, got (2, 3).": (
                lambda: inv.LeGall53((2, 3))
            ),
            "LeGall53(): length must be divisible by 2, got a tensor of shape (1, 1, 3).": lambda: inv.LeGall53()(
                torch.zeros(1, 1, 3)
            ),
            "LeGall53(): expected a tensor, got a tuple": lambda: inv.LeGall53()((x2d, x2d)),
            "LeGall53(): expected a floating-point tensor, got dtype torch.int64.": lambda: inv.LeGall53()(x2d.long()),
        },
    ),
    "LeGall53 on a grid": Row(
        inv.LeGall53,
        lambda draw: on_grid(inv.LeGall53(wavelet_factor(draw))),
        lambda draw, m: m.snap(divisible(draw, m[0], 1)),
    ),
    "Pad": Row(
        inv.Pad,
        draw_pad,
        pad_input,
        rejects={
            "Pad(size=(5, 3), multiple_of=2): expected images of size (5, 3), got a tensor of shape (2, 3, 4, 4).": (
                lambda: inv.Pad((5, 3), multiple_of=2)(x2d)
            ),
            "Pad(size=5, multiple_of=4): expected padded images of size (8, 8), got a tensor of shape (2, 3, 4, 4).": (
                lambda: inv.Pad(5, multiple_of=4).inverse(x2d)
            ),
            "Pad(size=0, multiple_of=2): size must be at least 1, one for all or for each": lambda: inv.Pad(
                0, multiple_of=2
            ),
            "multiple_of must be at least 1, one for all or for each of one to three dimensions, got (2, 0).": lambda: (
                inv.Pad(3, multiple_of=(2, 0))
            ),
            "Pad(size=(3, 3), multiple_of=(2, 2, 2)): size and multiple_of must be for as many dimensions.": lambda: (
                inv.Pad((3, 3), multiple_of=(2, 2, 2))
            ),
            "Pad: size must be an integer, got 3.5.": lambda: inv.Pad(3.5, multiple_of=2),
            "Pad: multiple_of must be an integer, got None.": lambda: inv.Pad(3, multiple_of=None),
            "expected 1 spatial dimensions, one per size": lambda: inv.Pad((4,), multiple_of=2)(x2d),
            "expected 1 spatial dimensions, one per multiple": lambda: inv.Pad(4, multiple_of=(2,))(x2d),
        },
    ),
    "Pad before a network": Row(
        inv.Pad,
        draw_padded_network,
        padded_network_input,
        exempt=(log_det_matches_autograd,),  # couplings after an injective layer: refused, see Sequential
        rejects={
            "Coupling(), is not isometric and follows layer 0, Pad(size=3, multiple_of=2), which is not bijective.": (
                lambda: inv.Sequential(
                    inv.Pad(3, multiple_of=2), inv.Split(), inv.Coupling(nn.Tanh())
                ).forward_and_log_det(x2d[..., :3, :3])
            ),
        },
    ),
    "Augment": Row(
        inv.Augment,
        draw_augment,
        lambda draw, m: draw(tensors(dims=st.integers(0, 3))),
        exempt=ANEW,
        rejects={
            "Augment(0): channels must be at least 1, got 0.": lambda: inv.Augment(0),
            "Augment: channels must be an integer, got 1.5.": lambda: inv.Augment(1.5),
            "Augment: distribution must have methods sample and log_prob, got 'normal'.": lambda: inv.Augment(
                1, distribution="normal"
            ),
            "Normal'>. Make one: distribution=Normal(0.0, 1.0).": lambda: inv.Augment(
                2, distribution=torch.distributions.Normal
            ),
            "Augment(1): expected a floating-point tensor, got dtype torch.int64.": lambda: inv.Augment(1)(x2d.long()),
            "Augment(3): expected more than 3 channels, got a tensor of shape (2, 3, 4, 4).": lambda: inv.Augment(
                3
            ).inverse(x2d),
            "the distribution must return a tensor of shape (2, 1, 4, 4), got a tensor of shape (1,).": lambda: (
                inv.Augment(1, distribution=Wrong(no_shape, no_shape))(x2d)
            ),
            "the distribution's log_prob must be a tensor of shape (2, 1, 4, 4), got a tensor of shape (1,).": lambda: (
                inv.Augment(1, distribution=Wrong(torch.zeros, no_shape)).forward_and_log_det(x2d)
            ),
            "Inverse: expected a bijective layer, got Augment(1).": lambda: inv.Inverse(inv.Augment(1)),
        },
    ),
    "Augment on a grid": Row(
        inv.Augment,
        lambda draw: on_grid(draw_augment(draw)),
        lambda draw, m: m.snap(draw(tensors(dims=st.integers(0, 3)))),
        exempt=ANEW,
    ),
    "Dequantize": Row(
        inv.Dequantize,
        lambda draw: inv.Dequantize(draw(st.integers(2, 300))),
        draw_levels,
        exempt=WHOLE,
        rejects={
            "Dequantize(): expected whole numbers from 0 to 255, got 0.25. An image in [0, 1] goes in as "
            "(255 * image).round().": lambda: inv.Dequantize()(torch.tensor([[0.0, 0.25]])),
            "Dequantize(): expected whole numbers from 0 to 255, got 256.": lambda: inv.Dequantize()(x2d + 256),
            "Dequantize(levels=2): expected whole numbers from 0 to 1, got -1.": lambda: inv.Dequantize(2)(x2d - 1),
            "Dequantize(): expected whole numbers from 0 to 255, got nan.": lambda: inv.Dequantize()(x2d / 0),
            "Dequantize(levels=1): there must be at least 2 levels, got 1.": lambda: inv.Dequantize(1),
            "Dequantize: levels must be an integer, got 8.5.": lambda: inv.Dequantize(8.5),
            "Dequantize(): expected a floating-point tensor, got dtype torch.uint8.": lambda: inv.Dequantize()(
                x2d.byte()
            ),
            "Dequantize(): 256 levels need a dtype that tells numbers between them apart, got torch.bfloat16.": (
                lambda: inv.Dequantize().inverse(x2d.bfloat16())
            ),
            "got layer '0', Dequantize(), which does not (keeps_grid).": lambda: on_grid(inv.Dequantize()),
        },
    ),
    "Flow of stochastic layers": Row(
        inv.Augment,
        draw_flow,
        lambda draw, m: (16 * torch.sigmoid(image(draw, 1))).floor(),
        exempt=WHOLE,
    ),
}
