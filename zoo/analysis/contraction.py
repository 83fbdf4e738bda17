"""How distances within and between the classes change with depth, and how many dimensions the features have."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from rich.console import Console
from sklearn.metrics import pairwise_distances_chunked

from zoo.analysis.classifiers import principal_components, standardized
from zoo.analysis.depth import Features
from zoo.analysis.figures import keep, progress_bar, show
from zoo.analysis.study import Kept, add_study_arguments, open_study
from zoo.errors import InputError
from zoo.plots import new_figure

__all__ = ["Contraction", "class_distances", "contraction_by_depth", "draw_contraction", "effective_dimension"]

Array = np.ndarray[Any, Any]

SHARE = 0.9
"""Of the variance, which a number of components carries."""


@dataclass(frozen=True)
class Contraction:
    """Distances and dimension of the features after one block.

    Example:
        >>> found = Contraction(within=2.0, between=4.0, dimension=1.5, components=2, features=8)
        >>> found.ratio
        0.5
    """

    within: float
    """The mean distance of two validation images of one class."""
    between: float
    """That of two of different classes."""
    dimension: float
    """The participation ratio of the training images' covariance."""
    components: int
    """The fewest principal components with 90 % of the training images' variance."""
    features: int
    """How many there are."""

    @property
    def ratio(self) -> float | None:
        """The distance within the classes over the one between them; ``None`` if all features are the same."""
        return self.within / self.between if self.between else None


def class_distances(x: Array, labels: Array) -> tuple[float, float]:
    r"""The mean Euclidean distance over all pairs of images of one class, and over all pairs of two classes.

    .. math::
        \frac{1}{|P|} \sum_{(i, j) \in P} \lVert x_i - x_j \rVert, \qquad
        P = \{i < j : c_i = c_j\} \quad\text{or}\quad \{i < j : c_i \ne c_j\}

    Args:
        x: ``(images, features)``.
        labels: the class c of each image.

    Raises:
        InputError: if there are not two classes, or no class has two images.

    Example:
        >>> class_distances(np.array([[0.0], [1.0], [5.0]]), np.array([0, 0, 1]))
        (1.0, 4.5)
    """
    check_pairs(labels)
    within = total = 0.0
    first = 0
    for rows in pairwise_distances_chunked(x):
        same = labels[first : first + len(rows), None] == labels[None]
        total += float(rows.sum(dtype=np.float64))
        within += float(rows.sum(where=same, dtype=np.float64))
        first += len(rows)
    counts = np.unique(labels, return_counts=True)[1]
    pairs, alike = len(labels) * (len(labels) - 1), int((counts * (counts - 1)).sum())
    return within / alike, (total - within) / (pairs - alike)


def check_pairs(labels: Array) -> None:
    """Refuses images among which there is no pair within a class, or none between two.

    Raises:
        InputError: if there are not two classes, or no class has two images.
    """
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.max() < 2:
        rule = "distances within and between classes need two classes and two validation images of one"
        raise InputError(f"{rule}, got {len(labels)} of {len(counts)}")


def effective_dimension(x: Array) -> tuple[float, int]:
    r"""The participation ratio of the covariance's eigenvalues, and how many of the largest make 90 % of their sum.

    .. math::
        \frac{\left(\sum_i \lambda_i\right)^2}{\sum_i \lambda_i^2}

    The first is d for d equal eigenvalues and zeros, whatever the scale. Both are 0 if nothing varies.

    Source: Gao et al., 2017, https://doi.org/10.1101/214262, for the participation ratio

    Args:
        x: ``(images, features)``.

    Example:
        >>> ratio, components = effective_dimension(np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
        >>> round(ratio, 6), components
        (2.0, 2)
    """
    if not np.ptp(x, axis=0).any():  # principal components of nothing are a division by zero
        return 0.0, 0
    values = np.maximum(principal_components(x).explained_variance_.astype(np.float64), 0)
    shares = np.cumsum(values) / values.sum()
    return float(values.sum() ** 2 / np.square(values).sum()), int(np.argmax(shares >= SHARE - 1e-9)) + 1


