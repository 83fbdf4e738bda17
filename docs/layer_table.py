"""The table of all layers, from their classes: formula and cost from the docstring, the rest from the layer itself."""

import inspect
import re

import torch
from torch import nn

import invertible as inv

HEADER = ("layer", "maps", "inverse", "log-determinant", "cost")

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
    "Permute": inv.Permute.reversed(4),
    "Augment": inv.Augment(2),
    "Dequantize": inv.Dequantize(),
    "Coupling": inv.Coupling(nn.Identity()),
    "Additive": inv.Additive(),
    "Parallel": inv.Parallel(inv.Identity()),
    "Inverse": inv.Inverse(inv.Identity()),
    "Sequential": inv.Sequential(),
}
"""What each row is of: a class's name, perhaps with options, and one of it."""

CONTAINERS = {"Parallel", "Inverse", "Sequential"}


def name_of(label: str) -> str:
    """The class of a row."""
    return label.partition("(")[0]


def rows() -> list[tuple[str, ...]]:
    """All rows, in the order of :data:`EXAMPLES`."""
    return [row(label, example) for label, example in EXAMPLES.items()]


def row(label: str, example: inv.InvertibleModule | inv.CouplingTransform) -> tuple[str, ...]:
    """Link, formula, how exact the inverse is, log-determinant, cost."""
    kind = getattr(inv, name_of(label))
    doc = inspect.getdoc(kind) or ""
    link = f"{{any}}`{label} <invertible.{kind.__name__}>`"
    if name_of(label) in CONTAINERS:
        return (link, formula(doc), "the weakest layer's", "the layers' sum", cost(doc))
    layer = inv.Coupling(nn.Identity(), example) if isinstance(example, inv.CouplingTransform) else example
    free = "nothing is computed" if layer.isometric else cost(doc)
    return (link, formula(doc), inverse(layer), log_det(layer, example), free)


def formula(doc: str) -> str:
    """The first formula of a docstring, on one line."""
    block = re.search(r"\.\. math::\n((?:[ \t]+.*\n|\n)+)", doc + "\n")
    inline = re.search(r":math:`([^`]+)`", doc)
    text = block[1] if block else inline[1] if inline else ""
    return f"${' '.join(text.split())}$".replace("|", r"\vert ")


def cost(doc: str) -> str:
    """What a docstring says of it."""
    found = re.search(r"^Cost: (.+?)(?:\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    if found is None:
        raise RuntimeError(f'add a paragraph "Cost: ..." to the docstring that begins {doc.splitlines()[0]!r}')
    plain = re.sub(r":math:`([^`]+)`", r"$\1$", " ".join(found[1].split()))
    plain = re.sub(r":\w+:`[~.]*(?:\w+\.)*(\w+)`", r"`\1`", plain).replace("``", "`")
    return plain.rstrip(".").replace("|", r"\vert ")


def inverse(layer: inv.InvertibleModule) -> str:
    """How close it comes, and of what kind it is."""
    exact = "bit for bit" if layer.exactness is inv.Exactness.EXACT else "to rounding"
    if layer.keeps_grid and exact == "to rounding":
        exact += "; bit for bit on a grid"
    kind = "" if layer.bijective else "; a left inverse"
    return exact + kind


def log_det(layer: inv.InvertibleModule, example: object) -> str:
    """Zero, if it is so by construction; the formula has it otherwise."""
    if layer.isometric or isinstance(example, inv.Additive):
        return "0"
    if isinstance(example, inv.Haar | inv.LeGall53):
        x = torch.rand(1, 2, 4, 4)
        return "0" if not layer.forward_and_log_det(x)[1].any() else "yes"
    return "yes"


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
