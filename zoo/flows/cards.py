"""What is known of each flow: one card per flow, kept true by ``tests/test_zoo_flows.py``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zoo._frozen import frozen

__all__ = ["FLOWS", "Density", "FlowCard"]


@dataclass(frozen=True)
class Density:
    """How likely somebody found data to be that were held out.

    Example:
        >>> str(FLOWS["glow"].reported[0])
        '3.35 bits per dimension (CIFAR-10, Table 2 of the paper)'
    """

    value: float
    unit: Literal["bits per dimension", "nats"]
    """Bits: less is better, see :func:`zoo.flows.bits_per_dimension`. Nats: the mean of the log-densities, and more is
    better."""
    source: str
    """Where it stands, and of which data."""

    def __str__(self) -> str:
        return f"{self.value} {self.unit} ({self.source})"


@dataclass(frozen=True)
class FlowCard:
    """A flow, with the options that it has if none are given.

    Example:
        >>> import zoo
        >>> glow = zoo.card("glow")
        >>> glow.shape, glow.parameters, glow.inverse
        ((3, 32, 32), 44052816, 'rounds')
    """

    name: str
    source: str
    """The paper or code that it is built from, with a link."""
    shape: tuple[int, ...]
    """Of a datum."""
    parameters: int
    flops: int
    """Floating-point operations of the log-density of one datum, in matrix products and convolutions; a multiplication
    and an addition are two. Counted by torch's ``FlopCounterMode``."""
    inverse: Literal["bijective", "rounds", "iterative"]
    """Of the map from data to latent values; ``"rounds"``: data are whole numbers, with noise in the one direction, and
    without it in the other; ``"iterative"``: to a tolerance."""
    activations: Mapping[str, int]
    """Bytes that a training step by likelihood takes in single precision for each datum of its batch, by what is kept
    for the gradients. Counted by :func:`zoo.dry_run.cost_of`."""
    reported: tuple[Density, ...] = ()
    """As the source reports them."""
    measured: tuple[Density, ...] = ()
    """As they were measured here; none: not run."""
    licence: str = "MIT"
    """Of the code."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", frozen(self.activations))

    def lines(self) -> dict[str, Any]:
        """Its fields as text."""
        return {
            "name": self.name,
            "source": self.source,
            "shape": " × ".join(map(str, self.shape)),
            "parameters": f"{self.parameters:,}",
            "flops": f"{self.flops:,}",
            "inverse": self.inverse,
            "activations": ", ".join(f"{kept} {number:,}" for kept, number in self.activations.items()) + " bytes",
            "reported": "\n".join(map(str, self.reported)) or "-",
            "measured": "\n".join(map(str, self.measured)) or "not run",
            "licence": self.licence,
        }


def flow_cells(model: str) -> tuple[str, ...]:
    """A row of the table of flows: those of :data:`FLOW_HEADER`, as text; of a flow without a card its name."""
    if model not in FLOWS:
        return (model, *["-"] * (len(FLOW_HEADER) - 1))
    each = FLOWS[model]
    kept = (f"{each.activations[key] / 1e6:,.3g}" if key in each.activations else "-" for key in FLOW_HEADER[5:])
    shape = "×".join(map(str, each.shape))
    return (model, f"{each.parameters:,}", f"{each.flops / 1e9:,.3g}", shape, each.inverse, *kept)


FLOW_HEADER = ("flow", "parameters", "GFLOP", "data", "inverse", "store", "reconstruct")
"""Of the table: the log-density of one datum of that shape; and megabytes of a training step for each of them, by what
is kept for the gradients."""

_IRESNET = "Behrmann et al., 2019, https://arxiv.org/abs/1811.00995"
_NICE = "Dinh et al., 2014, https://arxiv.org/abs/1410.8516"
_SPLINE = "Durkan et al., 2019, https://arxiv.org/abs/1906.04032"
_GLOW = "Kingma and Dhariwal, 2018, https://arxiv.org/abs/1807.03039"
_REALNVP = "Dinh et al., 2017, https://arxiv.org/abs/1605.08803"

FLOWS: dict[str, FlowCard] = {
    each.name: each
    for each in (
        FlowCard(
            name="glow",
            source=f"section 3 of {_GLOW}; sizes of its Table 4 for CIFAR-10",
            shape=(3, 32, 32),
            parameters=44_052_816,
            flops=8_031_129_600,
            inverse="rounds",
            activations={"store": 92_332_321, "recompute": 4_349_956, "reconstruct": 3_188_740},
            reported=(Density(3.35, "bits per dimension", "CIFAR-10, Table 2 of the paper"),),
        ),
        FlowCard(
            name="realnvp",
            source=f"section 3 of {_REALNVP}; sizes of its section 4.1 for CIFAR-10",
            shape=(3, 32, 32),
            parameters=18_591_032,
            flops=5_806_817_280,
            inverse="rounds",
            activations={"store": 24_932_533, "recompute": 4_829_324, "reconstruct": 4_767_884},
            reported=(Density(3.49, "bits per dimension", "CIFAR-10, Table 1 of the paper"),),
        ),
        FlowCard(
            name="iresnet",
            source=f"{_IRESNET}, with the estimate of Chen et al., 2019, https://arxiv.org/abs/1906.02735",
            shape=(2,),
            parameters=7_164,
            flops=1_602_560,
            inverse="iterative",
            activations={"store": 11_406, "recompute": 1_378, "reconstruct": 1_386},
        ),
        FlowCard(
            name="nice",
            source=f"section 5.1 of {_NICE}; for vectors of few features",
            shape=(2,),
            parameters=17_416,
            flops=33_792,
            inverse="bijective",
            activations={"store": 2_324, "recompute": 796, "reconstruct": 800},
        ),
        FlowCard(
            name="spline_flow",
            source=f"section 3 of {_SPLINE}; for vectors of few features",
            shape=(2,),
            parameters=34_702,
            flops=67_584,
            inverse="bijective",
            activations={"store": 5_301, "recompute": 836, "reconstruct": 808},
        ),
    )
}
"""All cards by flow."""