def contraction_by_depth(
    training: Features,
    validation: Features,
    *,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Contraction, ...]:
    """Measures distances and dimension after every block.

    Features are averaged over space and standardised by the training images: two of these have, whatever the block, a
    mean squared distance of about twice the number of features. Distances are those of the validation images, which the
    network was not trained on. The dimension is that of the training images, for there are more of them.

    Source: the words are those of i-RevNet, section 5.1, https://arxiv.org/abs/1802.07088, which shows contraction by
    the nearest neighbour alone, "as measured in Oyallon (2017)"; the measures are ours.

    Args:
        training: see :func:`features_by_depth`.
        validation: likewise, of other images.
        folder: where results are kept, so that work that was interrupted goes on.
        progress: is told how many blocks are done, and of how many.

    Raises:
        InputError: if there are not two classes, or no class has two validation images.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> x, labels = np.array([[0.0, 0.0], [0.0, 2.0], [9.0, 0.0], [9.0, 2.0]]), np.array([0, 0, 1, 1])
        >>> with TemporaryDirectory() as folder:  # by hand what features_by_depth computes
        ...     np.save(Path(folder) / "block_001.npy", x)
        ...     features = Features(Path(folder), ("body.2",), (2,), labels, labels)
        ...     [found] = contraction_by_depth(features, features)
        >>> round(found.within, 3), round(found.between, 3), round(found.dimension, 3), found.components
        (2.0, 2.414, 2.0, 2)
    """
    check_pairs(validation.labels)
    kept = Kept(training, validation, {"analysis": "contraction", "share": SHARE}, folder)

    def measured(block: int) -> Contraction:
        x, z = standardized(training.block(block), validation.block(block))
        return Contraction(*class_distances(z, validation.labels), *effective_dimension(x), x.shape[1])

    found: list[Contraction] = []
    for i, name in enumerate(training.names):
        found.append(Contraction(**kept.get(name, lambda i=i: asdict(measured(i)))))
        if progress:
            progress(i + 1, len(training.names))
    return tuple(found)


def draw_contraction(found: Sequence[Sequence[Contraction]], titles: Sequence[str]) -> Figure:
    """Distances, their ratio, and the dimension over depth; a colour and a marker for each network.

    Distances are over √(2 · features), about the root mean square of those of two training images.

    Args:
        found: of each network, after every block.
        titles: the networks' names.

    Example:
        >>> blocks = [Contraction(2.0, 3.0, 6.0, 7, 8), Contraction(1.0, 3.0, 2.0, 3, 8)]
        >>> [axes.get_ylabel() for axes in draw_contraction([blocks], ["a network"]).axes]
        ['mean distance / √(2 · features)', 'distance within / between classes', 'dimension']
    """
    figure = new_figure(11, 3.6)
    distances, ratios, dimensions = figure.subplots(1, 3)
    for i, (title, blocks) in enumerate(zip(titles, found, strict=True)):
        depth = range(1, len(blocks) + 1)
        style: dict[str, Any] = {"color": f"C{i % 10}", "marker": "osD^v<>P*X"[i % 10], "markersize": 4}
        hollow = {**style, "markerfacecolor": "white"}
        units = [(2 * each.features) ** 0.5 for each in blocks]
        for name, kind in (("within", style), ("between", hollow)):
            values = [getattr(each, name) / unit for each, unit in zip(blocks, units, strict=True)]
            distances.plot(depth, values, "-" if name == "within" else "--", **kind, label=f"{title}, {name}")
        ratios.plot(depth, [each.ratio for each in blocks], "-", **style, label=title)
        dimensions.plot(depth, [each.dimension for each in blocks], "-", **style, label=f"{title}, participation")
        counts = [each.components for each in blocks]
        dimensions.plot(depth, counts, "--", **hollow, label=f"{title}, 90 % of variance")
    distances.set(ylabel="mean distance / √(2 · features)", ylim=(0, None))
    ratios.set(ylabel="distance within / between classes", ylim=(0, 1.05))
    dimensions.set(ylabel="dimension", yscale="log")
    dimensions.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    dimensions.yaxis.set_major_formatter(ScalarFormatter())
    dimensions.yaxis.set_minor_formatter(NullFormatter())
    for axes in (distances, ratios, dimensions):
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    add_study_arguments(parser)


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis contraction --help``."""
    study = open_study(given)
    check_pairs(study.data.validation.labels[list(study.chosen.validation)])
    found: list[tuple[Contraction, ...]] = []
    for label, (training, validation) in zip(study.labels, study.features(given.workers), strict=True):
        with progress_bar(f"distances of {label}") as bar:
            found.append(contraction_by_depth(training, validation, folder=study.results, progress=bar))
    numbers = study.numbers([{"blocks": [asdict(each) | {"ratio": each.ratio} for each in blocks]} for blocks in found])
    figure = draw_contraction(found, study.labels)
    paths = keep(
        given.output, "contraction", figure, numbers, subject=study.subjects[0], data=study.name, seed=given.seed
    )
    header = ["network", "block", "features", "within", "between", "ratio", "dimension", "90 % of the variance in"]
    rows: list[list[str]] = []
    for label, blocks in zip(study.labels, found, strict=True):
        for i, each in enumerate(blocks):
            ratio = "-" if each.ratio is None else f"{each.ratio:.3f}"
            cells = [f"{each.within:.2f}", f"{each.between:.2f}", ratio, f"{each.dimension:.1f}", str(each.components)]
            rows.append([label, str(i + 1), str(each.features), *cells])
    show(console, f"Distances on {study.title}, and dimension, by depth", header, rows, paths)
