"""Images with equal logits and different pixels, made by moving where the head cannot see."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.analysis.figures import keep, picture, progress_bar, show
from zoo.analysis.interpolation import DRAWN, add_pairs, chosen_pairs
from zoo.analysis.projection import nearest_sums, rectified_projection
from zoo.analysis.subject import Reversible, Subject, images_of, open_subject, reversible
from zoo.augment import Preparation
from zoo.errors import InputError, UnsuitedError, diverging
from zoo.evaluation import evaluating
from zoo.plots import new_figure
from zoo.state import name_of

__all__ = ["KEEP", "Metamers", "draw_metamers", "find_metamers", "head_sees"]

KEEP = ("logits", "pooled")
"""What a metamer has of the first image: its logits alone, or all pooled values that the classifier sees."""


def head_sees(net: Reversible) -> tuple[Tensor, Tensor]:
    r"""The scale a and shift b of each channel by which the head sees features f.

    The head of ``zoo.network.pooling_head`` is batch norm, ReLU, mean over space and a linear classifier, so that
    of each channel it sees :math:`\operatorname{mean} \max(a f + b, 0)` and nothing else; with running statistics,
    :math:`a = \gamma / \sqrt{v + \epsilon}` and :math:`b = \beta - a m`. Both are ``(feature_channels,)``, in float64.

    Raises:
        UnsuitedError: if the network has another head, or is not bijective.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1))
        >>> scale, shift = head_sees(net)
        >>> scale.shape, scale[0].round(decimals=3), shift[0]
        (torch.Size([192]), tensor(1., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    first = net.head[0] if len(net.head) > 1 else None
    if not isinstance(first, _BatchNorm) or not isinstance(net.head[1], nn.ReLU) or first.running_mean is None:
        raise UnsuitedError(
            f"the head of {name_of(net)} does not average rectified features, and this analysis needs that"
        )
    if not net.body.bijective:
        raise UnsuitedError(f"this {name_of(net)} is injective: features that are moved may be those of no image")
    mean, variance = (torch.as_tensor(each).double() for each in (first.running_mean, first.running_var))
    scale = torch.as_tensor(first.weight).detach().double() / (variance + first.eps).sqrt()
    return scale, torch.as_tensor(first.bias).detach().double() - scale * mean


@dataclass(frozen=True)
class Metamers:
    """Images that the head cannot tell from others.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1, 1))
        >>> found = find_metamers(net, torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))
        >>> found.logits.shape, found.differences.shape, bool((found.differences < 1e-4).all())
        (torch.Size([2, 2]), torch.Size([2]), True)
    """

    images: Tensor
    """``(batch, channels, height, width)``, on the network's grid, if it has one."""
    logits: Tensor
    """Those of the images whose logits are kept; without a classifier, their pooled features."""
    found: Tensor
    """Those of ``images``, which went forward again."""
    moved: Tensor
    """Their distance in features from the images that were approached, over that of both images, ``(batch,)``."""

    @property
    def differences(self) -> Tensor:
        """The largest difference of a logit, for each image."""
        return (self.found - self.logits).abs().amax(dim=1)


@torch.no_grad()
def find_metamers(net: Reversible, x: Tensor, other: Tensor, *, keep: str = "logits") -> Metamers:
    r"""For each image one of equal logits, whose features are close to those of another image.

    .. math::
        \Phi^{-1} \arg\min_{f} \lVert f - \Phi x' \rVert \quad\text{with}\quad
        \sum_p \max(a_c f_{cp} + b_c, 0) = s_c \text{ for each channel } c

    With ``keep="pooled"`` the sums :math:`s_c` are those of x, and all that the classifier sees. It need not see the
    same for equal logits: with ``"logits"`` they are :func:`nearest_sums` to those of x', weighted by what it costs to
    change them, :math:`w_c = n_c a_c^2` for :math:`n_c` active units of x', 1 at least. These are not the nearest
    features of equal logits, for active units may become inactive on the way; the sums being given, they are.

    Channel by channel it is :func:`rectified_projection` of :math:`a f + b`; that a channel is scaled changes nothing
    about which point is nearest. Channels with a = 0 are free. In ``eval``, on the network's grid.

    Source: Jacobsen, Behrmann, Zemel and Bethge, 2019, "Excessive Invariance Causes Adversarial Vulnerability", whose
    metameric samples keep the logits of one image and take all other dimensions from another,
    https://arxiv.org/abs/1811.00401. There logits are dimensions of the features; here the features are moved.

    Args:
        net: bijective, with the head of ``zoo.network.pooling_head``.
        x: images whose logits are kept, ``(batch, channels, height, width)``.
        other: images whose features are approached, of the same shape.
        keep: ``"logits"`` or ``"pooled"``; without a classifier both are the same.

    Raises:
        ValueError: if ``keep`` is neither.
        InputError: if the shapes differ, the network is not bijective or has another head, or a value leaves the grid.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2)
        >>> net.grid = "exact"
        >>> found = find_metamers(net, torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16))
        >>> found.images.shape, bool(found.differences.max() < 1e-5)
        (torch.Size([1, 3, 16, 16]), True)
    """
    if keep not in KEEP:
        raise ValueError(f"find_metamers: keep must be one of {', '.join(KEEP)}, got {keep!r}.")
    if x.shape != other.shape:
        raise InputError(f"the images must have one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
    scale, shift = head_sees(net)
    with evaluating(net), diverging("in the metamers", otherwise=""):
        kept, features = net.features(x), net.features(other)
        seen, z = (f.double().flatten(2) * scale[:, None] + shift[:, None] for f in (kept, features))
        sums = seen.relu().sum(-1)
        if keep == "logits" and isinstance(classifier := net.head[-1], nn.Linear):
            ease = (z > 0).sum(-1).clamp(min=1) * scale.square()
            sums = nearest_sums(z.relu().sum(-1), sums, classifier.weight.double(), ease)
        moved = rectified_projection(z, sums) - z
        change = torch.where(scale[:, None] == 0, 0, moved / scale[:, None]).view_as(features)
        images = net.inverse((features.double() + change).to(features.dtype))
        dtype = next(net.head.parameters()).dtype
        logits, found = (net.head(f.to(dtype)) for f in (kept, net.features(images)))
    apart = (features - kept).double().flatten(1).norm(dim=1)
    far = torch.where(apart > 0, change.flatten(1).norm(dim=1) / apart, 0)
    return Metamers(images, logits, found, far)


def draw_metamers(
    kept: Tensor, approached: Tensor, images: Tensor, captions: Sequence[Sequence[str]] | None = None
) -> Figure:
    """For each pair its two images, the metamer, and how far it is from both, darker where further.

    Args:
        kept: the images whose logits the metamers have, ``(batch, 3, height, width)`` in [0, 1].
        approached: those whose features were approached.
        images: the metamers; what is beyond [0, 1] is clipped.
        captions: what stands below these three, for each pair.

    Example:
        >>> figure = draw_metamers(*torch.rand(3, 1, 3, 8, 8))
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['A: logits kept', 'B: approached', 'metamer']
    """
    titles = ("A: logits kept", "B: approached", "metamer", "|metamer − A|", "|metamer − B|")
    figure = new_figure(7.6, 1.75 * len(images) + 0.3)
    grid = figure.subplots(len(images), 5, squeeze=False)
    for row, (axes, a, b, image) in enumerate(zip(grid, kept, approached, images, strict=True)):
        shown = [*map(picture, (a, b, image)), *(_distances(image, each) for each in (a, b))]
        for column, each in enumerate(shown):
            axes[column].imshow(each, interpolation="nearest", cmap="gray_r", vmin=0, vmax=1)
            axes[column].set(xticks=[], yticks=[])
            axes[column].set_frame_on(False)
            if not row:
                axes[column].set_title(titles[column], fontsize=8)
        for column, text in enumerate(captions[row] if captions else ()):
            axes[column].set_xlabel(text, fontsize=8)
    return figure


def _distances(image: Tensor, other: Tensor) -> "np.ndarray":
    """The largest of the colours, of images as they are, not clipped."""
    return (image - other).abs().amax(dim=0).cpu().numpy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    add_pairs(parser, "A", "B")
    parser.add_argument("--keep", choices=KEEP, default="logits", help="what the metamer has of A (default: logits)")


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis metamers --help``."""
    subject = open_subject(given.checkpoint, device=given.device, size=given.size)
    net = reversible(subject)
    head_sees(net)
    data, name = images_of(given.data)
    pairs = chosen_pairs(data.validation, given.pair, given.pairs)
    numbers: list[dict[str, Any]] = []
    images: list[list[Tensor]] = []
    with progress_bar("inverting") as progress:
        for done, pair in enumerate(pairs):
            x, other = next(subject.batches(data.validation, pair, 2)).split(1)
            found = find_metamers(net, x, other, keep=given.keep)
            shown = [subject.restored(each)[0].double() for each in (x, other, found.images)]
            images.append(shown)
            numbers.append({"images": [data.validation.name(i) for i in pair]} | _numbers(subject, other, found, shown))
            progress(done + 1, len(pairs))
    captions = [_captions(each, data.classes) for each in numbers]
    kept, approached, moved = (torch.stack(each) for each in zip(*images[:DRAWN], strict=True))
    figure = draw_metamers(kept, approached, moved, captions)
    paths = keep(
        given.output,
        "metamers",
        figure,
        {"keep": given.keep, "pairs": numbers},
        subject=subject,
        data=name,
        seed=given.seed,
    )
    rows = [_row(pair, each, data.classes) for pair, each in zip(pairs, numbers, strict=True)]
    header = [
        "A, B",
        "class",
        "off by",
        "clipped",
        "8 bits",
        "its class",
        "from A",
        "from B",
        "A from B",
        "beyond [0, 1]",
    ]
    kept_is = "pooled features" if given.keep == "pooled" or not net.num_classes else "logits"
    title = f"{subject.model}: metamers with the {kept_is} of A; logits' largest difference, RMS of a pixel value"
    show(console, title, header, rows, paths)


def _numbers(subject: Subject, other: Tensor, found: Metamers, shown: Sequence[Tensor]) -> dict[str, Any]:
    """Of one pair; what the logits are, too, of the metamer clipped to [0, 1], and of what a file of 8 bits holds."""
    net, prepare = subject.net, Preparation(subject.recipe)
    kept, approached, image = shown
    clipped = 255 * image.clamp(0, 1)
    with torch.no_grad(), diverging("in the metamers"):
        versions = {
            "A": found.logits,
            "B": net(other),
            "metamer": found.found,
            "clipped": net(prepare(clipped[None])),
            "8 bits": net(prepare(clipped.round()[None])),
        }
    numbers: dict[str, Any] = {
        "differences": {key: float((each - found.logits).abs().max()) for key, each in versions.items() if key != "A"},
        "distances": {
            key: float((a - b).square().mean().sqrt())
            for key, a, b in (("A", image, kept), ("B", image, approached), ("A to B", kept, approached))
        },
        "beyond": float(((image < 0) | (image > 1)).double().mean()),
        "features_moved": float(found.moved[0]),
        "logits": {key: each[0].tolist() for key, each in versions.items()},
    }
    if getattr(net, "num_classes", 0):
        best = {key: each[0].double().softmax(dim=0).max(dim=0) for key, each in versions.items()}
        numbers["classes"] = {key: int(each.indices) for key, each in best.items()}
        numbers["probabilities"] = {key: float(each.values) for key, each in best.items()}
    return numbers


def _class_name(numbers: dict[str, Any], key: str, classes: list[str]) -> str:
    if "classes" not in numbers:
        return "-"
    label = numbers["classes"][key]
    return classes[label] if label < len(classes) else str(label)


def _captions(numbers: dict[str, Any], classes: list[str]) -> list[str]:
    if "classes" not in numbers:
        return []
    return [
        f"{_class_name(numbers, key, classes)}: {100 * numbers['probabilities'][key]:.2f} %"
        for key in ("A", "B", "metamer")
    ]


def _row(pair: tuple[int, int], numbers: dict[str, Any], classes: list[str]) -> list[str]:
    off, far = numbers["differences"], numbers["distances"]
    return [
        " ".join(map(str, pair)),
        _class_name(numbers, "metamer", classes),
        *(f"{off[key]:.2g}" for key in ("metamer", "clipped", "8 bits")),
        _class_name(numbers, "8 bits", classes),
        *(f"{far[key]:.3f}" for key in ("A", "B", "A to B")),
        f"{100 * numbers['beyond']:.1f} %",
    ]
