"""What the analyses by depth have in common: which classes and images, networks beside each other, results kept."""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zoo._writing import whole
from zoo.analysis.classifiers import spread_over_classes
from zoo.analysis.depth import DepthPass, Features, check_disk
from zoo.analysis.figures import progress_bar
from zoo.analysis.subject import Subject, add_beside, images_of, open_subject
from zoo.arguments import positive, workers
from zoo.configuring import default_workers
from zoo.data import Data
from zoo.errors import InputError, UnsuitedError, reason
from zoo.plots import new_figure
from zoo.registry import config_of

__all__ = ["CLASSES", "Chosen", "Kept", "Study", "choose", "open_study"]

CLASSES = 100
"""So many classes are drawn where the data has more, as in the paper."""


@dataclass(frozen=True)
class Chosen:
    """Classes, and which images of them.

    Example:
        >>> from types import SimpleNamespace
        >>> images = SimpleNamespace(labels=np.array([0, 0, 1, 1]))
        >>> data = SimpleNamespace(classes=["a", "b"], training=images, validation=images)
        >>> choose(data, images=2)  # one of each class
        Chosen(classes=(0, 1), training=(0, 2), validation=(0, 1, 2, 3))
    """

    classes: tuple[int, ...]
    training: tuple[int, ...]
    """Numbers of training images, ascending."""
    validation: tuple[int, ...]
    """Numbers of validation images: all of these classes."""


def choose(data: Data, *, classes: int | None = None, images: int | None = None, seed: int = 0) -> Chosen:
    """Draws classes, and of each as many training images as of the others, while it has some.

    Source: i-RevNet, section 5.1: 100 classes of ImageNet, the same in all experiments,
    https://arxiv.org/abs/1802.07088

    Args:
        data: as :func:`zoo.data.open_data` opens it.
        classes: how many; ``None``: all up to 100, and 100 of more.
        images: how many training images; ``None``: all.
        seed: of what is drawn.

    Raises:
        InputError: if there are fewer than two classes, or fewer classes or images than asked for.

    Example:
        >>> from types import SimpleNamespace
        >>> images = SimpleNamespace(labels=np.array([0, 0, 1, 1]))
        >>> choose(SimpleNamespace(classes=["a", "b"], training=images, validation=images), images=2).classes
        (0, 1)
    """
    total = len(data.classes)
    if total < 2:
        raise InputError(f"to tell classes apart there must be at least 2, the data has {total}")
    count = min(total, CLASSES) if classes is None else classes
    if not 2 <= count <= total:
        raise InputError(f"the number of classes must be in 2 ... {total}, as the data has them, got {count}")
    drawn = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    training, validation = (np.flatnonzero(np.isin(each.labels, drawn)) for each in (data.training, data.validation))
    if images is not None:
        if images > len(training):
            raise InputError(f"these {count} classes have {len(training)} training images, got --images {images}")
        training = training[spread_over_classes(data.training.labels[training], images, seed=seed)]
    return Chosen(*(tuple(each.tolist()) for each in (drawn, training, validation)))


