"""Training loss and validation of one run or several: Figure 3 of the i-RevNet paper."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from zoo.analysis.figures import keep, show
from zoo.analysis.subject import add_beside, checkpoint_folder, is_pretrained
from zoo.courses import Course, course_of, courses_of
from zoo.errors import InputError, UnsuitedError
from zoo.plots import draw_curves
from zoo.run import Run

__all__ = ["Course", "course_of", "courses_of", "draw_curves"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    add_beside(parser)


def run(given: argparse.Namespace, console: Console) -> None:
    """The command: see ``python -m zoo.analysis curves --help``."""
    folders = [_run_folder(each) for each in (given.checkpoint, *given.beside)]
    courses = courses_of(folders)
    runs = [Run.load(folder / "config.json") for folder in dict.fromkeys(each.resolve() for each in folders)]
    for name, course in courses.items():
        if not course.steps:
            raise InputError(f"no step of the run {name} is in its log yet")
    numbers = {
        "runs": [
            {
                "name": name,
                "model": each.recipe.model,
                "recipe": each.recipe.name,
                "data": each.data or "digits",
                "seed": each.seed,
                **asdict(course),
            }
            for (name, course), each in zip(courses.items(), runs, strict=True)
        ]
    }
    paths = keep(given.output, "curves", draw_curves(courses), numbers)
    header = ["run", "model", "steps", "training loss", "validation loss", "top-1", "best top-1"]
    show(console, "training", header, _rows(courses, [each.recipe.model for each in runs]), paths)


def _run_folder(checkpoint: Path) -> Path:
    """The folder of a training run.

    Raises:
        InputError: if there is none.
        UnsuitedError: if there are weights alone.
    """
    folder = checkpoint_folder(checkpoint)
    if is_pretrained(folder) and not (folder / "metrics.jsonl").exists():
        raise UnsuitedError(f"{checkpoint} holds weights and no training run, so that it has no curves")
    return folder


def _rows(courses: Mapping[str, Course], models: Sequence[str]) -> list[list[str]]:
    rows: list[list[str]] = []
    for (name, course), model in zip(courses.items(), models, strict=True):
        row = [name, model, f"{course.steps[-1]:,}", f"{course.loss[-1]:.4f}"]
        if course.validation_steps:
            loss = course.validation_loss[-1]
            accuracies = (course.validation_top1[-1], max(course.validation_top1))
            row += ["-" if loss is None else f"{loss:.4f}", *(f"{each:.2f} %" for each in accuracies)]
        rows.append(row + ["-"] * (7 - len(row)))
    return rows
