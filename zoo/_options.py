"""What networks check of their options."""

import operator
from collections.abc import Iterable
from typing import Any


def check_number(who: str, option: str, value: Any, *, least: int | None = None) -> None:
    """Refuses what is no integer, and what is too small."""
    if not _is_integer(value):
        raise TypeError(f"{who}: {option} must be an integer, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"{who}: {option} must be at least {least}, got {value}.")


def check_blocks(who: str, blocks: Any) -> None:
    """Refuses what is not a number of blocks for each stage, of at least one stage."""
    rule = "blocks must be numbers of at least 1, one for each {}"
    word = "level" if who == "IUNet" else "stage"
    if not isinstance(blocks, Iterable) or not all(_is_integer(each) for each in blocks):
        raise TypeError(f"{who}: {rule.format(word)}, got {blocks!r}.")
    counts = tuple(blocks)
    if not counts or min(counts) < 1:
        raise ValueError(f"{who}: {rule.format(word)}, got {counts}.")


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)
