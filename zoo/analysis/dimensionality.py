"""How many principal components of the last features tell the classes apart: Figure 7 of the i-RevNet paper."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from zoo.analysis.classifiers import (
    COSTS,
    FOLDS,
    Scores,
    check_folds,
    class_scores,
    principal_components,
    standardized,
)
from zoo.analysis.depth import Features
from zoo.analysis.figures import keep, progress_bar, show
from zoo.analysis.separation import accuracy_of
from zoo.analysis.study import Kept, add_study_arguments, new_panels, open_study
from zoo.arguments import positive
from zoo.errors import InputError

__all__ = ["Dimensionality", "accuracy_by_components", "default_components", "draw_dimensionality"]


@dataclass(frozen=True)
class Dimensionality:
    """Accuracies on the validation images, in percent.

    Example:
        >>> scores = tuple(Scores(svm, 80.0, cost=0.1, converged=True) for svm in (50.0, 90.0, 100.0))
        >>> found = Dimensionality(4, components=(1, 2, 4), scores=scores, variance=(0.6, 0.9, 1.0), network=98.0)
        >>> found.carrying(0.9), found.carrying(1, "neighbour")
        (2, 1)
    """

    width: int
    """The number of features after the last block."""
    components: tuple[int, ...]
    """How many of the first principal components were kept."""
    scores: tuple[Scores, ...]
    """Of classifiers that were trained on these components."""
    variance: tuple[float, ...]
    """The share of the variance of the training images that these components have."""
    network: float
    """The network's own, among all classes that it knows."""

    def carrying(self, share: float, kind: str = "svm") -> int:
        """The fewest components, of those tried, with this share of the best accuracy, of ``svm`` or ``neighbour``."""
        accuracies = [getattr(each, kind) for each in self.scores]
        return next(
            d for d, found in zip(self.components, accuracies, strict=True) if found >= share * max(accuracies) - 1e-9
        )


