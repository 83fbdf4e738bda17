"""How a network is trained, as data: each figure with its source."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What makes a training run, apart from the images: network, optimiser, schedule, augmentation, arithmetic.

    The optimiser is SGD with momentum. The learning rate is a function of the step alone, see
    :func:`zoo.schedule.learning_rate`. ``batch_size`` and ``lr`` belong together: :func:`zoo.schedule.scaled` gives the
    recipe for another batch size.

    Example:
        >>> import dataclasses
        >>> mine = dataclasses.replace(RECIPES["digits"], name="mine", lr=0.05, epochs=10)
        >>> mine.model, mine.lr, mine.evaluation_size
        ('irevnet_small', 0.05, 32)
    """

    name: str
    model: str
    """A name of :func:`zoo.names`."""
    batch_size: int
    """Images per step, over all processes."""
    lr: float
    """The largest learning rate."""
    weight_decay: float
    epochs: float | None = None
    iterations: int | None = None
    """The length in steps, where the source counts these; ``epochs`` is ``None`` then."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the model's builder."""
    head_norm_momentum: float | None = None
    """Momentum of the last batch norm, if it is not PyTorch's 0.1."""
    momentum: float = 0.9
    nesterov: bool = False
    decay_norms: bool = True
    """Whether weight decay acts on biases and the parameters of norms, too."""
    warmup_epochs: float = 0
    warmup_start: float = 0.0
    """The first learning rate of the warm-up, as a share of ``lr``."""
    drops: tuple[float, ...] | None = None
    """Fractions of the run at which the learning rate drops tenfold; ``None`` for the cosine."""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    """Parameter of the beta distribution that mixes images, 0 for none."""
    cutmix: float = 0.0
    """Parameter of the beta distribution of the pasted area's share, 0 for none. With both, each batch takes one."""
    ema_decay: float | None = None
    """Of the moving average of the weights, per update, once there were enough; ``None`` for no average."""
    ema_every: int = 1
    """Steps between its updates."""
    size: int = 224
    """Of the training images that the network sees, in pixels."""
    test_size: int | None = None
    """Of the test images, in pixels; ``None``: like ``size``."""
    resize: int = 256
    """What the shorter side is scaled to before the centre crop at test time, in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """The share of the image's area that a training crop takes, drawn uniformly."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The crop's width over height, drawn log-uniformly."""
    flip: bool = True
    """Whether training images are mirrored, one in two."""
    trivial_augment: bool = False
    """Whether each training image goes through one operation of TrivialAugmentWide."""
    random_erase: float = 0.0
    """The probability that a rectangle of a training image is set to 0."""
    colour: str = "none"
    """The colour distortion: ``none``, ``inception`` (Gomez et al.) or ``jitter`` (the released i-RevNet code's)."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of each colour, subtracted from images in [0, 1]."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of each colour, which the difference is divided by."""
    autocast: str = "none"
    """What matrix products and convolutions are computed in: ``none`` (single precision), ``bf16``."""
    backprop: str = "reconstruct"
    """What is kept for the gradients: ``store``, ``recompute`` or ``reconstruct``."""
    grid: str = "exact"
    """What the values between the layers are rounded to: ``exact``, ``exact32`` or ``none``."""
    channels_last: bool = False
    """Whether images and weights lie in memory with the channels last: on a GPU."""
    log_every: int = 100
    """Steps from one row of the log to the next."""
    threads: int | None = None
    """CPU threads of the computation; ``None`` leaves them to PyTorch. Results depend on their number."""
    source: str = ""
    top1: str = "not run"
    """The top-1 accuracy to expect, with where it was measured."""

    @property
    def evaluation_size(self) -> int:
        """Of the test images, in pixels."""
        return self.test_size or self.size


_PAPER = "Jacobsen et al., 2018, section 3.2 and Table 1, https://arxiv.org/abs/1802.07088"
_RELEASED = "ILSVRC_main.py of https://github.com/jhjacobsen/pytorch-i-revnet (61b4b49)"

# Section 3.2: SGD 0.9, weight decay 1e-4, 600k iterations of 256 images, 0.1 "reduced by a factor of 10 every 160k",
# images in [0, 1]. Decay on all parameters as in the released code; Gomez et al. have it on weights of convolutions and
# the head only. "Random scaling and cropping" is torchvision's, as in the released code, scaled bilinearly; Gomez et
# al. let a thread's number decide between four ways. Their colours. 256 and 224 at test time: the released code.
_PAPER_B = Recipe(
    name="paper_irevnet_b",
    model="irevnet_b",
    batch_size=256,
    lr=0.1,
    weight_decay=1e-4,
    iterations=600_000,
    drops=(160 / 600, 320 / 600, 480 / 600),
    colour="inception",
    channels_last=True,
    source=_PAPER,
    top1="73.3 % by the paper's Table 1 (error 26.7 %); not run here",
)

_GOMEZ = "resnet/configs/imagenet_configs.py of https://github.com/renmengye/revnet-public (6f9ec0f)"


def _of_gomez(model: str, top1: str) -> Recipe:
    """The baselines' recipe, which the paper took over: its only other figure is the decay, of weights alone."""
    return dataclasses.replace(
        _PAPER_B,
        name=f"gomez_{model}",
        model=model,
        decay_norms=False,
        source=f"Gomez et al., 2017, https://arxiv.org/abs/1707.04585, and {_GOMEZ}",
        top1=f"{top1}; not run here",
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        dataclasses.replace(
            _PAPER_B,
            name="paper_irevnet_a",
            model="irevnet_a",
            top1="75.3 % by the paper's Table 1 (error 24.7 %); not run here",
        ),
        _PAPER_B,
        # 128 epochs, tenfold less every 32; brightness=0.87 is in the code, perhaps a slip for 32/255 = 0.125.
        dataclasses.replace(
            _PAPER_B,
            name="released_irevnet_b",
            model_options={"kernel_sizes": (3, 3, 3)},
            head_norm_momentum=0.9,
            iterations=None,
            epochs=128,
            drops=(1 / 4, 1 / 2, 3 / 4),
            colour="jitter",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            source=_RELEASED,
            top1="74.018 % by that repository's README; not run here",
        ),
        _of_gomez("revnet56", "74.8 % by the i-RevNet paper's Table 1 (error 25.2 %)"),
        _of_gomez("revnet104", "76.90 % by that repository's README (error 23.10 %)"),
        _of_gomez("resnet50", "75.3 % by the i-RevNet paper's Table 1 (error 24.7 %)"),
        _of_gomez("resnet101", "none is known by this recipe"),
        # Of torchvision's recipe for ResNet-50 (its issue 3995) what is known to gain most, and shorter.
        Recipe(
            name="modern",
            model="irevnet_b",
            batch_size=1024,
            lr=0.5,
            weight_decay=5e-5,
            epochs=300,
            nesterov=True,
            decay_norms=False,
            warmup_epochs=5,
            warmup_start=0.01,
            label_smoothing=0.1,
            mixup=0.2,
            cutmix=1.0,
            ema_decay=0.99998**32,
            ema_every=32,
            size=192,
            test_size=224,
            resize=232,
            trivial_augment=True,
            random_erase=0.1,
            autocast="bf16",
            channels_last=True,
            source="our own, after https://github.com/pytorch/vision/issues/3995",
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
            log_every=11,  # twice in an epoch of 22 steps
            threads=1,  # faster for a network this small than two, and the same result on any machine
            source="our own, for the embedded digits",
            top1="99.2 to 99.7 %, three seeds, docs/training.md",
        ),
    )
}
"""All recipes by name."""
