"""What a training run is: its recipe, data, seed, and where and how it runs."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invertible import Budget, Recompute, Reconstruct, Store
from invertible.backprop import Strategy
from invertible.grid import PRESETS
from zoo.checkpoints import write
from zoo.distributed import PARALLEL
from zoo.errors import InputError, reason
from zoo.recipes import Recipe

__all__ = ["AUTOCAST", "BACKPROP", "GRIDS", "Run", "differences"]

BACKPROP = {"store": Store(), "recompute": Recompute(), "reconstruct": Reconstruct()}
"""What may be kept for the gradients, by name."""

GRIDS = {"exact": PRESETS["exact"], "exact32": PRESETS["exact32"], "none": None}
"""The grids of :class:`invertible.Grid` that a network's values may be on, by name."""

AUTOCAST = ("none", "bf16")
"""What matrix products and convolutions may be computed in, by name."""

_COLOURS = ("none", "inception", "jitter")

_FREE = (
    "data",
    "device",
    "workers",
    "save_every",
    "keep",
    "keep_every",
    "tensorboard",
    "max_bad",
    "skip_bad",
    "max_skipped",
    "budget",
)
"""What a run may change when it goes on: where it runs and what it writes, not what it computes."""


_SAME = ("recipe", "backprop", "budget", "source", "top1")
"""What changes no bit, on a grid, or is no setting."""


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides a run's result, and where it runs.

    Example:
        >>> import tempfile
        >>> from zoo.recipes import RECIPES
        >>> run = Run(RECIPES["digits"], seed=7)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run.save(path := Path(folder) / "config.json")
        ...     again = Run.load(path)
        >>> again.seed, again.recipe.lr, again.kept
        (7, 0.1, 'reconstruct')
    """

    recipe: Recipe
    data: str | None = None
    """A folder, see :func:`zoo.data.open_data`; ``None`` for the embedded digits."""
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    """Processes that read images, for each process that trains."""
    world_size: int = 1
    """Processes that train."""
    parallel: str = "ddp"
    """How they share the network: a name in ``PARALLEL``."""
    accumulate: int = 1
    """Parts that each process computes its share of a batch in, one after another."""
    compile: bool = False
    """Whether the functions of the network are compiled."""
    deterministic: bool = False
    """Whether only algorithms are used that give the same bits each time, on a GPU too."""
    budget: int | None = None
    """Bytes of activations, instead of the recipe's ``backprop``: see :class:`invertible.Budget`."""
    max_bad: float = 0.001
    """The share of the training images that may be unreadable before the run is ended."""
    skip_bad: bool = False
    """Whether validation leaves out and counts images that can't be read, instead of ending."""
    max_skipped: int = 10
    """So many steps in a row may be skipped for a loss that is not finite."""
    save_every: int | None = None
    """Steps from one checkpoint to the next, besides the one at each epoch's end."""
    keep: int = 3
    """So many of the newest checkpoints stay."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides stay, too."""
    tensorboard: bool = False
    """Whether the log is written for TensorBoard, too."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("backprop", self.recipe.backprop, BACKPROP),
            ("grid", self.recipe.grid, GRIDS),
            ("autocast", self.recipe.autocast, AUTOCAST),
            ("colour", self.recipe.colour, _COLOURS),
            ("parallel", self.parallel, PARALLEL),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def strategy(self) -> Strategy:
        """What the network keeps for its gradients. Several processes judge a wrong reconstruction together."""
        together = Reconstruct(on_drift="record") if self.world_size > 1 else None
        if self.budget is not None:
            return Budget(self.budget, together or Reconstruct())
        kept = BACKPROP[self.recipe.backprop]
        return together if together is not None and isinstance(kept, Reconstruct) else kept

    @property
    def kept(self) -> str:
        """What the network keeps, by its name."""
        return "budget" if self.budget is not None else self.recipe.backprop

    def save(self, path: Path, environment: Mapping[str, Any] | None = None) -> None:
        """Writes the configuration as JSON, with the data's whole path, so that the run goes on from anywhere.

        What it runs with, see :func:`zoo.environment.environment`, stands there for the reader.
        """
        fields = dataclasses.asdict(self) | {"environment": environment or {}}
        fields["data"] = None if self.data is None else str(Path(self.data).resolve())
        write(path, (json.dumps(fields, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: if there is no such file, or it is not a configuration.
        """
        try:
            fields = _tuples(json.loads(path.read_text(encoding="utf-8")))
            recipe: dict[str, Any] = fields.pop("recipe")
            fields.pop("environment", None)
            return _typed(cls(recipe=_typed(Recipe(**recipe)), **fields))
        except FileNotFoundError:
            raise InputError(f"no run in {path.parent}: {path.name} is missing") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {reason(error)}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"cannot read {path}: {error}") from None


def differences(old: Run, new: Run) -> list[str]:
    """In which settings that decide the result two runs differ: ``name: old, now new``.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> run = Run(RECIPES["digits"])
        >>> differences(run, dataclasses.replace(run, seed=1, workers=3))
        ['seed: 0, now 1']
    """
    found: list[str] = []
    for a, b in ((old.recipe, new.recipe), (old, new)):
        for field in dataclasses.fields(a):
            before, after = getattr(a, field.name), getattr(b, field.name)
            if before != after and field.name not in (*_FREE, *_SAME):
                found.append(f"{field.name}: {before}, now {after}")
    return found


def _tuples(value: Any) -> Any:
    """JSON has lists only."""
    if isinstance(value, list):
        return tuple(_tuples(each) for each in value)
    return {key: _tuples(each) for key, each in value.items()} if isinstance(value, dict) else value


def _typed(settings: Any) -> Any:
    """Returns a dataclass whose fields have the types that they are declared with."""
    for name, declared in typing.get_type_hints(type(settings)).items():
        allowed = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
        plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
        value = getattr(settings, name)
        fits = isinstance(value, (*plain, int) if float in plain else plain)
        if not fits or (isinstance(value, bool) and bool not in plain and Mapping not in plain):
            raise TypeError(f"{name} is {value!r}")
    return settings
