"""What is known of each model: one card per model, kept true by ``tests/test_cards.py``. Flows: zoo/flows/cards.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from zoo._frozen import frozen
from zoo.flows.cards import FLOWS, FlowCard

__all__ = ["CARDS", "Card", "TopOne", "card"]


@dataclass(frozen=True)
class TopOne:
    """A top-1 error that somebody measured.

    Example:
        >>> str(TopOne(26.7, "ImageNet, Table 1"))
        '26.7 % (ImageNet, Table 1)'
    """

    error: float
    """In percent."""
    source: str
    """Where it stands, and of what."""

    def __str__(self) -> str:
        return f"{self.error} % ({self.source})"


@dataclass(frozen=True)
class Card:
    """A model, with the options that it has if none are given.

    Example:
        >>> known = CARDS["revnet56"]
        >>> known.parameters, known.inverse, known.reported[0].error
        (27553128, 'none', 25.2)
        >>> round(known.activations["store"] / known.activations["reconstruct"], 1)
        1.4
    """

    name: str
    source: str
    """The paper or code that it is built from, with a link."""
    parameters: int
    flops: int
    """Floating-point operations of one image's forward pass, in matrix products and convolutions; a multiplication and
    an addition are two. Counted by torch's ``FlopCounterMode``."""
    size: int
    """Height and width of that image, in pixels."""
    inverse: Literal["bijective", "injective", "none"]
    """Of the map from the image to ``net.features(image)``; injective: the inverse is a left inverse."""
    activations: Mapping[str, int]
    """Bytes that a training step in single precision, without a grid, takes for each image of its batch, by what is
    kept for the gradients; what lies outside of a network's invertible layers is stored in any case. Counted by
    :func:`zoo.dry_run.cost_of`."""
    step: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """CPU time of such a step over that of ResNet-50's: median and 95 % interval, ``python -m benchmarks.models``."""
    reported: tuple[TopOne, ...] = ()
    """Errors as the source reports them."""
    measured: tuple[TopOne, ...] = ()
    """Errors as they were measured here; none: not run."""
    recipe: str | None = None
    """How it is trained: a name in :data:`zoo.recipes.RECIPES`, with ``--model`` where the recipe has another one."""
    licence: str = "MIT"
    """Of the code."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", frozen(self.activations))
        object.__setattr__(self, "step", frozen(self.step))


def _errors(errors: tuple[TopOne, ...], otherwise: str) -> str:
    found = [each.error for each in errors]
    return f"{min(found)}" + (f"–{max(found)}" if len(found) > 1 else "") if found else otherwise


def costs(model: str) -> tuple[str, ...]:
    """A row of the table of what a training step takes: the model, and those of :data:`COSTS`."""
    card = CARDS[model]
    kept = (f"{card.activations[each] / 1e6:,.3g}" if each in card.activations else "-" for each in COSTS[:3])
    time = (f"{card.step[each][0]:.2f}" if each in card.step else "-" for each in ("store", "reconstruct"))
    return (model, *kept, *time)


def cells(model: str) -> tuple[str, ...]:
    """A row of the table of models: those of :data:`HEADER`, as text; of a model without a card its name."""
    if model not in CARDS:
        return (model, *["-"] * (len(HEADER) - 1))
    each = CARDS[model]
    figures = (f"{each.parameters:,}", f"{each.flops / 1e9:,.3g}", f"{each.size}", each.inverse)
    return (model, *figures, _errors(each.reported, "-"), _errors(each.measured, "not run"))


HEADER = ("model", "parameters", "GFLOP", "pixels", "inverse", "error, %", "here")
"""Of the table: forward pass of one image of so many pixels; top-1 error as reported, and as measured here."""

COSTS = ("store", "recompute", "reconstruct", "step: store", "step: reconstruct")
"""Columns: megabytes of activations for each image, and the time of a step over ResNet-50's."""

