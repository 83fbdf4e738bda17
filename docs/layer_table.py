"""The table of all layers, from their classes: formula and cost from the docstring, the rest from the layer itself."""

import inspect
import re

import torch
from torch import nn

import invertible as inv

HEADER = ("layer", "maps", "inverse", "on a grid", "bijective", "log-determinant", "cost")

EXAMPLES: dict[str, inv.InvertibleModule | inv.CouplingTransform] = {
    "Identity": inv.Identity(),
    "Swap": inv.Swap(),
    "Split": inv.Split(),
    "Merge": inv.Merge(),
    "PadSplit": inv.PadSplit(3, 8),
    "Pad": inv.Pad(3, multiple_of=4),
    "PixelUnshuffle": inv.PixelUnshuffle(2),
    "Haar": inv.Haar(),
    "Haar(lifting=True)": inv.Haar(lifting=True),
    "LeGall53": inv.LeGall53(),
    "Reshape": inv.Reshape((2, 3), (6,)),
    "Permute": inv.Permute.reversed(4),
    "Augment": inv.Augment(2),
    "Dequantize": inv.Dequantize(),
    "InvertibleLinear": inv.InvertibleLinear(4),
    "ActNorm": inv.ActNorm(4),
    "BatchNorm": inv.BatchNorm(4).eval(),
    "ConstantAffine": inv.ConstantAffine(scale=2.0, shift=1.0),
    "LeakyReLU": inv.LeakyReLU(0.1),
    "Elementwise": inv.Elementwise(inv.Affine(), channels=4),
    "Sigmoid": inv.Sigmoid(),
    "Tanh": inv.Tanh(),
    "Softplus": inv.Softplus(),
    "Residual": inv.Residual(nn.Conv2d(4, 4, 3, padding=1)),
    "Coupling": inv.Coupling(nn.Identity()),
    "Additive": inv.Additive(),
    "Affine": inv.Affine(),
    "VolumePreserving": inv.VolumePreserving(),
    "RationalQuadraticSpline": inv.RationalQuadraticSpline(),
    "Parallel": inv.Parallel(inv.Identity()),
    "Inverse": inv.Inverse(inv.Identity()),
    "Sequential": inv.Sequential(),
}
"""What each row is of: a class's name, perhaps with options, and one of it."""

EXACT = {
    inv.Exactness.EXACT: "bit for bit",
    inv.Exactness.ROUNDING: "to rounding",
    inv.Exactness.ITERATIVE: "to a tolerance",
}

CONTAINERS = {"Parallel", "Inverse", "Sequential"}


def name_of(label: str) -> str:
    """The class of a row."""
    return label.partition("(")[0]


def rows() -> list[tuple[str, ...]]:
    """All rows, in the order of :data:`EXAMPLES`."""
    return [row(label, example) for label, example in EXAMPLES.items()]


def row(label: str, example: inv.InvertibleModule | inv.CouplingTransform) -> tuple[str, ...]:
    """Link, formula, how exact the inverse is, whether it keeps a grid and is onto, log-determinant, cost."""
    kind = getattr(inv, name_of(label))
    doc = inspect.getdoc(kind) or ""
    link = f"{{any}}`{label} <invertible.{kind.__name__}>`"
    maps, log_det = formulas(doc)
    if name_of(label) in CONTAINERS:
        return (link, maps, *["the weakest layer's"] * 3, "the layers' sum", cost(doc))
    layer = inv.Coupling(nn.Identity(), example) if isinstance(example, inv.CouplingTransform) else example
    if isinstance(example, inv.Coupling):
        log_det = "those of T and S"
    elif isinstance(example, inv.Elementwise):
        log_det = "that of T"
    elif is_zero(layer):
        log_det = "0"
    exact = EXACT[layer.exactness]
    on_grid = "bit for bit" if layer.keeps_grid else "refused"
    onto = "yes" if layer.bijective else "no: a left inverse"
    return (link, maps, exact, on_grid, onto, log_det, "nothing is computed" if layer.isometric else cost(doc))


def formulas(doc: str) -> tuple[str, str]:
    """The first formula of a docstring, that of the map, and what it says of the log-determinant."""
    summary = re.search(r":math:`([^`]*(?:\\mapsto|=)[^`]*)`", doc.split("\n\n")[0])
    block = re.search(r"\.\. math::\n((?:[ \t]+.*\n|\n)+)", doc + "\n")
    text = " ".join((summary or block)[1].split())
    maps, found, log_det = text.partition(r"\log|\det J| =")
    if not found:
        maps, _, log_det = text.partition(r"\text{log-determinant: }")
    if not log_det:
        beside = re.search(r"log-determinant :math:`([^`]+)`", doc)
        log_det = beside[1] if beside else r"\log|\det J|"
    return inline(re.sub(r"(,?\s*\\q?quad\s*)+$", "", maps.strip())), inline(log_det)


def inline(formula: str) -> str:
    """A formula in a cell of a table."""
    formula = formula.replace("|", r"\vert ").strip()
    return f"${formula.rstrip('.,')}$"


def cost(doc: str) -> str:
    """What a docstring says of it."""
    found = re.search(r"^Cost: (.+?)(?:\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    if found is None:
        raise RuntimeError(f'add a paragraph "Cost: ..." to the docstring that begins {doc.splitlines()[0]!r}')
    plain = re.sub(r":math:`([^`]+)`", r"$\1$", " ".join(found[1].split()))
    plain = re.sub(r":\w+:`[~.]*(?:\w+\.)*(\w+)`", r"`\1`", plain).replace("``", "`")
    return plain.rstrip(".").replace("|", r"\vert ")


def is_zero(layer: inv.InvertibleModule) -> bool:
    """Whether the log-determinant is 0 whatever the input."""
    if layer.isometric:
        return True
    x = torch.linspace(-1, 1, 64).view(1, 4, 4, 4)
    if isinstance(layer, inv.Coupling):
        count = layer.transform.parameters_per_element
        return not layer.transform.forward_and_log_det(x, torch.rand(1, 4 * count, 4, 4))[1].any()
    return not layer.forward_and_log_det(x.abs().round() if isinstance(layer, inv.Dequantize) else x)[1].any()


def check_complete() -> None:
    """Refuses to build the page without a row for each public layer and transform."""
    public = [getattr(inv, name) for name in inv.__all__]
    kinds = {
        kind.__name__
        for kind in public
        if inspect.isclass(kind) and issubclass(kind, inv.InvertibleModule | inv.CouplingTransform)
    }
    missing = kinds - {"InvertibleModule", "CouplingTransform"} - {name_of(label) for label in EXAMPLES}
    if missing:
        raise RuntimeError(f"add {sorted(missing)} to EXAMPLES in docs/layer_table.py")
