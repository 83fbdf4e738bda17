"""When the buffers of the functions inside move: in the direction that is trained, once per step."""

import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ._range import is_unread

__all__ = [
    "buffers_move",
    "buffers_moving",
    "buffers_stay",
    "copy_of",
    "in_training",
    "kept_buffers",
    "on_copies",
    "one_at_a_time",
    "replaced_buffers",
    "said_of_buffers",
    "say_of_buffers",
]


class _Said(threading.local):
    """What a call around has said, in each thread; no context variable, which torch.compile cannot trace."""

    def __init__(self) -> None:
        self.moving: bool | None = None  # nobody has said: then forward moves buffers and inverse doesn't
        self.copies = 0  # how many contexts around have put copies in the place of buffers


_said = _Said()

one_at_a_time = threading.RLock()  # or one thread would take another's copies for the true buffers


def buffers_moving(*, default: bool) -> bool:
    """Whether the functions inside may move their buffers now."""
    return default if _said.moving is None else _said.moving


def said_of_buffers() -> bool | None:
    """What a call around has said, for :func:`say_of_buffers` to say again when a layer is replayed."""
    return _said.moving


def on_copies() -> bool:
    """Whether modules work on copies of their buffers: what these say is not to be remembered elsewhere."""
    return _said.copies > 0


def buffers_move(module: nn.Module, move: bool) -> AbstractContextManager[None]:
    """Says for the calls inside whether buffers move, unless a call around has said so already."""
    return say_of_buffers(move) if in_training(module) and _said.moving is None else nullcontext()


def buffers_stay(module: nn.Module) -> AbstractContextManager[None]:
    """Keeps the buffers in place for the calls inside, whatever a call around has said: they only measure."""
    return say_of_buffers(False) if in_training(module) else nullcontext()


def in_training(module: nn.Module) -> bool:
    """Whether any part is: in ``eval`` no buffer moves."""
    return any(part.training for part in module.modules())


@contextmanager
def say_of_buffers(move: bool | None) -> Generator[None]:
    """Says for the calls inside whether buffers move; ``None`` leaves it to each direction."""
    before = _said.moving
    _said.moving = move
    try:
        yield
    finally:
        _said.moving = before


def copy_of(buffer: Tensor) -> Tensor:
    """A clone; while tensors have no data, that of a count which has some is a count that can be read, too."""
    if is_unread() and type(buffer) is Tensor:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            return buffer.clone()
    return buffer.clone()


@contextmanager
def kept_buffers(module: nn.Module) -> Generator[None]:
    """Lets a module run as usual and leaves its buffers as they were.

    The module works on copies. The true buffers are not touched, not even their version counters, which autograd
    checks if an earlier forward is still to be differentiated.
    """
    with one_at_a_time:
        # Past named_buffers and setattr, which cost more than a small function.
        held = [part._buffers for part in module.modules() if part._buffers]  # pyright: ignore[reportPrivateUsage]
        true = [{key: buffer for key, buffer in buffers.items() if buffer is not None} for buffers in held]
        # As normal tensors: the function may leave inference mode, and could not write to others there.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            copies = {id(buffer): copy_of(buffer) for buffers in true for buffer in buffers.values()}
        try:
            for buffers, kept in zip(held, true, strict=True):
                for key, buffer in kept.items():  # no update(): those of TorchScript are no dictionary
                    buffers[key] = copies[id(buffer)]
            _said.copies += 1
            yield
        finally:
            _said.copies -= 1
            for buffers, kept in zip(held, true, strict=True):
                for key, buffer in kept.items():
                    buffers[key] = buffer


@contextmanager
def replaced_buffers(others: Sequence[tuple[nn.Module, str, Tensor]]) -> Generator[None]:
    """Lets modules work on other tensors in place of their buffers, and puts the true ones back."""
    with one_at_a_time:
        # Past setattr, whose checks cost more than a small function.
        held = [(part._buffers, key, other) for part, key, other in others]  # pyright: ignore[reportPrivateUsage]
        true = [(buffers, key, buffers[key]) for buffers, key, _ in held]
        try:
            for buffers, key, other in held:
                buffers[key] = other
            _said.copies += 1
            yield
        finally:
            _said.copies -= 1
            for buffers, key, buffer in true:
                buffers[key] = buffer
