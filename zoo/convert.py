"""``python -m zoo.convert`` brings the weights that were released in 2018 into a safe format, and back."""

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from invertible import PixelUnshuffle, Split
from zoo._writing import whole
from zoo.errors import InputError, reason
from zoo.irevnet import IRevNet
from zoo.unpickling import read_tensors

__all__ = ["build", "convert_released", "convert_to_released", "from_released", "load_converted", "to_released"]

_B = {"blocks": (6, 16, 72, 6), "channels": (24, 96, 384, 1536), "strides": (2, 2, 2, 2)}
_COUNT = "num_batches_tracked"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build(*, blocks: Sequence[int], channels: Sequence[int], strides: Sequence[int], num_classes: int) -> IRevNet:
    """Builds the network of the released code: bijective, with 3 by 3 kernels.

    With the sizes of (b) it is ``irevnet_b(kernel_sizes=(3, 3, 3))``, except that the head's batch norm has the
    momentum 0.9, which matters in training alone.

    Source: https://github.com/jhjacobsen/pytorch-i-revnet, models/iRevNet.py. Two deviations: it has a dropout in each
    block; and it averages over 7 by 7 values at the end, which are all of an image of 224 by 224 pixels, where this
    averages over all of any image.

    Args:
        blocks: the number of blocks of each stage.
        channels: the channels of a stream, for each stage.
        strides: 1 or 2 for each stage.
        num_classes: of the head.

    Example:
        >>> net = build(blocks=(1, 2), channels=(24, 96), strides=(2, 2), num_classes=10)
        >>> net(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    net = IRevNet(
        [PixelUnshuffle(2, order="pixel_major"), Split()],
        12,
        blocks=blocks,
        channels=channels,
        strides=strides,
        num_classes=num_classes,
        kernel_sizes=(3, 3, 3),
        size_divisor=2 * math.prod(strides),
    )
    norm = net.head[0]
    if isinstance(norm, nn.BatchNorm2d):
        norm.momentum = 0.9
    return net


def from_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translates a state dict of the released code.

    Blocks, channels and strides are read off the shapes. Counts of batches, which older versions of PyTorch did not
    keep, become 0.

    Args:
        state: with the keys ``stack.{i}.bottleneck_block.{j}.*``, ``bn1.*`` and ``linear.*``, or these after
            ``module.``

    Returns:
        The options of :func:`build`, and the state dict of the network that it builds. The tensors are those of
        ``state``.

    Raises:
        InputError: if it is not of a network that :func:`build` builds; the message names the key.

    Example:
        >>> net = build(blocks=(1,), channels=(24,), strides=(2,), num_classes=10)
        >>> options, _ = from_released(to_released(net.state_dict()))
        >>> options
        {'blocks': (1,), 'channels': (24,), 'strides': (2,), 'num_classes': 10}
    """
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return _read(state, _released_key)


