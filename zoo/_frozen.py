"""What is written down once, and must not change afterwards."""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex, TypeVar

__all__ = ["Frozen", "frozen"]

Key = TypeVar("Key")
Item = TypeVar("Item", covariant=True)


class Frozen(Mapping[Key, Item]):
    """A dictionary without a way to change it, equal to one with the same entries.

    It is hashable if its values are, and unlike ``types.MappingProxyType`` it can be copied and pickled.

    Example:
        >>> options = Frozen({"blocks": (1, 2)})
        >>> options == {"blocks": (1, 2)}, options
        (True, {'blocks': (1, 2)})
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[Key, Item]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, key: Key) -> Item:
        return self._entries[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return repr(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._entries,)


def frozen(value: Any) -> Any:
    """Returns a value with its lists as tuples and its dictionaries as :class:`Frozen`, to any depth.

    Integers of NumPy and of torch, such as ``labels.max() + 1``, become Python's, which JSON knows.
    """
    if isinstance(value, list | tuple | range):
        return tuple(frozen(each) for each in value)
    if isinstance(value, Mapping):
        return Frozen({key: frozen(each) for key, each in value.items()})
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return value
    try:
        return operator.index(value)
    except TypeError:  # a tensor of several values, or of another kind
        return value
