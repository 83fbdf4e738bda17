"""From what somebody asks for to a run: recipe, folder, and whether it goes on with what is there."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoints import CHECKPOINTS, any_left
from zoo.distributed import World
from zoo.errors import InputError
from zoo.recipes import RECIPES, Recipe
from zoo.run import Run, differences
from zoo.schedule import scaled

__all__ = ["default_device", "default_workers", "fresh", "prepared", "recipe_of"]

_RECIPE = ("model", "lr", "backprop", "grid", "autocast", "channels_last", "log_every")
_RUN = (
    "data", "seed", "device", "workers", "parallel", "accumulate", "compile", "deterministic", "budget", "max_bad",
    "skip_bad", "max_skipped", "save_every", "keep", "keep_every", "tensorboard",
)  # fmt: skip
_FREE = {"data", "device", "workers", "backprop", "budget", "max_bad", "skip_bad", "max_skipped", "save_every", "keep"}
_FREE |= {"keep_every", "tensorboard", "evaluate", "resume", "allow_change", "dry_run"}


def _silent(_: str) -> None:
    """Says nothing."""


def recipe_of(given: Mapping[str, Any], say: Callable[[str], None] = _silent) -> Recipe:
    """The recipe that is asked for, with what is changed of it.

    Another ``batch_size`` brings another learning rate by the linear rule, unless ``lr`` is given, too; this is said.

    Raises:
        InputError: if there is no such recipe.

    Example:
        >>> recipe = recipe_of({"recipe": "digits", "batch_size": 32}, say=print)
        batch size 64 to 32: learning rate 0.1 to 0.05, by the linear rule
        >>> recipe.lr, recipe.batch_size
        (0.05, 32)
    """
    name = given.get("recipe", "paper_irevnet_b" if "data" in given else "digits")
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return _changed(RECIPES[name], given, say)


def _changed(recipe: Recipe, given: Mapping[str, Any], say: Callable[[str], None]) -> Recipe:
    """The recipe with what is asked for."""
    if given.get("batch_size", recipe.batch_size) != recipe.batch_size:
        before, recipe = recipe, scaled(recipe, given["batch_size"])
        changes = [f"learning rate {before.lr:g} to {given.get('lr', recipe.lr):g}"]
        if recipe.iterations and "epochs" not in given:
            changes.append(f"steps {before.iterations:,} to {recipe.iterations:,}")
        if recipe.warmup_epochs != before.warmup_epochs:
            changes.append(f"a warm-up of {recipe.warmup_epochs:g} epochs")
        rule = "as given" if "lr" in given else "by the linear rule"
        say(f"batch size {before.batch_size} to {recipe.batch_size}: {', '.join(changes)}, {rule}")
    if "epochs" in given:
        recipe = dataclasses.replace(recipe, epochs=given["epochs"], iterations=None)
    if "size" in given:
        resize = round(recipe.resize * given["size"] / recipe.evaluation_size)
        recipe = dataclasses.replace(recipe, size=given["size"], test_size=None, resize=resize)
    if given.get("model", recipe.model) != recipe.model:
        recipe = dataclasses.replace(recipe, model_options={}, top1="not run")
    return dataclasses.replace(recipe, **{key: given[key] for key in _RECIPE if key in given})


def prepared(given: Mapping[str, Any], world: World, say: Callable[[str], None] = _silent) -> tuple[Run, Path]:
    """The run that is asked for, and its folder, the same in all processes.

    ``resume`` may be a folder, whose run then goes on; ``"never"`` begins anew; ``"auto"``, the default, goes on with
    the run in ``output``, if there is one, or with the last one of this recipe, model, seed and configuration that is
    not finished.

    Raises:
        InputError: if the folder holds a run that was configured otherwise, unless ``allow_change`` is given.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run, path = prepared({"recipe": "digits", "seed": 1, "output": f"{folder}/mine"}, World())
        >>> run.recipe.name, run.seed, path.name
        ('digits', 1, 'mine')
    """
    resume = given.get("resume", "auto")
    if resume not in {"auto", "never"}:
        return _gone_on(Path(resume), given, world, say), Path(resume)
    recipe = recipe_of(given, say)
    settings = {key: given[key] for key in _RUN if key in given}
    settings.setdefault("device", default_device())
    settings.setdefault("workers", default_workers())
    run = Run(recipe, world_size=world.size, **settings)
    if "output" in given:
        folder = Path(given["output"])
        if _refuse_other(run, folder, anew=resume == "never", allow=given.get("allow_change", False)):
            old = Run.load(folder / "config.json")
            if given.get("recipe", old.recipe.name) == old.recipe.name:  # of another recipe all is taken
                run = _with_changes(old, given, world)
            say(f"going on with another configuration: {'; '.join(differences(old, run)) or 'none that matters'}")
        return run, folder
    base = Path("runs") / f"{recipe.name}-{recipe.model}-seed{run.seed}"
    unfinished = None if resume == "never" else _unfinished(base, run)
    return run, Path(world.first(unfinished or fresh(base)))


def default_device() -> str:
    """A GPU if there is one.

    Example:
        >>> default_device() in ("cuda", "cpu")
        True
    """
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_workers() -> int:
    """Processes that read images: one per core but one, up to 8, shared by the processes that train here.

    Example:
        >>> 0 <= default_workers() <= 8
        True
    """
    return min(8, max(_cores() // _processes_here() - 1, 0))


def fresh(folder: Path) -> Path:
    """The folder, or with a number behind it if there is one already.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / "run").mkdir()
        ...     fresh(Path(folder) / "run").name
        'run-2'
    """
    return next(path for path in _numbered(folder) if not path.exists())


def _numbered(folder: Path) -> Any:
    return (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in range(1, sys.maxsize))


def _cores() -> int:
    """Those that this process may run on: a scheduler gives a job a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _gone_on(folder: Path, given: Mapping[str, Any], world: World, say: Callable[[str], None]) -> Run:
    """The run in a folder, with what may be changed of it, or is allowed to be."""
    old = Run.load(folder / "config.json")
    useless = [key for key in ("recipe", "output") if key in given]
    if useless:
        raise InputError(f"--resume DIR has its own {useless[0]}; drop --{useless[0]}")
    allowed = given.get("allow_change", False)
    refused = sorted(given.keys() - _FREE)
    if refused and not allowed:
        option = "--" + refused[0].replace("_", "-")
        raise InputError(f"--resume goes on with the run as it was configured; drop {option}, or add --allow-change")
    if world.size != old.world_size and not allowed and not given.get("evaluate"):
        raise InputError(
            f"{folder} was trained by {_processes(old.world_size)}, and now there is {_processes(world.size)}: the "
            "bits will be others; --allow-change goes on"
        )
    return _with_changes(old, given, world, say)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _refuse_other(run: Run, folder: Path, *, anew: bool, allow: bool) -> bool:
    """Whether the folder holds a run of another configuration, which is to go on all the same."""
    known = (folder / "config.json").exists()
    if anew and (known or any_left(folder / CHECKPOINTS)):
        raise InputError(f"{folder} holds a run already; go on with it without --resume never, or choose another one")
    if not known:
        return False
    changed = differences(Run.load(folder / "config.json"), run)
    if changed and not allow:
        raise InputError(
            f"{folder} holds a run of another configuration ({'; '.join(changed)}); choose another --output, or add "
            "--allow-change to go on with it"
        )
    return bool(changed)


def _with_changes(old: Run, given: Mapping[str, Any], world: World, say: Callable[[str], None] = _silent) -> Run:
    """The run as it was, with what is asked for."""
    settings = {key: given[key] for key in _RUN if key in given}
    return dataclasses.replace(old, recipe=_changed(old.recipe, given, say), world_size=world.size, **settings)


def _unfinished(base: Path, run: Run) -> Path | None:
    """The last of the numbered folders, if it holds this run and more is to be done."""
    last = None
    for folder in _numbered(base):
        if not folder.exists():
            break
        last = folder
    if last is None or not (last / "config.json").exists() or (last / "report.json").exists():
        return None
    try:
        old = Run.load(last / "config.json")
        same_data = old.data == (None if run.data is None else str(Path(run.data).resolve()))
        return last if same_data and not differences(old, run) else None
    except InputError:
        return None
