"""How a network is trained, as data."""

from dataclasses import dataclass

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What makes a training run, apart from the images: the network, the optimiser, the schedule, the augmentation.

    The optimiser is SGD with momentum; weight decay acts on all parameters. The learning rate is a function of the
    step alone: a linear warm-up, then ``lr`` times either a cosine that ends at 0, or a factor of ten less at each of
    ``drops``, which are fractions of the whole run.
    """

    name: str
    model: str
    batch_size: int
    """Images per step."""
    lr: float
    weight_decay: float
    epochs: int | None = None
    iterations: int | None = None
    """The length in steps, where the source counts these; ``epochs`` is ``None`` then."""
    momentum: float = 0.9
    nesterov: bool = False
    warmup_epochs: float = 0
    drops: tuple[float, ...] | None = None
    """Fractions of the run at which the learning rate drops tenfold; ``None`` for the cosine."""
    label_smoothing: float = 0.0
    size: int = 224
    """Of the images that the network sees, in pixels."""
    resize: int = 256
    """What the shorter side is scaled to before the centre crop at test time, in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """The share of the image's area that a training crop takes, drawn uniformly."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The crop's width over height, drawn log-uniformly."""
    flip: bool = True
    """Whether training images are mirrored, one in two."""
    threads: int | None = None
    """CPU threads of the computation; ``None`` leaves them to PyTorch. Results depend on their number."""
    source: str = ""
    top1: str = "not run"
    """The top-1 accuracy to expect, with where it was measured."""


_PAPER = "Jacobsen et al., 2018, section 3.2, https://arxiv.org/abs/1802.07088"

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # The paper augments "according to Gomez et al.": its colour distortion is not built yet.
        Recipe(
            name="imagenet",
            model="irevnet_b",
            batch_size=256,
            lr=0.1,
            weight_decay=1e-4,
            iterations=600_000,
            drops=(160 / 600, 320 / 600, 480 / 600),
            source=_PAPER + ", without the colour distortion",
        ),
        Recipe(
            name="digits",
            model="irevnet_small",
            batch_size=64,
            lr=0.1,
            weight_decay=5e-4,
            epochs=30,
            nesterov=True,
            warmup_epochs=2,
            label_smoothing=0.1,
            size=32,
            resize=32,
            crop_scale=(0.8, 1.0),
            crop_ratio=(3 / 5, 5 / 3),
            flip=False,
            threads=1,  # faster for a network this small than two, and the same result on any machine
            source="our own, for the embedded digits",
        ),
    )
}
"""All recipes by name."""
