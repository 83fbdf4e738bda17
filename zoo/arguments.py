"""What the commands take as arguments: types for ``argparse``, which refuse by one clear line."""

import argparse
import math
from typing import Any

__all__ = ["byte_count", "count", "number", "positive", "rate", "share", "workers"]


def number(text: str, kind: type, low: float, high: float, rule: str) -> Any:
    """Parses a number in a range, or says the rule that it breaks.

    Args:
        text: of the number.
        kind: ``int`` or ``float``.
        low: the least that is allowed.
        high: the most.
        rule: what it must be, for the message.

    Raises:
        argparse.ArgumentTypeError: if it is none, or out of the range.

    Example:
        >>> number("7", int, 1, 9, "a digit from 1 to 9")
        7
        >>> number("0", int, 1, 9, "a digit from 1 to 9")
        Traceback (most recent call last):
            ...
        argparse.ArgumentTypeError: must be a digit from 1 to 9, got 0
    """
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
    return value


def positive(text: str) -> int:
    """A whole number from 1 on.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--images", type=positive)
        >>> parser.parse_args(["--images", "16"]).images
        16
    """
    return number(text, int, 1, 2**63 - 1, "a whole number from 1 on")


def count(text: str) -> int:
    """A whole number from 0 on.

    Example:
        >>> count("0")
        0
    """
    return number(text, int, 0, 2**63 - 1, "a whole number from 0 on, below 2**63")


def workers(text: str) -> int:
    """A number of processes.

    Example:
        >>> workers("4")
        4
    """
    return number(text, int, 0, 1024, "a whole number from 0 to 1024")


def rate(text: str) -> float:
    """A positive number, such as a learning rate.

    Example:
        >>> rate("1e-3")
        0.001
    """
    return number(text, float, 1e-38, 1e38, "a positive number")


def share(text: str) -> float:
    """A number between 0 and 1.

    Example:
        >>> share("0.25")
        0.25
    """
    return number(text, float, 0, 1, "a number between 0 and 1")


def byte_count(text: str) -> int:
    """A number of bytes, or with K, M, G or T behind it: of kibibytes, and so on.

    Example:
        >>> byte_count("1.5G"), byte_count("4096")
        (1610612736, 4096)
    """
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1:].upper(), 1)
    rule = "a number of bytes such as 20G"
    try:
        return round(number(text if unit == 1 else text[:-1], float, 1 / unit, 2**62 / unit, rule) * unit)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}") from None
