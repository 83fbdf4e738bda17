"""What a training run is, and what it keeps in its folder."""

import dataclasses
import json
import types
import typing
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from invertible import Recompute, Reconstruct, Store
from invertible.grid import PRESETS
from zoo.errors import InputError, reason
from zoo.recipes import Recipe

__all__ = ["BACKPROP", "GRIDS", "Run", "load_checkpoint", "readable", "write"]

CHECKPOINT = ("net", "optimizer", "step", "rows", "classes", "images", "sums", "seconds", "drift", "peak")


BACKPROP = {"store": Store(), "recompute": Recompute(), "reconstruct": Reconstruct()}
"""What may be kept for the gradients, by name."""

GRIDS = {"exact": PRESETS["exact"], "exact32": PRESETS["exact32"], "none": None}
"""The grids of :class:`invertible.Grid` that a network's values may be on, by name."""


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides a run's result, and where it runs."""

    recipe: Recipe
    data: str | None
    """A folder with ``train/CLASS/`` and ``val/CLASS/``; ``None`` for the embedded digits."""
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    backprop: str = "reconstruct"
    """What is kept for the gradients: a name in ``BACKPROP``."""
    grid: str = "exact"
    """What the values between the layers are rounded to: a name in ``GRIDS``."""

    def __post_init__(self) -> None:
        if self.backprop not in BACKPROP:
            raise ValueError(f"backprop must be one of {', '.join(BACKPROP)}, got {self.backprop!r}")
        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")

    def save(self, path: Path) -> None:
        """Writes the configuration as JSON, with the data's whole path, so that the run goes on from anywhere."""
        fields = dataclasses.asdict(self)
        fields["data"] = None if self.data is None else str(Path(self.data).resolve())
        write(path, (json.dumps(fields, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: if there is no such file, or it is not a configuration.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            recipe: dict[str, Any] = fields.pop("recipe")
            fields.setdefault("grid", "none")  # there was none when it was written
            recipe.update({key: tuple(value) for key, value in recipe.items() if isinstance(value, list)})
            return _typed(cls(recipe=_typed(Recipe(**recipe)), **fields))
        except FileNotFoundError:
            raise InputError(f"no run in {path.parent}: {path.name} is missing") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {reason(error)}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"cannot read {path}: {error}") from None


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads the checkpoint of a run.

    Raises:
        InputError: if there is none, or it can't be read.
    """
    state: dict[str, Any] = {}
    with readable(folder / "checkpoint.pt") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key: state[key] for key in CHECKPOINT}
    return state


@contextmanager
def readable(path: Path) -> Generator[Path]:
    """Says in one line that a checkpoint can't be used: a damaged file fails in as many ways as there are bytes.

    Raises:
        InputError: if what is done inside fails.
    """
    try:
        yield path
    except FileNotFoundError:
        raise InputError(f"no checkpoint in {path.parent}: {path.name} is missing") from None
    except Exception as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    partial.replace(path)


def _typed(settings: Any) -> Any:
    """Returns a dataclass whose fields have the types that they are declared with."""
    for name, declared in typing.get_type_hints(type(settings)).items():
        allowed = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
        plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
        value = getattr(settings, name)
        if not isinstance(value, (*plain, int) if float in plain else plain):
            raise TypeError(f"{name} is {value!r}")
    return settings