_IREVNET = "Jacobsen et al., 2018, https://arxiv.org/abs/1802.07088"
_REVNET = "Gomez et al., 2017, https://arxiv.org/abs/1707.04585"
_RESNET = "He et al., 2015, https://arxiv.org/abs/1512.03385"
_REVNET_README = "README of https://github.com/renmengye/revnet-public (5486f61)"
_REVVIT = "Mangalam et al., 2022, https://arxiv.org/abs/2302.04869"
_TABLE_1 = "ImageNet, Table 1 of the i-RevNet paper, https://arxiv.org/abs/1802.07088"
_README = "README of https://github.com/jhjacobsen/pytorch-i-revnet (61b4b49), kernel_sizes=(3, 3, 3)"

CARDS: dict[str, Card] = {
    each.name: each
    for each in (
        Card(
            name="irevnet_a",
            source=f"section 3.2 and Table 1 of {_IREVNET}",
            parameters=180_999_016,
            flops=21_960_720_384,
            size=224,
            inverse="injective",
            activations={"store": 72_975_140, "recompute": 33_718_272, "reconstruct": 15_492_754},
            step={"store": (3.8, 3.63, 4.06), "reconstruct": (4.78, 4.45, 4.88)},
            reported=(TopOne(24.7, "ImageNet, Table 1"),),
            recipe="paper_irevnet_a",
        ),
        Card(
            name="irevnet_b",
            source=f"section 3.2 and Table 1 of {_IREVNET}",
            parameters=29_201_092,
            flops=6_113_140_224,
            size=224,
            inverse="bijective",
            activations={"store": 92_674_269, "recompute": 33_926_400, "reconstruct": 4_110_336},
            step={"store": (0.93, 0.86, 0.98), "reconstruct": (1.48, 1.39, 1.53)},
            reported=(TopOne(26.7, "ImageNet, Table 1"), TopOne(26.0, f"ImageNet, {_README}")),
            recipe="paper_irevnet_b",
        ),
        Card(
            name="irevnet_small",
            source=f"our own, for 32 by 32 pixels, after {_IREVNET}",
            parameters=1_246_048,
            flops=6_180_864,
            size=32,
            inverse="bijective",
            activations={"store": 196_608, "recompute": 110_592, "reconstruct": 43_008},
            measured=tuple(
                TopOne(error, f"embedded digits, num_classes=10, seed {seed}, docs/training.md")
                for seed, error in enumerate((0.28, 0.85, 0.56))
            ),
            recipe="digits",
        ),
        Card(
            name="irevnet_cifar",
            source="CIFAR_main.py and models/iRevNet.py of https://github.com/jhjacobsen/pytorch-i-revnet (9a93eb5)",
            parameters=6_274_826,
            flops=985_606_144,
            size=32,
            inverse="injective",
            activations={"store": 11_960_320, "recompute": 4_254_884, "reconstruct": 929_792},
            reported=(TopOne(5.5, "CIFAR-10, its README: an accuracy of about 94.5 %"),),
        ),
        Card(
            name="iunet",
            source="Etmann, Ke and Schönlieb, 2020, https://arxiv.org/abs/2005.05220; sizes are our own",
            parameters=3_137_410,
            flops=19_344_130_048,
            size=256,
            inverse="injective",
            activations={"store": 229_638_272, "recompute": 128_974_856, "reconstruct": 100_663_304},
        ),
        Card(
            name="revvit_s",
            source=f"Rev-ViT-S of {_REVVIT}",
            parameters=22_434_664,
            flops=9_148_821_504,
            size=224,
            inverse="none",
            activations={"store": 70_710_528, "recompute": 12_076_722, "reconstruct": 6_055_602},
            step={"store": (0.97, 0.93, 1.02), "reconstruct": (1.34, 1.32, 1.39)},
            reported=(
                TopOne(20.1, "ImageNet, README of https://github.com/facebookresearch/SlowFast/tree/main/projects/rev"),
            ),
        ),
        Card(
            name="revnet38",
            source=f"Table 1 of {_REVNET}",
            parameters=464_890,
            flops=154_462_400,
            size=32,
            inverse="none",
            activations={"store": 3_051_520, "recompute": 1_372_160, "reconstruct": 1_044_480},
        ),
        Card(
            name="revnet110",
            source=f"Table 1 of {_REVNET}",
            parameters=1_729_194,
            flops=506_661_376,
            size=32,
            inverse="none",
            activations={"store": 8_617_984, "recompute": 2_785_280, "reconstruct": 1_081_344},
        ),
        Card(
            name="revnet164",
            source=f"Table 1 of {_REVNET}",
            parameters=1_748_778,
            flops=500_377_600,
            size=32,
            inverse="none",
            activations={"store": 25_427_968, "recompute": 10_747_904, "reconstruct": 4_390_912},
        ),
        Card(
            name="revnet56",
            source=f"Table 2 of {_REVNET}",
            parameters=27_553_128,
            flops=8_901_857_280,
            size=224,
            inverse="none",
            activations={"store": 95_730_762, "recompute": 68_674_459, "reconstruct": 67_394_971},
            step={"store": (1.15, 1.11, 1.18), "reconstruct": (1.33, 1.31, 1.38)},
            reported=(TopOne(25.2, _TABLE_1),),
            recipe="gomez_revnet56",
        ),
        Card(
            name="revnet104",
            source=_REVNET,
            parameters=45_428_072,
            flops=15_889_567_744,
            size=224,
            inverse="none",
            activations={"store": 134_265_930, "recompute": 81_519_515, "reconstruct": 67_394_971},
            step={"store": (1.88, 1.84, 1.92), "reconstruct": (2.37, 2.35, 2.42)},
            reported=(TopOne(23.10, f"ImageNet, {_REVNET_README}"),),
            recipe="gomez_revnet104",
        ),
        Card(
            name="resnet50",
            source=f"{_RESNET}, as torchvision has it",
            parameters=25_557_032,
            flops=8_178_368_512,
            size=224,
            inverse="none",
            activations={"store": 86_068_006},
            step={"store": (1.0, 1.0, 1.0)},
            reported=(TopOne(24.7, _TABLE_1),),
            recipe="gomez_resnet50",
            licence="BSD-3-Clause (torchvision)",
        ),
        Card(
            name="resnet101",
            source=f"{_RESNET}, as torchvision has it",
            parameters=44_549_160,
            flops=15_602_810_880,
            size=224,
            inverse="none",
            activations={"store": 127_011_622},
            step={"store": (1.76, 1.72, 1.83)},
            reported=(TopOne(22.63, "ImageNet, torchvision's weights IMAGENET1K_V1"),),
            recipe="gomez_resnet101",
            licence="BSD-3-Clause (torchvision)",
        ),
        Card(
            name="resnet_small",
            source="resnet-32 of https://github.com/renmengye/revnet-public (5486f61), with a stride of our own",
            parameters=528_504,
            flops=34_558_976,
            size=32,
            inverse="none",
            activations={"store": 610_854},
            measured=tuple(
                TopOne(error, f"embedded digits, num_classes=10, seed {seed}, recipe digits with --model resnet_small")
                for seed, error in enumerate((0.56, 0.85, 0.85))
            ),
            recipe="digits",
        ),
    )
}
"""All cards of classifiers, by model."""


def card(name: str) -> Card | FlowCard:
    """Returns what is known of a model: a :class:`~zoo.cards.Card`; of a flow a :class:`~zoo.flows.cards.FlowCard`.

    Args:
        name: one of :func:`zoo.names`.

    Raises:
        ValueError: if there is no card for it.

    Example:
        >>> card("irevnet_b").parameters
        29201092
        >>> str(card("irevnet_b").reported[0])
        '26.7 % (ImageNet, Table 1)'
    """
    known: dict[str, Card | FlowCard] = {**CARDS, **FLOWS}
    if name not in known:
        rule = f"there is no card for {name!r} in zoo/cards.py, nor in zoo/flows/cards.py"
        raise ValueError(f"zoo.card: {rule}; there are {', '.join(known)}.")
    return known[name]
