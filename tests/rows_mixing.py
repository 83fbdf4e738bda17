"""Layers that mix, normalise or bend channels: their rows of the catalogue."""

import torch
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible.testing import inverse_moves_no_buffer
from invertible.testing.strategies import tensors
from tests.rows import Row, disturbed, seeded, with_mode

PARAMETRIZATIONS = ["plu", "householder", "matrix-exponential", "free"]

x2d = torch.zeros(2, 3, 4, 4)


def draw_elementwise(draw):
    def make():
        transform = draw(st.sampled_from([inv.Additive(), inv.Affine(), inv.RationalQuadraticSpline(bins=3)]))
        return disturbed(inv.Elementwise(transform, channels=draw(st.integers(1, 3), label="channels")), 1.0)

    return seeded(draw, make)


def draw_conditional_elementwise(draw):
    return seeded(draw, lambda: inv.Elementwise(inv.Affine(), function=nn.Linear(2, 2 * 3)))


class Widened(nn.Module):
    def forward(self, x):
        return x.double().repeat(1, 3)


def of_label(x, function=None):
    return inv.Elementwise(inv.Affine(), function=function or nn.Linear(2, 6))(x, condition=torch.zeros(2, 2))


def any_dims(channels):
    return tensors(channels=channels, dims=st.integers(0, 3))


def draw_linear(draw):
    channels, kind = draw(st.integers(1, 4), label="channels"), draw(st.sampled_from(PARAMETRIZATIONS))
    return seeded(draw, lambda: disturbed(inv.InvertibleLinear(channels, parametrization=kind)))


def draw_act_norm(draw):
    def make():
        norm = disturbed(inv.ActNorm(draw(st.integers(1, 4), label="channels")))
        if draw(st.booleans(), label="initialized"):
            norm.train()(3 * torch.randn(8, norm.channels) + 2)
        return norm

    return with_mode(draw, seeded(draw, make))


def draw_batch_norm(draw):
    def make():
        options = {"affine": draw(st.booleans()), "eps": draw(st.sampled_from([1e-5, 1e-2]))}
        norm = disturbed(inv.BatchNorm(draw(st.integers(1, 4), label="channels"), momentum=0.5, **options))
        norm.train()(3 * torch.randn(8, norm.channels) + 2)
        return norm.eval()

    return seeded(draw, make)


def draw_affine(draw):
    scales = st.sampled_from([-2.0, -0.5, 0.25, 3.0])
    shifts = st.sampled_from([-1.0, 0.0, 2.0])
    count = draw(st.integers(1, 4), label="channels")
    scale = draw(st.one_of(scales, st.lists(scales, min_size=count, max_size=count)))
    shift = draw(st.one_of(shifts, st.lists(shifts, min_size=count, max_size=count)))
    return inv.ConstantAffine(scale, shift)


def of_its_channels(draw, module):
    return draw(any_dims(st.integers(1, 3) if module.channels is None else st.just(module.channels)))


def away_from_zero(draw, module):
    x = draw(any_dims(st.integers(1, 3)))
    return x + 0.2 * torch.where(x < 0, -1.0, 1.0)


def singular():
    mix = inv.InvertibleLinear(2, parametrization="free")
    torch.nn.init.ones_(mix.matrix.values)
    return mix.inverse(torch.zeros(1, 2))


def untold(norm):
    """A training step's output, sent back in training mode."""
    return norm.inverse(norm(torch.randn(4, 3)))