def default_components(images: int, features: int) -> list[int]:
    """1, 2, 4, ... up to all that there are, and these.

    Example:
        >>> default_components(1442, 12)
        [1, 2, 4, 8, 12]
    """
    most = min(images, features)
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def accuracy_by_components(
    training: Features,
    validation: Features,
    *,
    components: Sequence[int] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dimensionality:
    r"""Trains a linear SVM and a nearest neighbour on the first d principal components of the last features.

    .. math::
        x \mapsto \pi_d \Phi x

    with :math:`\pi_d` the projection onto the d eigenvectors of the training images' covariance that have the largest
    eigenvalues. The features are those after the last block, averaged over space and standardised by the training
    images. For each d the protocol is that of :func:`separation_by_depth`.

    Source: i-RevNet, section 5.2 and Figure 7, https://arxiv.org/abs/1802.07088

    Args:
        training: see :func:`features_by_depth`.
        validation: likewise, of other images.
        components: the values of d; ``None``: 1, 2, 4, ... and all.
        seed: of cross-validation and solver.
        folder: where results are kept, so that work that was interrupted goes on.
        progress: is told how many values of d are done, and of how many.

    Raises:
        InputError: if a d is more than there are features or training images, there are fewer than two classes, or one
            has too few images for cross-validation.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> x, labels = np.array([[-9, -8], [-9, -9], [-8, -9], [8, 9], [9, 9], [9, 8]]), np.array([0, 0, 0, 1, 1, 1])
        >>> with TemporaryDirectory() as folder:  # by hand what features_by_depth computes
        ...     np.save(Path(folder) / "block_001.npy", x)
        ...     features = Features(Path(folder), ("body.2",), (2,), labels, labels)
        ...     found = accuracy_by_components(features, features)
        >>> found.components, [each.svm for each in found.scores], found.network
        ((1, 2), [100.0, 100.0], 100.0)
    """
    images, width = len(training.labels), training.widths[-1]
    wanted = sorted(set(components)) if components else default_components(images, width)
    check_components(wanted, images, width)
    check_folds(training.labels)
    about = {"analysis": "dimensionality", "seed": seed, "costs": COSTS, "folds": FOLDS}
    kept = Kept(training, validation, about, folder)
    projected: list[Any] = []

    def scores(d: int) -> dict[str, Any]:
        if not projected:  # not at all, if everything was kept
            x, z = standardized(training.block(-1), validation.block(-1))
            pca = principal_components(x)
            projected.extend((pca.transform(x), pca.transform(z), np.cumsum(pca.explained_variance_ratio_)))
        x, z, shares = projected
        found = class_scores(x[:, :d], training.labels, z[:, :d], validation.labels, seed=seed)
        return asdict(found) | {"variance": float(shares[d - 1])}

    found: list[dict[str, Any]] = []
    for i, d in enumerate(wanted):
        found.append(dict(kept.get(str(d), lambda d=d: scores(d))))
        if progress:
            progress(i + 1, len(wanted))
    variance = tuple(each.pop("variance") for each in found)
    results = tuple(Scores(**each) for each in found)
    return Dimensionality(width, tuple(wanted), results, variance, accuracy_of(validation))


def check_components(components: Sequence[int], images: int, features: int) -> None:
    """Refuses numbers of components that there are not.

    Raises:
        InputError: if one is less than 1, or more than there are images or features.
    """
    most = min(images, features)
    for d in components:
        if not 1 <= d <= most:
            of = f"{features} features of {images} training images have"
            raise InputError(f"{of} 1 ... {most} principal components, got {d}")


def draw_dimensionality(found: Sequence[Dimensionality], titles: Sequence[str]) -> Figure:
    """Figure 7: accuracy over the number of components, a panel for each network.

    Args:
        found: of each network.
        titles: of the panels.

    Example:
        >>> scores = tuple(Scores(svm, svm, cost=0.1, converged=True) for svm in (50.0, 90.0, 100.0))
        >>> found = Dimensionality(4, components=(1, 2, 4), scores=scores, variance=(0.6, 0.9, 1.0), network=98.0)
        >>> [line.get_label() for line in draw_dimensionality([found], ["a network"]).axes[0].lines]
        ['linear SVM', 'nearest neighbour', 'the network itself']
    """
    figure, panels = new_panels(titles)
    for axes, each in zip(panels, found, strict=True):
        svm, near = ([getattr(score, kind) for score in each.scores] for kind in ("svm", "neighbour"))
        axes.plot(each.components, svm, "-", marker="o", markersize=4, label="linear SVM")
        axes.plot(
            each.components, near, "--", marker="s", markersize=4, markerfacecolor="white", label="nearest neighbour"
        )
        axes.axhline(each.network, color="black", linewidth=1, linestyle=":", label="the network itself")
        axes.set_xscale("log", base=2)
        shown = [d for d in each.components if d == each.components[-1] or 1.6 * d < each.components[-1]]
        axes.set_xticks(shown, [str(d) for d in shown], fontsize=7)
        axes.minorticks_off()
        axes.set(xlabel=f"principal components, of {each.width}", ylabel="top-1 accuracy, validation (%)")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    add_study_arguments(parser)
    parser.add_argument(
        "--components", type=positive, nargs="+", metavar="D", help="to keep (default: 1, 2, 4, ... and all)"
    )


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis dimensionality --help``."""
    study = open_study(given)
    check_folds(study.data.training.labels[list(study.chosen.training)], study.data.classes)
    for depth, _ in study.passes:
        check_components(given.components or (), len(depth.indices), depth.widths[-1])
    found: list[Dimensionality] = []
    for label, (training, validation) in zip(study.labels, study.features(given.workers), strict=True):
        with progress_bar(f"classifiers of {label}") as bar:
            options = {"components": given.components, "seed": given.seed, "folder": study.results, "progress": bar}
            found.append(accuracy_by_components(training, validation, **options))
    numbers = study.numbers([asdict(each) for each in found])
    figure = draw_dimensionality(found, study.labels)
    paths = keep(
        given.output, "dimensionality", figure, numbers, subject=study.subjects[0], data=study.name, seed=given.seed
    )
    header = ["network", "components", "of the variance", "linear SVM", "nearest neighbour", "C"]
    rows: list[list[str]] = []
    for label, each in zip(study.labels, found, strict=True):
        for d, score, share in zip(each.components, each.scores, each.variance, strict=True):
            cells = [f"{100 * share:.1f} %", f"{score.svm:.2f} %", f"{score.neighbour:.2f} %"]
            rows.append([label, str(d), *cells, f"{score.cost:g}{'' if score.converged else ' *'}"])
    unfinished = not all(score.converged for each in found for score in each.scores)
    star = "; *: its solver was stopped before the end" if unfinished else ""
    show(console, f"Top-1 accuracy on {study.title} by principal components{star}", header, rows, paths)
