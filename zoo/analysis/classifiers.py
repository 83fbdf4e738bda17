"""What scikit-learn makes of features: standardised, in principal components, classified by SVM and neighbours."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from zoo.errors import InputError

__all__ = [
    "COSTS",
    "FOLDS",
    "Scores",
    "best_cost",
    "check_folds",
    "class_scores",
    "principal_components",
    "spread_over_classes",
    "standardized",
]

Array = np.ndarray[Any, Any]

COSTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The values of the SVM's C that cross-validation chooses from, ascending."""

FOLDS = 3
"""Of the cross-validation."""

_SUBSET, _OF_EACH = 500, 20
"""It sees so many training images, or so many for each class if that is more: the paper's "small subset"."""


@dataclass(frozen=True)
class Scores:
    """How well two classifiers do that were trained on features.

    Example:
        >>> scores = Scores(svm=97.5, neighbour=95.0, cost=0.01, converged=True)
        >>> scores.svm - scores.neighbour
        2.5
    """

    svm: float
    """Accuracy of the linear SVM, in percent."""
    neighbour: float
    """Accuracy of the nearest neighbour, in percent."""
    cost: float
    """The SVM's C."""
    converged: bool
    """Whether the SVM's solver came to its end."""


def standardized(training: Array, validation: Array) -> tuple[Array, Array]:
    """Both sets of features less the mean of the training images, over their standard deviation, in float32.

    A feature that does not vary is 0.

    Args:
        training: ``(images, features)``; read from its file, if it is mapped, and left as it is.
        validation: likewise.

    Example:
        >>> standardized(np.array([[1.0], [3.0]]), np.array([[4.0]]))[1]
        array([[2.]], dtype=float32)
    """
    x, z = (np.array(each, dtype=np.float32) for each in (training, validation))
    scaler = StandardScaler(copy=False).fit(x)
    return np.asarray(scaler.transform(x)), np.asarray(scaler.transform(z))


def principal_components(x: Array) -> PCA:
    """Fits all principal components that there are: as many as features, or as images if these are fewer."""
    # With fewer features than images their covariance is the smaller matrix.
    return PCA(svd_solver="covariance_eigh" if len(x) > x.shape[1] else "full").fit(x)


def check_folds(labels: Sequence[int] | Array, classes: Sequence[str] | None = None) -> None:
    """Refuses images that cross-validation can't divide.

    Args:
        labels: of the training images.
        classes: their names, for the message.

    Raises:
        InputError: if there are fewer than two classes, or one has fewer images than there are folds.
    """
    found, counts = np.unique(labels, return_counts=True)
    if len(found) < 2:
        raise InputError(f"to tell classes apart there must be at least 2, got {len(found)}")
    least = int(counts.argmin())
    if counts[least] < FOLDS:
        name = classes[int(found[least])] if classes is not None else str(found[least])
        rule = f"cross-validation needs at least {FOLDS} training images of each class"
        raise InputError(f"{rule}, got {counts[least]} of class {name}")


def spread_over_classes(labels: Array, count: int, *, seed: int = 0) -> Array:
    """So many numbers of images, ascending, at random: of each class as many as of the others, while it has some.

    Example:
        >>> labels = np.array([0, 0, 0, 0, 1, 2, 2])
        >>> labels[spread_over_classes(labels, 5)]
        array([0, 0, 1, 2, 2])
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        ranks[members] = np.arange(len(members))
    return np.sort(shuffled[np.argsort(ranks[shuffled], kind="stable")[:count]])


def best_cost(x: Array, labels: Array, *, seed: int = 0) -> float:
    """The C of a linear SVM with the best accuracy in cross-validation on a small part of the images.

    It is a power of ten from 1e-5 to 10, of equally good ones the smallest. The part is 500 images, or 20 for each
    class if that is more, spread over the classes; the folds are stratified.

    Source: i-RevNet, section 5.1, which gives neither the values nor the sizes, https://arxiv.org/abs/1802.07088

    Args:
        x: ``(images, features)``, standardised.
        labels: of the images.
        seed: which images, and which folds.

    Raises:
        InputError: if there are fewer than two classes, or one has fewer images than there are folds.

    Example:
        >>> best_cost(np.array([[-1.0], [1.0]] * 5), np.array([0, 1] * 5))  # each is perfect: the smallest
        1e-05
    """
    check_folds(labels)
    count = max(_SUBSET, _OF_EACH * len(np.unique(labels)))
    part = spread_over_classes(labels, count, seed=seed)
    x, labels = x[part], labels[part]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    best, most = COSTS[0], -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it happens where C is too large in any case
        for cost in COSTS:
            mean = float(np.mean(cross_val_score(_svm(cost, seed), x, labels, cv=folds)))
            if mean > most:
                best, most = cost, mean
            if most == 1:  # nothing is better, and a large C is slow
                break
    return best


def class_scores(x: Array, labels: Array, z: Array, truth: Array, *, seed: int = 0) -> Scores:
    """Trains a linear SVM and a nearest neighbour on features, and classifies others.

    Args:
        x: ``(images, features)`` of the training images.
        labels: their classes.
        z: ``(images, features)`` of the validation images.
        truth: their classes.
        seed: of cross-validation and solver.

    Raises:
        InputError: if there are fewer than two classes, or one has too few images for :func:`best_cost`.

    Example:
        >>> x, labels = np.array([[-2.0], [-1.9], [-1.8], [1.8], [1.9], [2.0]]), np.array([0, 0, 0, 1, 1, 1])
        >>> found = class_scores(x, labels, np.array([[-1.0], [1.0]]), np.array([0, 1]))
        >>> found.svm, found.neighbour, found.converged
        (100.0, 100.0, True)
    """
    cost = best_cost(x, labels, seed=seed)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ConvergenceWarning)
        svm = _svm(cost, seed).fit(x, labels)
    # By brute force scikit-learn takes the distances piece by piece, and the memory stays that of the features.
    neighbour = KNeighborsClassifier(1, algorithm="brute").fit(x, labels)
    accuracies = [100 * float(np.mean(each.predict(z) == truth)) for each in (svm, neighbour)]
    return Scores(accuracies[0], accuracies[1], cost, not any(each.category is ConvergenceWarning for each in warned))


def _svm(cost: float, seed: int) -> LinearSVC:
    return LinearSVC(C=cost, dual="auto", random_state=seed)
