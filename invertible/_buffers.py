"""When the buffers of the functions inside move: in the direction that is trained, once per step."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

__all__ = ["buffers_move", "buffers_moving", "buffers_stay", "kept_buffers"]

# None: nobody has said. Then forward moves buffers and inverse doesn't.
_moving: ContextVar[bool | None] = ContextVar("invertible_buffers_moving", default=None)


def buffers_moving(*, default: bool) -> bool:
    """Whether the functions inside may move their buffers now."""
    moving = _moving.get()
    return default if moving is None else moving


@contextmanager
def buffers_move(move: bool) -> Generator[None]:
    """Says for the calls inside whether buffers move, unless a call around has said so already."""
    token = _moving.set(move) if _moving.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _moving.reset(token)


@contextmanager
def buffers_stay() -> Generator[None]:
    """Keeps the buffers in place for the calls inside, whatever a call around has said: they only measure."""
    token = _moving.set(False)
    try:
        yield
    finally:
        _moving.reset(token)


@contextmanager
def kept_buffers(module: nn.Module) -> Generator[None]:
    """Lets a module run as usual and leaves its buffers as they were.

    The module works on copies. The true buffers are not touched, not even their version counters, which autograd
    checks if an earlier forward is still to be differentiated.
    """
    true = [
        (part, key, buffer)
        for part in module.modules()
        for key, buffer in part.named_buffers(recurse=False, remove_duplicate=False)
    ]
    copies: dict[int, Tensor] = {id(buffer): buffer.clone() for _, _, buffer in true}
    try:
        for part, key, buffer in true:
            setattr(part, key, copies[id(buffer)])
        yield
    finally:
        for part, key, buffer in true:
            setattr(part, key, buffer)