ROWS: dict[str, Row] = {
    "Elementwise": Row(
        inv.Elementwise,
        draw_elementwise,
        lambda draw, m: draw(any_dims(st.just(m.channels))),
        rejects={
            "Elementwise: transform must be of type CouplingTransform, got an object of type Tanh.": lambda: (
                inv.Elementwise(nn.Tanh(), channels=3)
            ),
            "Elementwise: function must be of type Module, got an object of type int.": lambda: inv.Elementwise(
                inv.Affine(), function=3
            ),
            "Elementwise: either channels or function must be given, got none.": lambda: inv.Elementwise(inv.Affine()),
            "either channels or function must be given, got both.": lambda: inv.Elementwise(
                inv.Affine(), channels=2, function=nn.Tanh()
            ),
            "Elementwise: channels must be at least 1, got 0.": lambda: inv.Elementwise(inv.Affine(), channels=0),
            "expected 2 channels, got a tensor of shape (2, 3, 4, 4).": lambda: inv.Elementwise(
                inv.Affine(), channels=2
            )(x2d),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.Elementwise(
                inv.Affine(), channels=3
            )(x2d.long()),
        },
    ),
    "Elementwise, conditional": Row(
        inv.Elementwise,
        draw_conditional_elementwise,
        lambda draw, m: draw(any_dims(st.just(3))),
        condition=lambda x: x.flatten(1)[:, :2] + 0.5,
        rejects={
            "the function needs a condition, got None.": lambda: inv.Elementwise(inv.Affine(), function=nn.Tanh())(x2d),
            "the function must return a tensor of shape (2, 6) or one with the space (4, 4), got a tensor of shape "
            "(2, 2).": lambda: of_label(x2d, nn.Tanh()),
            "the function must return a tensor, got a tuple": lambda: of_label(x2d, nn.GRU(2, 6)),
            "the function's output must fit into the input's dtype torch.float32, got torch.float64.": lambda: of_label(
                x2d, Widened()
            ),
        },
    ),
    "InvertibleLinear": Row(
        inv.InvertibleLinear,
        draw_linear,
        of_its_channels,
        rejects={
            "InvertibleLinear(channels=2): expected 2 channels, got a tensor of shape (2, 3, 4, 4).": lambda: (
                inv.InvertibleLinear(2)(x2d)
            ),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.InvertibleLinear(3)(x2d.long()),
            "expected a floating-point tensor, got dtype torch.complex64.": lambda: inv.InvertibleLinear(3)(
                x2d.cfloat()
            ),
            "InvertibleLinear(channels=3): expected a tensor, got a tuple of": lambda: inv.InvertibleLinear(3)(
                (x2d, x2d)
            ),
            "InvertibleLinear: channels must be an integer, got 2.5.": lambda: inv.InvertibleLinear(2.5),
            "InvertibleLinear: channels must be at least 1, got 0.": lambda: inv.InvertibleLinear(0),
            "InvertibleLinear: parametrization must be one of 'plu', 'householder', 'matrix-exponential', 'free', got "
            "'lu'.": lambda: inv.InvertibleLinear(2, parametrization="lu"),
            "'matrix-exponential', 'free', got ['plu'].": lambda: inv.InvertibleLinear(2, parametrization=["plu"]),
            "parametrization='free'): the matrix must not be singular, got one of determinant 0.": singular,
        },
    ),
    "ActNorm": Row(
        inv.ActNorm,
        draw_act_norm,
        of_its_channels,
        rejects={
            "ActNorm(channels=2): expected 2 channels, got a tensor of shape (2, 3, 4, 4).": lambda: inv.ActNorm(2)(
                x2d
            ),
            "ActNorm: channels must be an integer, got 'two'.": lambda: inv.ActNorm("two"),
            "ActNorm: channels must be at least 1, got -1.": lambda: inv.ActNorm(-1),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.ActNorm(3)(x2d.long()),
            "ActNorm(channels=3): the first batch must be finite, got a tensor of shape (2, 3, 4, 4).": lambda: (
                inv.ActNorm(3)(x2d / 0)
            ),
            "can't be initialised while exporting or under torch.func, got a tensor of shape (3, 4, 4). Run one": (
                lambda: torch.func.vmap(inv.ActNorm(4))(x2d)
            ),
        },
    ),
    "BatchNorm": Row(
        inv.BatchNorm,
        draw_batch_norm,
        of_its_channels,
        exempt=(inverse_moves_no_buffer,),  # in training mode there is no inverse
        rejects={
            "BatchNorm(channels=2): expected 2 channels, got a tensor of shape (2, 3, 4, 4).": lambda: inv.BatchNorm(2)(
                x2d
            ),
            "BatchNorm: channels must be at least 1, got 0.": lambda: inv.BatchNorm(0),
            "BatchNorm: eps must be positive and finite, got 0.": lambda: inv.BatchNorm(3, eps=0),
            "BatchNorm: eps must be positive and finite, got inf.": lambda: inv.BatchNorm(3, eps=float("inf")),
            "BatchNorm: eps must be a number, got 'a'.": lambda: inv.BatchNorm(3, eps="a"),
            "BatchNorm: momentum must be a number, got None.": lambda: inv.BatchNorm(3, momentum=None),
            "BatchNorm: affine must be True or False, got 'no'.": lambda: inv.BatchNorm(3, affine="no"),
            "BatchNorm: momentum must be from 0 to 1, got 2.": lambda: inv.BatchNorm(3, momentum=2),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.BatchNorm(3)(x2d.long()),
            "expected more than one value per channel in training mode, got a tensor of shape (1, 3, 1).": lambda: (
                inv.BatchNorm(3)(x2d[:1, :, :1, 0])
            ),
            "BatchNorm(channels=3): there is no inverse in training mode, whose statistics the output does not tell, "
            "got a tensor of shape (4, 3). Call eval() to go backwards, or use ActNorm.": lambda: untold(
                inv.BatchNorm(3)
            ),
            "Call eval() to go backwards": lambda: inv.Inverse(inv.BatchNorm(3))(x2d),
        },
    ),
    "LeakyReLU": Row(
        inv.LeakyReLU,
        lambda draw: inv.LeakyReLU(draw(st.sampled_from([0.1, 0.5, 2.0]))),
        away_from_zero,
        rejects={
            "LeakyReLU: negative_slope must be a number, got 'a'.": lambda: inv.LeakyReLU("a"),
            "LeakyReLU: negative_slope must be a number, got None.": lambda: inv.LeakyReLU(None),
            "LeakyReLU: negative_slope must be positive and finite, got 0.0.": lambda: inv.LeakyReLU(0),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.LeakyReLU()(x2d.long()),
        },
    ),
    "Sigmoid": Row(
        inv.Sigmoid,
        lambda draw: inv.Sigmoid(),
        lambda draw, m: draw(any_dims(st.integers(1, 3))).clamp(max=1),  # a law moves outputs up by a tenth
        rejects={
            "Sigmoid(): inverse takes values in the open interval (0, 1), got 0. What saturates": lambda: (
                inv.Sigmoid().inverse(x2d)
            ),
            "inverse takes values in the open interval (0, 1), got 1.5.": lambda: inv.Sigmoid().inverse(x2d + 1.5),
            "inverse takes values in the open interval (0, 1), got nan.": lambda: inv.Sigmoid().inverse(x2d / 0),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.Sigmoid()(x2d.long()),
        },
    ),
    "Tanh": Row(
        inv.Tanh,
        lambda draw: inv.Tanh(),
        lambda draw, m: draw(any_dims(st.integers(1, 3))).clamp(max=1),  # a law moves outputs up by a tenth
        rejects={
            "Tanh(): inverse takes values in the open interval (-1, 1), got 1. What saturates in forward": lambda: (
                inv.Tanh().inverse(x2d + 1)
            ),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.Tanh()(x2d.long()),
        },
    ),
    "Softplus": Row(
        inv.Softplus,
        lambda draw: inv.Softplus(),
        lambda draw, m: draw(any_dims(st.integers(1, 3))),
        rejects={
            "Softplus(): inverse takes values in the open interval (0, inf), got -2.": lambda: inv.Softplus().inverse(
                x2d - 2
            ),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.Softplus()(x2d.long()),
        },
    ),
    "ConstantAffine": Row(
        inv.ConstantAffine,
        draw_affine,
        of_its_channels,
        rejects={
            "ConstantAffine: scale must not be zero, got [1.0, 0.0].": lambda: inv.ConstantAffine([1, 0]),
            "ConstantAffine: shift must be finite, one or one per channel, got [inf].": lambda: inv.ConstantAffine(
                1, float("inf")
            ),
            "ConstantAffine: scale must be finite, one or one per channel, got [].": lambda: inv.ConstantAffine([]),
            "ConstantAffine: scale and shift must have one length, got 2 and 1.": lambda: inv.ConstantAffine(
                [1, 2], [1]
            ),
            "ConstantAffine: scale must be a number, got 'ab'.": lambda: inv.ConstantAffine("ab"),
            "ConstantAffine: scale must be a number, got '12'.": lambda: inv.ConstantAffine("12"),
            "ConstantAffine: scale must be a number, got None.": lambda: inv.ConstantAffine(None),
            "ConstantAffine: scale must be a number, got 1j.": lambda: inv.ConstantAffine(1j),
            "ConstantAffine: scale must be a number, got {1.0: 2}.": lambda: inv.ConstantAffine({1.0: 2}),
            "ConstantAffine: shift must be a number, got '2'.": lambda: inv.ConstantAffine(1, [1, "2"]),
            "ConstantAffine: shift must be a number, got 1j.": lambda: inv.ConstantAffine(1, torch.tensor([1j])),
            "ConstantAffine: scale must be a number or a sequence of them, one per channel, got one of shape "
            "(1, 3, 1, 1).": lambda: inv.ConstantAffine(torch.ones(1, 3, 1, 1)),
            "scale must not be zero, got [9.999999": lambda: inv.ConstantAffine([1e-8, 1]).half(),
            "shift must be finite, one or one per channel, got [100000.0].": lambda: inv.ConstantAffine(1, 1e5).half(),
            "scale must not be zero, got [0.0].": lambda: inv.ConstantAffine().load_state_dict(
                {"scale": torch.zeros(1), "shift": torch.zeros(1)}
            ),
            "ConstantAffine(channels=2): expected 2 channels": lambda: inv.ConstantAffine([1, 2])(x2d),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.ConstantAffine()(x2d.long()),
        },
    ),
}