def to_released(net_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates the state dict of a network of :func:`build` to the keys of the released code.

    Raises:
        InputError: if it is not of such a network; the message names the key.

    Example:
        >>> net = build(blocks=(1,), channels=(24,), strides=(2,), num_classes=10)
        >>> state = to_released(net.state_dict())
        >>> next(iter(state)), state["linear.weight"].shape
        ('stack.0.bottleneck_block.0.weight', torch.Size([10, 48]))
    """
    _, own = _read(net_state, str)
    return {_released_key(key): tensor for key, tensor in own.items()}


def load_converted(path: Path) -> IRevNet:
    """Builds the network of a file that ``python -m zoo.convert released`` wrote, with its weights in their dtype.

    Raises:
        InputError: if it can't be read, or is of another network.

    Example:
        >>> import tempfile
        >>> net = build(blocks=(1,), channels=(24,), strides=(2,), num_classes=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(net.state_dict(), path := Path(folder) / "model.safetensors")
        ...     load_converted(path)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    options, state = _of(path, _read, _load(path), str)
    with torch.device("meta"):
        net = build(**options)
    net.load_state_dict(state, assign=True)
    return net


def convert_released(checkpoint: Path, out: Path, *, execute_code: bool = False) -> str:
    """Writes the weights of a released checkpoint as a safetensors file, whole or not at all.

    Its metadata are ``format``, ``model``, ``options`` as JSON and ``source``. The same checkpoint gives the same
    bytes.

    Args:
        checkpoint: see :func:`zoo.unpickling.read_tensors`.
        out: the file to write; it must not be there.
        execute_code: whether to execute code in the checkpoint.

    Returns:
        The SHA-256 of the file.

    Raises:
        InputError: if the checkpoint can't be read or is of another network, or the file can't be written.

    Example:
        >>> import tempfile
        >>> net = build(blocks=(1,), channels=(24,), strides=(2,), num_classes=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": to_released(net.state_dict())}, path := Path(folder) / "model.pth")
        ...     digest = convert_released(path, Path(folder) / "model.safetensors")
        ...     again = load_converted(Path(folder) / "model.safetensors")
        >>> len(digest), torch.equal(again.head[4].bias, net.head[4].bias)
        (64, True)
    """
    _check_new(out)
    options, state = _of(checkpoint, from_released, read_tensors(checkpoint, execute_code=execute_code))
    model = "irevnet"  # what build() builds; there is no such name in the registry
    if _B.items() <= options.items():
        model, options = "irevnet_b", {"num_classes": options["num_classes"], "kernel_sizes": (3, 3, 3)}
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    source = f"https://github.com/jhjacobsen/pytorch-i-revnet, a checkpoint with the SHA-256 {digest}"
    metadata = {"format": "pt", "model": model, "options": json.dumps(options), "source": source}

    def write(path: Path) -> None:
        save_file(_copied(state), path, metadata)
        _sort_metadata(path)

    return _write_new(out, write)


def convert_to_released(weights: Path, out: Path) -> str:
    """Writes the weights of a safetensors file as a state dict of the released code, whole or not at all.

    Args:
        weights: of a network of :func:`build`.
        out: the file to write, for :func:`torch.load`; it must not be there.

    Returns:
        The SHA-256 of the file.

    Raises:
        InputError: if the weights can't be read or are of another network, or the file can't be written.

    Example:
        >>> import tempfile
        >>> net = build(blocks=(1,), channels=(24,), strides=(2,), num_classes=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(net.state_dict(), path := Path(folder) / "model.safetensors")
        ...     digest = convert_to_released(path, Path(folder) / "model.pth")
        ...     torch.load(Path(folder) / "model.pth", weights_only=True)["linear.bias"].shape
        torch.Size([10])
    """
    _check_new(out)
    state = _of(weights, to_released, _load(weights))

    def write(path: Path) -> None:
        with path.open("wb") as file:  # or the file's name would be in it
            torch.save(_copied(state), file)

    return _write_new(out, write)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m zoo.convert", description="Convert weights.")
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser(
        "released",
        help="the i-RevNet that was released in 2018, to safetensors",
        description="Converts a checkpoint of github.com/jhjacobsen/pytorch-i-revnet to safetensors.",
    )
    command.add_argument("source", type=Path, metavar="CHECKPOINT", help="what the released code saved")
    command.add_argument("out", type=Path, metavar="OUT.safetensors", help="the file to write; must not be there")
    command.add_argument(
        "--execute-code-in-checkpoint",
        action="store_true",
        help="read a pickled module, and execute whatever code the checkpoint has; only for files that you trust",
    )
    command = commands.add_parser(
        "to-released",
        help="back to the released code's keys",
        description="Converts a safetensors file to a state dict of github.com/jhjacobsen/pytorch-i-revnet.",
    )
    command.add_argument("source", type=Path, metavar="IN.safetensors", help="what the other command wrote")
    command.add_argument("out", type=Path, metavar="OUT.pth", help="the file to write; must not be there")
    given = parser.parse_args(arguments)
    try:
        if given.command == "released":
            digest = convert_released(given.source, given.out, execute_code=given.execute_code_in_checkpoint)
        else:
            digest = convert_to_released(given.source, given.out)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing written", file=sys.stderr)
        return 130
    print(f"{given.out} written, sha256 {digest}")
    return 0


def _released_key(key: str) -> str:
    """The released code's name for a key of ours; it has a dropout before the third batch norm of a block."""
    place = key.split(".")
    if place[0] == "head":
        return f"{'bn1' if place[1] == '0' else 'linear'}.{place[2]}"
    block, layer = int(place[1]) - 2, int(place[3])  # after PixelUnshuffle and Split
    layer += layer >= (6 if block else 4)
    return f"stack.{block}.bottleneck_block.{layer}.{place[4]}"


def _read(state: Mapping[str, Tensor], name: Callable[[str], str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options of :func:`build` and the state dict with our keys; ``name`` gives a key's name in ``state``."""
    options = _layout(state, name)
    try:
        with torch.device("meta"):
            expected = build(**options).state_dict()
    except (RuntimeError, OverflowError) as error:  # sizes that no file has
        raise InputError(f"the shapes are of no network that can be built ({reason(error)})") from None
    device = state[name("head.4.weight")].device
    unknown = state.keys() - {name(key) for key in expected}
    if unknown:
        raise InputError(f"the released layout has no key {min(unknown)!r:.80}")
    own: dict[str, Tensor] = {}
    for key, like in expected.items():
        counts = key.endswith(_COUNT)
        tensor = state.get(name(key), torch.zeros_like(like, device=device) if counts else None)
        if tensor is None:
            raise InputError(f"the key {name(key)!r} is missing")
        if tensor.shape != like.shape:
            raise InputError(f"{name(key)} must have the shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != like.dtype if counts else tensor.dtype not in _FLOATS:
            kind = str(like.dtype) if counts else "float16, bfloat16, float32 or float64"
            raise InputError(f"{name(key)} must have {kind}, got {tensor.dtype}")
        own[key] = tensor
    return options, own


def _layout(state: Mapping[str, Tensor], name: Callable[[str], str]) -> dict[str, Any]:
    """Reads blocks, channels, strides and classes off the shapes; all other shapes follow from these.

    What is empty is refused, for its shape may be of a network that is larger than any file.
    """

    def shape(key: str, dimensions: int) -> torch.Size:
        if name(key) not in state:
            raise InputError(f"the key {name(key)!r} is missing")
        found = state[name(key)].shape
        if len(found) != dimensions:
            raise InputError(f"{name(key)} must have {dimensions} dimensions, got the shape {tuple(found)}")
        if 0 in found:
            raise InputError(f"{name(key)} must not be empty, got the shape {tuple(found)}")
        return found

    blocks, channels, width = list[int](), list[int](), 6
    for block in itertools.count():
        first, last = (f"body.{block + 2}.function.{layer + 2 * bool(block)}.weight" for layer in (0, 6))
        if block and name(first) not in state:
            break
        reads, gives = shape(first, 4)[1], shape(last, 4)[0]
        if reads != width:
            raise InputError(
                f"block {block} must read {width} channels, got {reads}; networks that pad can't be converted"
            )
        if gives == 4 * width:
            blocks.append(1)
            channels.append(gives)
        elif not block:
            # Of stride 1 and 6 channels, it may also be the first of a network that pads the image to 12 channels.
            raise InputError(f"the first block must have stride 2 and give 24 channels, got {gives}")
        elif gives == width:
            blocks[-1] += 1
        else:
            raise InputError(f"block {block} must give {width} channels, or {4 * width} with stride 2, got {gives}")
        width = gives
    classes = shape("head.4.weight", 2)[0]
    strides = (2,) * len(blocks)
    return {"blocks": tuple(blocks), "channels": tuple(channels), "strides": strides, "num_classes": classes}


def _of(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Names the file that an error is about."""
    try:
        return function(*arguments)
    except InputError as error:
        raise InputError(f"cannot convert {path}: {error}") from None


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb"):  # the errors of safetensors say less
            return load_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"cannot read {path}: not a safetensors file ({reason(error)})") from None


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no storage, which safetensors would refuse."""
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}


def _check_new(path: Path) -> None:
    """Before anything is read, which may take long."""
    try:
        taken, placed = path.exists() or path.is_symlink(), path.parent.is_dir()
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from None
    if taken:
        raise InputError(f"{path} is there already; remove it, or take another name")
    if not placed:
        raise InputError(f"no such folder: {path.parent}")


def _write_new(path: Path, write: Callable[[Path], None]) -> str:
    """Writes a file whole or not at all, never over another one, and returns its SHA-256."""
    try:
        with whole(path, replace=False) as partial:
            write(partial)
            with partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # the last two if the disk is full
        raise InputError(f"cannot write {path}: {reason(error)}") from None
    return digest


def _sort_metadata(path: Path) -> None:
    """Gives the header one order, for safetensors writes the metadata in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


if __name__ == "__main__":
    sys.exit(main())
