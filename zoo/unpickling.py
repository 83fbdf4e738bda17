"""Reads the tensors of a checkpoint that somebody else has pickled, without executing what is pickled beside them."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import InputError, reason

__all__ = ["read_tensors"]

_FLAG = "--execute-code-in-checkpoint"
_DAMAGED = "damaged, or not a checkpoint of PyTorch"
_INSIDE = ("state_dict", "model")


def read_tensors(path: Path, *, execute_code: bool = False) -> dict[str, Tensor]:
    """Returns the state dict of a file that :func:`torch.save` has written, on the CPU.

    It may be the state dict itself or a module, or a dictionary that holds either as ``state_dict`` or ``model``.

    A pickle is a program, and a pickled module names the code that it needs. So only tensors, numbers, strings and
    containers of these are read (``torch.load(weights_only=True)``); nothing that the file names is imported or called.

    Args:
        path: the file.
        execute_code: whether to read a pickled module, and execute whatever the file says. For files that you made.

    Raises:
        InputError: if the file can't be read, would execute code, or holds no state dict.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the file, or the code that it needs, is of another age
            content = torch.load(file, map_location="cpu", weights_only=not execute_code)
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


def _tensors(content: Any) -> dict[str, Tensor]:
    for _ in range(3):  # not while: a pickle can hold itself
        if isinstance(content, nn.Module):
            content = content.state_dict()
        inside = [key for key in _INSIDE if isinstance(content, Mapping) and key in content]
        if not inside:
            break
        content = content[inside[0]]
    if not isinstance(content, Mapping):
        raise InputError(f"it holds an object of type {type(content).__name__}")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise InputError(f"its entry {key!r:.80} is of type {type(tensor).__name__}, not a tensor with a name")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InputError(f"its entry {key!r:.80} is not a dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # A few bytes could stand for more than memory holds.
            raise InputError(f"its entry {key!r:.80} has more elements than the file has values for it")
    return {key: tensor.detach() for key, tensor in content.items()}
