"""How exactly the i-RevNets come back: relative error per image, by network, precision, mode and kind of image.

    python -m benchmarks.roundtrip [--batch 8] [--size 64] [--models irevnet_small irevnet_b irevnet_a]

Weights are those of initialisation. Prints a table and writes every image's error to
runs/benchmarks/roundtrip-TIME.json. "Calibrated" is `eval` after the batch norms' statistics were averaged over four
other batches of the same kind.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.optim.swa_utils import update_bn

import zoo
from benchmarks.report import console_of, keep
from zoo.inversion import InversionError, relative_errors


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent uniform noise in [0, 1], as in the paper's section 4.2."""
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def constant(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Images of one colour each."""
    return noise((*shape[:2], 1, 1), generator).expand(shape).clone()


def low_contrast(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Grey images with noise of a thousandth."""
    return 0.5 + 1e-3 * (noise(shape, generator) - 0.5)


def unequal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise whose images are scaled by 1 to 1e-4."""
    return noise(shape, generator) * torch.logspace(0, -4, shape[0], dtype=torch.float64).view(-1, 1, 1, 1)


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "noise": noise,
    "constant": constant,
    "low contrast": low_contrast,
    "unequal scale": unequal,
}
MODES = ("eval", "calibrated", "train")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@torch.no_grad()
def errors(net: zoo.IRevNet, kind: str, mode: str, shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    """The relative error of each image of one batch; the network is left in the mode asked for."""
    dtype = next(net.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x = KINDS[kind](shape, generator).to(dtype)
    if mode == "calibrated":
        update_bn([KINDS[kind](shape, generator).to(dtype) for _ in range(4)], net)
    net.train(mode == "train")
    return relative_errors(net.inverse(net.features(x)), x)


def build(model: str, dtype: torch.dtype, *, seed: int = 0) -> zoo.IRevNet:
    """A network with the weights of initialisation and unused statistics."""
    torch.manual_seed(seed)
    net = zoo.create(model)
    if not isinstance(net, zoo.IRevNet):
        raise TypeError(f"{model} is not an i-RevNet")
    return net.to(dtype)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--models", nargs="+", default=["irevnet_small", "irevnet_b", "irevnet_a"])
    options = parser.parse_args()
    shape = (options.batch, 3, options.size, options.size)
    console = console_of(110)
    rows: list[dict[str, Any]] = []
    columns = ("network", "precision", "images", *MODES)
    table = Table(*columns, title=f"median and largest relative error, {options.batch} images of {options.size} pixels")
    for model in options.models:
        for precision, dtype in DTYPES.items():
            for kind in KINDS:
                cells = []
                for mode in MODES:
                    each = errors(build(model, dtype), kind, mode, shape)
                    summary = InversionError.of(each)
                    cells.append(f"{summary.median:.0e} {summary.maximum:.0e}")
                    row: dict[str, Any] = {"model": model, "dtype": precision, "images": kind, "mode": mode}
                    rows.append(row | {"errors": each.tolist()})
                table.add_row(model, precision, kind, *cells)
    console.print(table)
    keep(console, "roundtrip", shape=shape, rows=rows)


if __name__ == "__main__":
    main()
