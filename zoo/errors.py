"""The errors for what a user of a command got wrong, and for a run that went astray."""

import math
from collections.abc import Generator
from contextlib import contextmanager

import torch

from invertible import DriftError, InexactInverseError, StreamRangeError

__all__ = [
    "DivergedError",
    "InputError",
    "StateError",
    "UnsuitedError",
    "WeightsError",
    "diverging",
    "in_memory",
    "reason",
]


class InputError(ValueError):
    """Something that a user gave is wrong; the message is one line that says what. Commands exit with code 2.

    Example:
        >>> from zoo.data import open_data
        >>> open_data("nowhere")
        Traceback (most recent call last):
            ...
        zoo.errors.InputError: no such folder: nowhere
    """


class UnsuitedError(InputError):
    """What is asked for can't be had of a network of this kind, whatever else is given.

    Example:
        >>> from types import SimpleNamespace
        >>> from zoo.analysis import reversible
        >>> reversible(SimpleNamespace(net=nn.Flatten(), model="flatten"))
        Traceback (most recent call last):
            ...
        zoo.errors.UnsuitedError: flatten has no inverse; this analysis is of i-RevNets and invertible U-Nets
    """


class WeightsError(InputError):
    """Weights cannot be had, are not what they should be, or do not fit the network. Nothing was loaded.

    Example:
        >>> import zoo
        >>> zoo.create("resnet50", weights="imagenet")
        Traceback (most recent call last):
            ...
        zoo.errors.WeightsError: zoo.create: resnet50 has no weights 'imagenet'; it has none.
    """


class StateError(WeightsError, RuntimeError):
    """A state dict does not fit the network, and nothing was loaded. Torch's own would be a ``RuntimeError``.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1, 1))
        >>> state = net.state_dict() | {"head.4.bias": torch.zeros(3)}
        >>> net.load_state_dict(state)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        zoo.errors.StateError: IRevNet: ... 1 of 56 tensors differ, first head.4.bias: expected (2,), got (3,).
    """


class DivergedError(InputError):
    """The loss is no longer finite, values have become too large, or the gradients are wrong.

    Example:
        >>> import zoo
        >>> net = zoo.create("irevnet_small", num_classes=2, blocks=(1, 1, 1))
        >>> net.grid = "exact"
        >>> with diverging("at step 7", otherwise=""):
        ...     net(torch.full((2, 3, 16, 16), 1e30))
        Traceback (most recent call last):
            ...
        zoo.errors.DivergedError: the activations reach 1e+30 at step 7, and the grid ends at 8192; try a lower --lr
    """


def reason(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind if it has none.

    Example:
        >>> reason(FileNotFoundError(2, "No such file or directory", "x.tar")), reason(KeyError())
        ('No such file or directory', 'KeyError')
    """
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def diverging(at: str, *, otherwise: str = ", or --grid none") -> Generator[None]:
    """Says in one line what has become of the network, where, and what to try.

    Args:
        at: where.
        otherwise: what may be tried besides a lower rate where values leave the grid; empty for nothing.

    Raises:
        DivergedError: if a value leaves the grid, or a reconstruction is off.

    Example:
        >>> with diverging("at step 7"):
        ...     raise DriftError
        Traceback (most recent call last):
            ...
        zoo.errors.DivergedError: the activations are not finite at step 7; try a lower --lr
    """
    try:
        yield
    except StreamRangeError as error:
        if not math.isfinite(error.peak):
            raise DivergedError(f"the activations are not finite {at}; try a lower --lr") from None
        beyond = f"the activations reach {error.peak:.0e} {at}, and the grid ends at {error.limit:g}"
        raise DivergedError(f"{beyond}; try a lower --lr{otherwise}") from None
    except DriftError as error:
        if not math.isfinite(error.drift):
            raise DivergedError(f"the activations are not finite {at}; try a lower --lr") from None
        off = "no longer exact" if isinstance(error, InexactInverseError) else f"off by {error.drift:.0e}"
        wrong = f"the reconstruction is {off} {at}, so that the gradients are wrong"
        raise DivergedError(f"{wrong}; go on with --backprop recompute") from None


_NO_MEMORY = ("can't allocate memory", "bad_alloc", "could not create a primitive")
"""What torch, C++ and oneDNN say where the CPU's memory does not suffice; that of an accelerator has a class."""


@contextmanager
def in_memory() -> Generator[None]:
    """Says in one line that the memory does not suffice, of a device or of the CPU.

    Raises:
        InputError: if it doesn't.

    Example:
        >>> with in_memory():
        ...     raise MemoryError("no 3 TiB")
        Traceback (most recent call last):
            ...
        zoo.errors.InputError: the memory does not suffice: no 3 TiB
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise InputError(f"the memory does not suffice: {reason(error)}") from None
