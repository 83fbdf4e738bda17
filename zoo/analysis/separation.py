"""How well the classes can be told apart after every block: Figure 6 of the i-RevNet paper."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from zoo.analysis.classifiers import COSTS, FOLDS, Scores, check_folds, class_scores, standardized
from zoo.analysis.depth import Features
from zoo.analysis.figures import keep, progress_bar, show
from zoo.analysis.study import Kept, add_study_arguments, new_panels, open_study

__all__ = ["Separation", "draw_separation", "separation_by_depth"]


@dataclass(frozen=True)
class Separation:
    """Accuracies on the validation images, in percent.

    Example:
        >>> scores = Scores(svm=97.5, neighbour=95.0, cost=0.01, converged=False)
        >>> Separation(blocks=(scores, scores), network=99.0).unfinished
        [1, 2]
    """

    blocks: tuple[Scores, ...]
    """After each block, of classifiers that were trained on its features."""
    network: float
    """The network's own, among all classes that it knows."""

    @property
    def unfinished(self) -> list[int]:
        """The numbers, from 1 on, of the blocks at which the SVM's solver did not come to its end."""
        return [i + 1 for i, each in enumerate(self.blocks) if not each.converged]


def separation_by_depth(
    training: Features,
    validation: Features,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Separation:
    r"""Trains a linear SVM and a nearest neighbour on the features after every block, and tests them.

    Features are averaged over space and standardised by the training images. The protocol is the same after each
    block: C by cross-validation on a small part of the training images, see :func:`best_cost`, then both classifiers on
    all of them. The nearest neighbour gives an image the class of the training image at the least distance
    :math:`\lVert \Phi_j x - \Phi_j x' \rVert`.

    Source: i-RevNet, section 5.1 and Figure 6, https://arxiv.org/abs/1802.07088

    Args:
        training: see :func:`features_by_depth`.
        validation: likewise, of other images.
        seed: of cross-validation and solver.
        folder: where results are kept, so that work that was interrupted goes on.
        progress: is told how many blocks are done, and of how many.

    Raises:
        InputError: if there are fewer than two classes, or one has too few images for cross-validation.

    Example:
        >>> from types import SimpleNamespace
        >>> x, labels = np.array([[-2.0], [-1.9], [-1.8], [1.8], [1.9], [2.0]]), np.array([0, 0, 0, 1, 1, 1])
        >>> features = SimpleNamespace(names=("0",), labels=labels, predictions=labels, block=lambda _: x)
        >>> found = separation_by_depth(features, features)  # in place of two results of features_by_depth
        >>> found.blocks[0].svm, found.blocks[0].neighbour, found.network
        (100.0, 100.0, 100.0)
    """
    check_folds(training.labels)
    about = {"analysis": "separation", "seed": seed, "costs": COSTS, "folds": FOLDS}
    kept = Kept(training, validation, about, folder)

    def scores(block: int) -> Scores:
        x, z = standardized(training.block(block), validation.block(block))
        return class_scores(x, training.labels, z, validation.labels, seed=seed)

    found: list[Scores] = []
    for i, name in enumerate(training.names):
        found.append(Scores(**kept.get(name, lambda i=i: asdict(scores(i)))))
        if progress:
            progress(i + 1, len(training.names))
    return Separation(tuple(found), accuracy_of(validation))


def accuracy_of(features: Features) -> float:
    """The network's own on these images, in percent."""
    return 100 * float(np.mean(features.predictions == features.labels))


def draw_separation(found: Sequence[Separation], titles: Sequence[str]) -> Figure:
    """Figure 6: accuracy over depth, a panel for each network.

    Example:
        >>> scores = Scores(svm=97.5, neighbour=95.0, cost=0.01, converged=True)
        >>> figure = draw_separation([Separation(blocks=(scores, scores), network=99.0)], ["i-RevNet"])
        >>> figure.axes[0].get_title()
        'i-RevNet'
    """
    figure, panels = new_panels(titles)
    for axes, each in zip(panels, found, strict=True):
        depth = range(1, len(each.blocks) + 1)
        axes.plot(depth, [score.svm for score in each.blocks], "-", marker="o", markersize=4, label="linear SVM")
        near = [score.neighbour for score in each.blocks]
        axes.plot(depth, near, "--", marker="s", markersize=4, markerfacecolor="white", label="nearest neighbour")
        axes.axhline(each.network, color="black", linewidth=1, linestyle=":", label="the network itself")
        axes.set(xlabel="block", ylabel="top-1 accuracy, validation (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    add_study_arguments(parser)


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis separation --help``."""
    study = open_study(given)
    check_folds(study.data.training.labels[list(study.chosen.training)], study.data.classes)
    found: list[Separation] = []
    for label, (training, validation) in zip(study.labels, study.features(given.workers), strict=True):
        with progress_bar(f"classifiers of {label}") as bar:
            options = {"seed": given.seed, "folder": study.results, "progress": bar}
            found.append(separation_by_depth(training, validation, **options))
    numbers = study.numbers([asdict(each) for each in found])
    figure = draw_separation(found, study.labels)
    paths = keep(
        given.output, "separation", figure, numbers, subject=study.subjects[0], data=study.name, seed=given.seed
    )
    header = ["network", "block", "features", "linear SVM", "nearest neighbour", "C"]
    rows: list[list[str]] = []
    for label, each, (depth, _) in zip(study.labels, found, study.passes, strict=True):
        for i, score in enumerate(each.blocks):
            cells = [
                f"{score.svm:.2f} %",
                f"{score.neighbour:.2f} %",
                f"{score.cost:g}{'' if score.converged else ' *'}",
            ]
            rows.append([label, str(i + 1), str(depth.widths[i]), *cells])
        rows.append([label, "itself", "", f"{each.network:.2f} %", "", ""])
    star = "; *: its solver was stopped before the end" if any(each.unfinished for each in found) else ""
    show(console, f"Top-1 accuracy on {study.title} by depth{star}", header, rows, paths)
