"""State dicts that fit or are refused whole."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.errors import StateError

__all__ = ["Stateful", "name_of"]

_ABSENT = "no such tensor"


class Stateful(nn.Module):
    """A module whose state dict has a version, and loads whole or not at all.

    Example:
        >>> class Scale(Stateful):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(2))
        >>> Scale().load_state_dict({"factor": torch.ones(3)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        zoo.errors.StateError: Scale: ... 1 of 1 tensors differ, first factor: expected (2,), got (3,).
    """

    _version: int = (
        1  # in state_dict()._metadata; raised when keys change their meaning, with a conversion of older ones
    )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copies tensors of the same names and shapes into the network, as torch does.

        Args:
            state_dict: of a network like this one.
            strict: whether it must have all tensors and no others. Shapes must fit in any case.
            assign: whether its tensors take the places of the network's own.

        Raises:
            StateError: if it is of a newer version, or does not fit; nothing was loaded then. It says how many tensors
                differ, and which is the first.
        """
        _refuse_newer(self, getattr(state_dict, "_metadata", {}).get("", {}))
        # What a hook makes of it nobody knows before. FSDP has some.
        if not any(part._load_state_dict_pre_hooks for part in self.modules()):
            _refuse_others(self, state_dict, strict=strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        metadata = options.get("local_metadata", args[2] if len(args) > 2 else {})
        _refuse_newer(self, metadata)  # as part of another module
        super()._load_from_state_dict(*args, **options)


def _refuse_newer(net: Stateful, metadata: Mapping[str, Any]) -> None:
    version = metadata.get("version")
    if isinstance(version, int) and version > net._version:
        raise StateError(
            f"{name_of(net)}: expected a state dict of version {net._version} or older, got version {version}. "
            "Load it with the version of this library that wrote it, or a newer one."
        )


def _refuse_others(net: Stateful, state: Mapping[str, Any], *, strict: bool) -> None:
    own = {key: _shape(t) for key, t in net.state_dict().items()}
    given = {key: _shape(t) for key, t in state.items()}
    wrong = [
        key
        for key in {**own, **given}
        if (own[key] != given[key] if key in own and key in given else strict and not _made_up_for(key, given))
    ]
    if wrong:
        expected, got = (each.get(wrong[0], _ABSENT) for each in (own, given))
        raise StateError(
            f"{name_of(net)}: the state dict does not fit, {len(wrong)} of {len(own.keys() | given.keys())} tensors "
            f"differ, first {wrong[0]}: expected {expected}, got {got}."
        )


def _made_up_for(key: str, given: Mapping[str, Any]) -> bool:
    """Whether it is what batch norm takes for 0 in state dicts of before torch 0.4.1."""
    return key not in given and key.rpartition(".")[2] == "num_batches_tracked"


def _shape(value: Any) -> object:
    """A single number counts as a scalar, as in torch; what is no tensor fits."""
    if not isinstance(value, Tensor) or nn.parameter.is_lazy(value):
        return None
    return () if tuple(value.shape) == (1,) else tuple(value.shape)


def name_of(net: nn.Module) -> str:
    """Its class's name; FSDP makes a class of its own of it.

    Example:
        >>> name_of(nn.Linear(2, 1))
        'Linear'
    """
    return next(kind.__name__ for kind in type(net).__mro__ if not kind.__name__.startswith("FSDP"))
