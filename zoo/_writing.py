"""Files that are written whole or not at all."""

import errno
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["whole"]

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without hard links say."""


@contextmanager
def whole(path: Path, *, replace: bool = True) -> Generator[Path]:
    """Yields another name in the same folder, to write to; what is there in the end is brought to the disk and renamed.

    If anything goes wrong, nothing is left, and ``path`` is as it was. The file has the mode that ``open`` gives.

    Args:
        path: the file.
        replace: whether it may be there already.

    Raises:
        OSError: if it can't be written, or is there and may not be.
    """
    # Short: path.name may be as long as names can be. Of its own: another process may do the same.
    partial = path.parent / f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that nobody else can read
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            _link(partial, path)
    finally:
        with suppress(OSError):  # or it would hide what has gone wrong
            partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Gives a file a second name, unless somebody else has taken it meanwhile; a dangling link is a name, too."""
    try:
        path.hardlink_to(partial)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists() or path.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        partial.replace(path)
