"""The paper's measurement (section 4.2): how far off the bijective i-RevNet's inverse is, with and without a grid.

    python -m benchmarks.epsilon [--batch 8] [--size 64] [--model irevnet_b]

The mean relative error over images of uniform noise, and over crops of real photographs: scikit-learn's two and
matplotlib's portrait. Weights are those of initialisation. "Calibrated" is `eval` after the batch norms' statistics
were averaged over four other batches of the same kind. Autocast leaves functions in float64 as they are. On a grid the
result must also be ``snap(x)`` bit for bit, or the command fails. Prints a table and writes every image's error to
runs/benchmarks/epsilon-TIME.json.
"""

import argparse
from typing import Any

import torch
from matplotlib import cbook
from PIL import Image
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torchvision.transforms.v2.functional import pil_to_tensor

from benchmarks.report import console_of, keep
from benchmarks.roundtrip import MODES, build
from zoo.inversion import InversionError, relative_errors

ARITHMETIC: dict[str, tuple[torch.dtype, Any]] = {
    "no grid, float32": (torch.float32, None),
    "no grid, float64": (torch.float64, None),
    "exact32": (torch.float32, "exact32"),
    "exact": (torch.float32, "exact"),
}
"""The dtype of the functions, and the grid."""


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent uniform noise in [0, 1)."""
    return torch.rand(shape, generator=generator)


def photographs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Crops of real photographs with 8 bits per channel, at places drawn uniformly, in [0, 1]."""
    portrait = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    images = [torch.tensor(i).permute(2, 0, 1) for i in load_sample_images().images]  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    images.append(pil_to_tensor(portrait))
    crops: list[Tensor] = []
    for i in range(shape[0]):
        image = images[i % len(images)]
        top, left = (
            int(torch.randint(n - m, (), generator=generator)) for n, m in zip(image.shape[1:], shape[2:], strict=True)
        )
        crops.append(image[:, top : top + shape[2], left : left + shape[3]])
    return torch.stack(crops).float() / 255


KINDS = {"noise": noise, "photographs": photographs}


@torch.no_grad()
def epsilon(model: str, arithmetic: str, kind: str, mode: str, *, autocast: bool, shape: tuple[int, ...]) -> Tensor:
    """The relative error of each image."""
    dtype, grid = ARITHMETIC[arithmetic]
    net = build(model, dtype)
    net.grid = grid
    generator = torch.Generator().manual_seed(0)
    x = KINDS[kind](shape, generator).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if mode == "calibrated":
            update_bn([KINDS[kind](shape, generator).to(dtype) for _ in range(4)], net)
        net.train(mode == "train")
        found = net.inverse(net.features(x))
    if grid is not None and not torch.equal(found, net.body.snap(x)):
        raise AssertionError(f"{model} is not exact: {arithmetic}, {kind}, {mode}, autocast={autocast}")
    return relative_errors(found, x)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--model", default="irevnet_b")
    options = parser.parse_args()
    shape = (options.batch, 3, options.size, options.size)
    console = console_of(110)
    rows: list[dict[str, Any]] = []
    table = Table("arithmetic", "functions", "images", *MODES, title=f"mean ε of {options.model}, shape {shape}")
    for arithmetic, (dtype, _) in ARITHMETIC.items():
        for autocast in (False, True) if dtype == torch.float32 else (False,):
            functions = "bfloat16" if autocast else str(dtype).removeprefix("torch.")
            for kind in KINDS:
                cells = []
                for mode in MODES:
                    each = epsilon(options.model, arithmetic, kind, mode, autocast=autocast, shape=shape)
                    mean = InversionError.of(each).mean
                    cells.append(f"{mean:.0e}" if mean else "0")
                    row = {"arithmetic": arithmetic, "functions": functions, "images": kind, "mode": mode}
                    rows.append(row | {"errors": each.tolist()})
                table.add_row(arithmetic, functions, kind, *cells)
    console.print(table)
    keep(console, "epsilon", shape=shape, rows=rows)


if __name__ == "__main__":
    main()
