"""Decodes image files to RGB, whichever way they are stored."""

import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zoo.errors import InputError, reason

__all__ = ["DECODER", "decode_image"]

_START = 65_536  # bytes of a JPEG in which its EXIF data stands, if it has any


def _fast_decoder() -> Callable[..., Any] | None:
    """torchcodec's, where it is installed and can load its library."""
    if os.environ.get("ZOO_DECODER") == "pillow":
        return None
    try:
        from torchcodec.decoders import decode_image as decode  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]
    except (ImportError, OSError, RuntimeError):
        return None
    return decode


_fast: Callable[..., Any] | None = _fast_decoder()

DECODER = "pillow" if _fast is None else "torchcodec"
"""The package that decodes JPEG files."""


def decode_image(content: bytes, name: str) -> Tensor:
    """Decodes an image file to RGB, ``(3, height, width)``, uint8; its strides are those of channels last.

    Greyscale, CMYK and palette images are converted, transparency is dropped, 16 bits per value are scaled to 8. What
    the file is decides, not its name. EXIF orientation is not applied: pixels are taken as they are stored, as
    torchvision's ImageFolder does. JPEG files are decoded by torchcodec where it is installed (the environment variable
    ``ZOO_DECODER=pillow`` forbids it), all others by Pillow; the results are the same to the bit.

    Args:
        content: of the file.
        name: for the message.

    Raises:
        InputError: if it is not a whole image.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("L", (4, 2), 128).save(file, "png")
        >>> image = decode_image(file.getvalue(), "grey.png")
        >>> image.shape, image[:, 0, 0]
        (torch.Size([3, 2, 4]), tensor([128, 128, 128], dtype=torch.uint8))
    """
    if _fast is not None and content[:3] == b"\xff\xd8\xff" and b"Exif\0" not in content[:_START]:
        try:
            return _fast(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode="RGB")
        except (RuntimeError, ValueError) as error:
            raise InputError(f"cannot read the image {name}: {reason(error)}") from None
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = _rgb(image)  # decodes it all, so that a truncated file is found here
    except UnidentifiedImageError:
        raise InputError(f"cannot read the image {name}: not an image file") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers fail in any way on what is no whole image
        raise InputError(f"cannot read the image {name}: {reason(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Image.Image) -> "np.ndarray[Any, Any]":
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers, of no known range")
    if image.mode.startswith("I"):  # 16 bits per pixel, which "convert" would clip, not scale
        grey = (np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P":
        image.load()
        image.info.pop("transparency", None)  # it is dropped in any case, and Pillow would warn
    return np.array(image.convert("RGB"))
