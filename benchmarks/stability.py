"""How far off the inverse of deep couplings is in single precision, by what they do to a stream.

    python -m benchmarks.stability [--seeds 3] [--depths 32 100] [--gains 1 3]

Streams of 8 channels with 8 by 8 pixels, batch 4, of normal noise; "x10" is the same ten times as large. Functions are
three convolutions of 3 by 3 pixels with a ReLU between them, as torch initialises them; "gain" multiplies the last, for
scales and shifts alike. The median over the seeds of the relative error ``|inverse(forward(x)) - x| / |x|`` in float32;
"inf" for what is no number. On a grid, which is there for two transforms, values beyond its limit raise, and the table
says "range". The first three scales are those of peers, and no transforms of the library. Prints a table and writes
every error to runs/benchmarks/stability-TIME.json.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.report import console_of, keep
from invertible import (
    Additive,
    Affine,
    Coupling,
    CouplingTransform,
    RationalQuadraticSpline,
    Sequential,
    StreamRangeError,
    VolumePreserving,
)

CHANNELS, HIDDEN, SIZE, BATCH = 8, 16, 8, 4


class Scaled(CouplingTransform):
    """An affine transform by any scale."""

    parameters_per_element = 2

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        a, shift = parameters.chunk(2, 1)
        return x * self.scale(a) + shift

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        a, shift = parameters.chunk(2, 1)
        return (y - shift) / self.scale(a)

    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, parameters), self.scale(parameters.chunk(2, 1)[0]).log().flatten(1).sum(1)

    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y, parameters), -self.scale(parameters.chunk(2, 1)[0]).log().flatten(1).sum(1)


KINDS: dict[str, Callable[[], CouplingTransform]] = {
    "exp(a)": lambda: Scaled(torch.exp),
    "2 sigmoid(a)": lambda: Scaled(lambda a: 2 * torch.sigmoid(a)),
    "1/2 + sigmoid(a)": lambda: Scaled(lambda a: 0.5 + torch.sigmoid(a)),
    'Affine(scale="exp-clamped")': lambda: Affine(scale="exp-clamped"),
    'Affine(scale="exp-clamped", clamp=0.5)': lambda: Affine(scale="exp-clamped", clamp=0.5),
    'Affine(scale="sigmoid")': lambda: Affine(scale="sigmoid"),
    "Affine()": Affine,
    "VolumePreserving()": VolumePreserving,
    "VolumePreserving(max_scale=1.1)": lambda: VolumePreserving(max_scale=1.1),
    "RationalQuadraticSpline()": RationalQuadraticSpline,
    "Additive()": Additive,
    "VolumePreserving(), on a grid": VolumePreserving,
    "VolumePreserving(max_scale=1.1), on a grid": lambda: VolumePreserving(max_scale=1.1),
    "Additive(), on a grid": Additive,
}


def function(transform: CouplingTransform, gain: float) -> nn.Module:
    """Random, and stronger by a factor."""
    first, second = (nn.Conv2d(channels, HIDDEN, 3, padding=1) for channels in (CHANNELS, HIDDEN))
    last = nn.Conv2d(HIDDEN, CHANNELS * transform.parameters_per_element, 3, padding=1)
    for parameter in last.parameters():
        parameter.mul_(gain)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


@torch.no_grad()
def error(kind: str, depth: int, gain: float, size: float, seed: int) -> float:
    """The relative error of what comes back; no number if it is beyond the limit of the grid."""
    torch.manual_seed(seed)
    couplings: list[Coupling] = []
    for _ in range(depth):
        transform = KINDS[kind]()
        couplings.append(Coupling(function(transform, gain), transform))
    net = Sequential(*couplings, grid="exact" if kind.endswith("on a grid") else None)
    x = size * torch.randn(BATCH, CHANNELS, SIZE, SIZE), size * torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    try:
        back = net.inverse(net(x))
    except StreamRangeError:
        return math.nan
    parts = [torch.cat([t.double().flatten() for t in value]) for value in (back, x)]
    found = float((parts[0] - parts[1]).norm() / parts[1].norm())
    return found if math.isfinite(found) else math.inf


def shown(errors: list[float]) -> str:
    """Their median, or why there is none."""
    if any(math.isnan(each) for each in errors):
        return "range"
    median = statistics.median(errors)
    return f"{median:.0e}" if 0 < median < math.inf else f"{median:g}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="+", default=[32, 100])
    parser.add_argument("--gains", type=float, nargs="+", default=[1.0, 3.0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = console_of(180)
    cases = [(gain, depth) for gain in options.gains for depth in options.depths]
    heads = [f"gain {gain:g}, depth {depth}: x1 / x10" for gain, depth in cases]
    table = Table("transform", *heads, title=f"median relative error of the inverse over {options.seeds} seeds")
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        cells: list[str] = []
        for gain, depth in cases:
            medians: list[str] = []
            for size in (1.0, 10.0):
                errors = [error(kind, depth, gain, size, seed) for seed in range(options.seeds)]
                medians.append(shown(errors))
                rows.append({"transform": kind, "gain": gain, "depth": depth, "size": size, "errors": errors})
            cells.append(" / ".join(medians))
        table.add_row(kind, *cells)
    console.print(table)
    keep(console, "stability", rows=rows)


if __name__ == "__main__":
    main()
