"""Models by name."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["create", "names", "register"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


def register(builder: Builder) -> Builder:
    """Makes a builder known by its function's name.

    Raises:
        ValueError: if the name is taken.
    """
    name = builder.__name__
    if name in _builders:
        raise ValueError(f"zoo.register: the name {name!r} is taken.")
    _builders[name] = builder
    return builder


def names() -> list[str]:
    """Returns the names of all models, sorted."""
    return sorted(_builders)


def create(name: str, **options: Any) -> nn.Module:
    """Builds a model by its name.

    Args:
        name: one of :func:`names`.
        options: those of the builder, such as ``num_classes``.

    Raises:
        ValueError: if there is no such model, or it has no such option.

    Example:
        >>> net = create("irevnet_small", num_classes=7)
        >>> net.head[-1].out_features
        7
    """
    if name not in _builders:
        raise ValueError(f"zoo.create: unknown model {name!r}; there are {', '.join(names())}.")
    builder = _builders[name]
    known = inspect.signature(builder).parameters
    if unknown := options.keys() - known:
        raise ValueError(f"zoo.create: {name} has no option {sorted(unknown)[0]!r}; it has {', '.join(known)}.")
    return builder(**options)