class Kept:
    """Results in a file, each written as soon as it is there, so that work that was interrupted goes on.

    Args:
        training: what they are of.
        validation: the same.
        about: all else that they depend on, and the name of the analysis.
        folder: for the file; ``None``: nothing is kept.
    """

    def __init__(self, training: Features, validation: Features, about: dict[str, Any], folder: Path | None) -> None:
        self._path: Path | None = None
        self._found: dict[str, Any] = {}
        if folder is not None:
            versions = {"sklearn": sklearn.__version__, "numpy": np.__version__}
            what = json.dumps([training.key, validation.key, about, versions], sort_keys=True)
            self._path = folder / f"{about['analysis']}-{hashlib.sha256(what.encode()).hexdigest()[:20]}.json"
            try:
                self._found = dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self._found = {}

    def get(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found for the key, or is found now.

        Raises:
            InputError: if it can't be written.
        """
        if key not in self._found:
            self._found[key] = compute()
            if self._path is not None:
                try:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    with whole(self._path) as partial:  # another process may write the same
                        partial.write_text(json.dumps(self._found), encoding="utf-8")
                except OSError as error:
                    raise InputError(f"cannot write {self._path}: {reason(error)}") from None
        return self._found[key]


@dataclass(frozen=True)
class Study:
    """Networks beside each other, and the images that they are compared on."""

    subjects: list[Subject]
    data: Data
    name: str
    """Of the data."""
    chosen: Chosen
    passes: list[tuple[DepthPass, DepthPass]]
    """Of each network, with the training and with the validation images."""
    results: Path
    """The folder for :class:`Kept`."""

    @property
    def labels(self) -> list[str]:
        """A name of each network; with its folder, where two are of one model."""
        models = [each.model for each in self.subjects]
        return [
            each.model if models.count(each.model) == 1 else f"{each.model}, {each.checkpoint}"
            for each in self.subjects
        ]

    def features(self, workers: int) -> list[tuple[Features, Features]]:
        """Those of the training and of the validation images, of each network."""
        found: list[tuple[Features, Features]] = []
        for label, (training, validation) in zip(self.labels, self.passes, strict=True):
            with progress_bar(f"features of {label}") as bar:
                first, both = len(training.indices), len(training.indices) + len(validation.indices)
                a = training.run(workers=workers, progress=lambda done, _, b=bar, n=both: b(done, n))
                b = validation.run(workers=workers, progress=lambda done, _, b=bar, m=first, n=both: b(m + done, n))
            found.append((a, b))
        return found

    @property
    def title(self) -> str:
        """Which images, in words."""
        return f"{len(self.chosen.validation)} validation images of {len(self.chosen.classes)} classes"

    def numbers(self, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is written of these results, one for each network, with what they are of."""
        networks: list[dict[str, Any]] = []
        for subject, (depth, _), each in zip(self.subjects, self.passes, found, strict=True):
            about = {"model": subject.model, "checkpoint": str(subject.checkpoint), "names": depth.names}
            size = {"widths": depth.widths, "image_size": subject.recipe.evaluation_size}
            networks.append({**about, **size, **each})
        return {
            "classes": [self.data.classes[i] for i in self.chosen.classes],
            "training_images": len(self.chosen.training),
            "validation_images": len(self.chosen.validation),
            "networks": networks,
        }


def open_study(given: argparse.Namespace) -> Study:
    """Opens networks and data, chooses images, and refuses what does not fit, before any work begins.

    Raises:
        InputError: if a network, the data or the choice is wrong, or the features do not fit on the disk.
    """
    subjects = [open_subject(each, device=given.device, size=given.size) for each in (given.checkpoint, *given.beside)]
    data, name = images_of(given.data)
    chosen = choose(data, classes=given.classes, images=given.images, seed=given.seed)
    folder = given.output / "features"
    passes: list[tuple[DepthPass, DepthPass]] = []
    for subject in subjects:
        if config_of(subject.net).options.get("num_classes") == 0:
            raise UnsuitedError(f"{subject.model} in {subject.checkpoint} has no classifier; this analysis needs one")
        first = DepthPass(subject, data.training, chosen.training, folder)
        if first.classes != len(data.classes):
            has = f"{subject.model} in {subject.checkpoint} tells {first.classes} classes apart"
            raise InputError(f"{has}, and the data has {len(data.classes)}")
        passes.append((first, DepthPass(subject, data.validation, chosen.validation, folder)))
    check_disk(folder, [each for both in passes for each in both])
    return Study(subjects, data, name, chosen, passes, given.output / "features" / "results")


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the commands by depth."""
    add_beside(parser)
    parser.add_argument(
        "--classes",
        type=positive,
        metavar="N",
        help=f"drawn by the seed (default: all up to {CLASSES}, {CLASSES} of more)",
    )
    parser.add_argument(
        "--images", type=positive, metavar="N", help="training images, spread over the classes (default: all)"
    )
    parser.add_argument(
        "--workers",
        type=workers,
        metavar="N",
        default=default_workers(),
        help="processes that read images (default: one per core but one, to 8)",
    )


def new_panels(titles: Sequence[str], *, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, up to three in a row, whose vertical axes are the same."""
    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    figure = new_figure(max(4.2 * columns, 5), height * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten().tolist()
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    for i, (axes, title) in enumerate(zip(panels, titles, strict=False)):
        axes.set_title(title if len(titles) == 1 else f"({chr(ord('a') + i)}) {title}", fontsize=10)
        axes.grid(alpha=0.3)
    return figure, panels[: len(titles)]
