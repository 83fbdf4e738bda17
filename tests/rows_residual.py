"""Residual blocks: their rows of the catalogue."""

import warnings

import torch
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible.testing.strategies import tensors
from tests.rows import Row, disturbed, seeded

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

x2d = torch.zeros(2, 3, 4, 4)


def function(channels, dims=0, activation=None, *, hidden=3):
    """A smooth F."""

    def weighted(*size):
        return CONV[dims](*size, 3, padding=1) if dims else nn.Linear(*size)

    return nn.Sequential(weighted(channels, hidden), activation or nn.Tanh(), weighted(hidden, channels))


def draw_residual(draw):
    """Of weights some are scaled and some are not; the log-determinant is exact, or all but exact."""
    channels, dims = draw(st.integers(1, 2), label="channels"), draw(st.integers(0, 2), label="dims")
    how = draw(st.sampled_from([{"log_det": "exact"}, {"terms": 12, "probes": "all"}]))
    size = draw(st.sampled_from([0.1, 1.0]), label="disturbed by")

    def make():
        inner = nn.Sequential(nn.SiLU(), CONV[dims](channels, channels, 3, padding=1)) if dims else None
        layer = inv.Residual(disturbed(inner or function(channels, hidden=2), size), lipschitz=0.2, **how)
        layer.form = channels, dims
        return layer

    return seeded(draw, make)


def residual_input(draw, module):
    channels, dims = module.form
    return draw(tensors(channels=st.just(channels), dims=st.just(dims)))


def old_weight_norm():
    """A weight that is made anew from two parameters before each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(2, 2))


def with_(*layers, **options):
    return lambda: inv.Residual(nn.Sequential(*layers), **options)


ROWS: dict[str, Row] = {
    "Residual": Row(
        inv.Residual,
        draw_residual,
        residual_input,
        rejects={
            "Residual: function must be of type Module, got an object of type builtin_function_or_method.": lambda: (
                inv.Residual(torch.tanh)
            ),
            "Residual: lipschitz must be between 0 and 1, got 1. It takes None for": with_(
                nn.Linear(2, 2), lipschitz=1
            ),
            "Residual: lipschitz must be between 0 and 1, got 0.": with_(nn.Linear(2, 2), lipschitz=0),
            "Residual: lipschitz must be between 0 and 1, got nan.": with_(nn.Linear(2, 2), lipschitz=float("nan")),
            "Residual: lipschitz must be a number, got 'a'.": with_(nn.Linear(2, 2), lipschitz="a"),
            "Residual: log_det must be one of 'series', 'roulette', 'exact', got 'no'.": with_(
                nn.Linear(2, 2), log_det="no"
            ),
            "Residual: log_det must be one of 'series', 'roulette', 'exact', got None.": with_(
                nn.Linear(2, 2), log_det=None
            ),
            "Residual: terms must be at least 1, got 0.": with_(nn.Linear(2, 2), terms=0),
            "Residual: terms must be an integer, got 1.5.": with_(nn.Linear(2, 2), terms=1.5),
            "Residual: probes must be at least 1, got 0.": with_(nn.Linear(2, 2), probes=0),
            "Residual: probes must be an integer, got 'some'.": with_(nn.Linear(2, 2), probes="some"),
            "Residual: tolerance must be positive, got 0.": with_(nn.Linear(2, 2), tolerance=0),
            "Residual: tolerance must be a number, got 'a'.": with_(nn.Linear(2, 2), tolerance="a"),
            "Residual: max_iterations must be at least 1, got -1.": with_(nn.Linear(2, 2), max_iterations=-1),
            "Residual: every layer of the function must have a known Lipschitz constant, got BatchNorm1d(2,": (
                with_(nn.Linear(2, 2), nn.BatchNorm1d(2))
            ),
            "got Dropout(p=0.5, inplace=False) as function.1.0. With lipschitz=None the function is taken as it is": (
                with_(nn.Linear(2, 2), nn.Sequential(nn.Dropout()))
            ),
            "known Lipschitz constant, got Softplus(beta=1.0, threshold=1.0) as function.": lambda: inv.Residual(
                nn.Softplus(threshold=1.0)
            ),
            "known Lipschitz constant, got Flatten(start_dim=0": with_(nn.Flatten(0)),
            "Residual: a weight must be a plain parameter, got Linear(in_features=2": with_(old_weight_norm()),
            "known Lipschitz constant, got ParametrizedLinear(": with_(
                nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
            ),
            "a convolution must pad by zeros or circularly, got Conv1d(": with_(
                nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect")
            ),
            "a circular padding must not make the output larger than the input, got Conv1d(": with_(
                nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular")
            ),
            "a function without weights must have a Lipschitz constant of at most 0.9, got one of 1.09984.": with_(
                nn.SiLU()
            ),
            "the function must return a tensor of shape (2, 3, 4, 4), got a tensor of shape (2, 5, 4, 4).": lambda: (
                inv.Residual(nn.Conv2d(3, 5, 1))(x2d)
            ),
            "expected a batch with channels and 2 spatial dimensions, got a tensor of shape (3, 4, 4).": lambda: (
                inv.Residual(nn.Conv2d(3, 3, 1))(x2d[0])
            ),
            "expected a batch with channels and 2 spatial dimensions before Conv2d(2, 2": lambda: inv.Residual(
                nn.Sequential(nn.Flatten(1, 2), nn.Conv2d(2, 2, 1), nn.Unflatten(1, (3, 4)))
            )(x2d),
            "expected a batch with channels and 2 spatial dimensions, got a tensor of shape (4, 3, 4).": lambda: (
                inv.Residual(nn.Sequential(nn.PixelShuffle(2), nn.Linear(8, 8), nn.PixelUnshuffle(2)))(
                    torch.zeros(4, 3, 4)
                )
            ),
            "the function must return a tensor, got a tuple of": lambda: inv.Residual(nn.GRU(4, 4), lipschitz=None)(
                x2d[0]
            ),
            "the function must be the same in every call and treat samples alone, got Dropout(p=0.5, inplace=False) in "
            "training mode. Call eval(), or leave it out.": lambda: inv.Residual(nn.Dropout(), lipschitz=None)(x2d),
            "treat samples alone, got BatchNorm2d(3": lambda: inv.Residual(nn.BatchNorm2d(3), lipschitz=None)(x2d),
            "expected a floating-point tensor, got dtype torch.int64.": lambda: inv.Residual(nn.Linear(4, 4))(
                x2d.long()
            ),
            "expected a tensor, got a tuple of": lambda: inv.Residual(nn.Linear(4, 4))((x2d, x2d)),
            "expected a tensor of shape (batch, channels, ...), got a tensor of shape (4,).": lambda: inv.Residual(
                nn.Linear(4, 4)
            )(torch.zeros(4)),
        },
    ),
}
