"""Reads the tensors of a checkpoint that somebody else has pickled, without executing what is pickled beside them."""

import io
import itertools
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from zoo.errors import InputError, reason

__all__ = ["read_tensors"]

_FLAG = "--execute-code-in-checkpoint"
_DAMAGED = "damaged, or not a checkpoint of PyTorch"
_INSIDE = ("state_dict", "model")
_ZIP = b"PK\x03\x04"
_LEGACY = 5
"""So many pickles are in a file of PyTorch before 1.6, ahead of the tensors' values."""
_MOST_OPERATIONS = 2_000_000  # a checkpoint of irevnet_b with its optimizer has less than a tenth
_MOST_NESTED, _MOST_IN_TUPLE = 50, 10_000


def read_tensors(path: Path, *, execute_code: bool = False) -> dict[str, Tensor]:
    """Returns the state dict of a file that :func:`torch.save` has written, on the CPU.

    It may be the state dict itself or a module, or a dictionary that holds either as ``state_dict`` or ``model``.

    A pickle is a program, and a pickled module names the code that it needs. So only tensors, numbers, strings and
    containers of these are read (``torch.load(weights_only=True)``); nothing that the file names is imported or called.
    Of what makes a small file need much memory, or crashes Python, the known ways are refused; a file of somebody you
    don't trust is best read in a process with a limit of its memory.

    Args:
        path: the file.
        execute_code: whether to read a pickled module, and execute whatever the file says. For files that you made.

    Raises:
        InputError: if the file can't be read, would execute code, or holds no state dict.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 5, "state_dict": {"w": torch.ones(2)}}, path := Path(folder) / "net.pth")
        ...     read_tensors(path)
        {'w': tensor([1., 1.])}
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the file, or the code that it needs, is of another age
            if not execute_code:
                _refuse_bombs(file)
            content = torch.load(file, map_location="cpu", weights_only=not execute_code)
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except Exception as error:  # noqa: BLE001  a damaged file fails in as many ways as there are bytes
        raise InputError(f"cannot read {path}: {_problem(error, execute_code)}") from None
    try:
        return _tensors(content)
    except InputError as error:
        raise InputError(f"no state dict in {path}: {error}") from None


def _problem(error: Exception, execute_code: bool) -> str:
    if execute_code and isinstance(error, (ImportError, AttributeError)):
        return f"{reason(error)}; the folder of the code that it needs must be on PYTHONPATH"
    named = re.search(r"GLOBAL ([a-zA-Z_][\w.]{,79})", str(error))
    if not execute_code and (named or (isinstance(error, RuntimeError) and "weights_only" in str(error))):
        code = f"code ({named[1]})" if named else "code"
        return f"reading it would execute {code}, which may do anything; if you trust whoever made it, add {_FLAG}"
    if isinstance(error, pickle.UnpicklingError):
        return _DAMAGED  # what torch says is advice for its own callers
    return f"{_DAMAGED} ({reason(error)})"


def _refuse_bombs(file: IO[bytes]) -> None:
    """Refuses what needs much more memory than the file has bytes, or would crash Python; leaves the file at its start.

    Raises:
        InputError: if there is such a thing. What is damaged is left to torch, which reads no further than this.
    """
    if file.read(len(_ZIP)) == _ZIP:
        size = file.seek(0, 2)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(each.filename.endswith("/constants.pkl") for each in records):
                raise RuntimeError("TorchScript, which torch.load(weights_only=True) does not read")
            if any(each.compress_type != zipfile.ZIP_STORED for each in records):
                raise InputError("its records are compressed, and PyTorch writes none that are")
            if sum(each.file_size for each in records) > size:
                raise InputError("its records are larger than the file")
            for each in records:
                if each.filename.endswith("data.pkl"):
                    _refuse_nesting(io.BytesIO(archive.read(each)))
    else:
        file.seek(0)
        for _ in range(_LEGACY):
            if not _refuse_nesting(file):
                break
    file.seek(0)


def _refuse_nesting(pickled: IO[bytes]) -> bool:
    """Follows a pickle without making what it says: of each value how deep its tuples are, and how large without memo.

    A key is hashed with all that is in it, by as many calls inside of each other as it is deep.

    Returns:
        Whether it has come to its end, where torch.load comes to one, too.
    """
    leaf = (0, 1)
    stack, marks, memo = list[tuple[int, int]](), list[int](), dict[Any, tuple[int, int]]()
    operations = pickletools.genops(pickled)
    for count in itertools.count():
        try:
            code, argument, _ = next(operations)
            before = code.stack_before
            marked = pickletools.markobject in before
            parts = stack[marks.pop() :] if marked else stack[len(stack) - len(before) :]
            if code.name == "MARK":
                marks.append(len(stack))
            elif code.name.endswith("PUT"):
                memo[argument] = stack[-1]
            elif code.name.endswith("GET"):
                stack.append(memo[argument])
            else:
                count_before = len(parts) + (before.index(pickletools.markobject) if marked else 0)
                del stack[len(stack) - count_before :]
                made = leaf
                if "TUPLE" in code.name:
                    made = 1 + max((d for d, _ in parts), default=0), 1 + sum(size for _, size in parts)
                stack += [made] * len(code.stack_after)
        except StopIteration:
            return True
        except Exception:  # noqa: BLE001  damaged: torch says so, too
            return False
        if code.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise InputError("it makes a bytearray, which may be as large as memory")
        if count > _MOST_OPERATIONS:
            raise InputError(f"its pickle has more than {_MOST_OPERATIONS:,} operations")
        if stack and (stack[-1][0] > _MOST_NESTED or stack[-1][1] > _MOST_IN_TUPLE):
            raise InputError("it has tuples that are nested too deep")
    return True


def _tensors(content: Any) -> dict[str, Tensor]:
    for _ in range(3):  # not while: a pickle can hold itself
        if isinstance(content, nn.Module):
            content = content.state_dict()
        inside = [key for key in _INSIDE if isinstance(content, dict) and key in content]
        if not inside:
            break
        content = content[inside[0]]
    if not isinstance(content, dict):
        raise InputError(f"it holds an object of type {type(content).__name__}")
    found = dict[str, Tensor]()
    for key, tensor in dict.items(content):  # methods of the types: a pickle may give an object others of its own
        if not isinstance(key, str) or type(tensor) not in {Tensor, nn.Parameter}:
            raise InputError(f"its entry {key!r:.80} is of type {type(tensor).__name__}, not a tensor with a name")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise InputError(f"its entry {key!r:.80} is not a dense tensor")
        if Tensor.numel(tensor) * Tensor.element_size(tensor) > Tensor.untyped_storage(tensor).nbytes():
            # A few bytes could stand for more than memory holds.
            raise InputError(f"its entry {key!r:.80} has more elements than the file has values for it")
        found[key] = Tensor.detach(tensor)
    return found
