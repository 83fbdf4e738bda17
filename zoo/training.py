"""Trains a network by a recipe: resumable to the bit, and reported in a folder of its own."""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized

from zoo import checkpoints, plots
from zoo.books import Books
from zoo.building import find_device, make_deterministic
from zoo.checkpoints import CHECKPOINTS, Checkpoint, Keep
from zoo.courses import courses_of
from zoo.data import (
    Batch,
    Samples,
    StepSampler,
    evaluation_transform,
    loader,
    open_data,
    training_transform,
)
from zoo.data.order import seed_of, steps_in_epoch
from zoo.distributed import World
from zoo.environment import changes, environment
from zoo.errors import InputError
from zoo.evaluation import Evaluation
from zoo.examining import Examiner, read
from zoo.inversion import InversionError
from zoo.learner import Learner
from zoo.progress import Reporter
from zoo.run import Run
from zoo.schedule import learning_rate, steps
from zoo.stopping import FAILED, INTERRUPTED, Interrupted, Stop, Terminated

__all__ = ["REPORT", "Trainer"]

REPORT = "report.json"
"""What is there when all is done, and evaluated."""


class Trainer:
    """A run in its folder: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, then pictures and weights.

    Every step depends on the seed and its number alone, so that a run that was interrupted ends with the same bits as
    one that was not: on the CPU with the same number of threads, on a GPU with deterministic algorithms.

    Args:
        run: the configuration.
        folder: where the run is kept; made if it is not there.
        world: the processes that train together. All call the same methods.

    Raises:
        InputError: if data, device, size or model of the configuration are not to be had.

    Example:
        >>> import dataclasses, tempfile
        >>> from PIL import Image
        >>> from zoo.recipes import RECIPES
        >>> small = {"model_options": {"blocks": (1, 1)}, "batch_size": 2, "iterations": 1}
        >>> recipe = dataclasses.replace(RECIPES["digits"], **small)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png"):
        ...         (path := Path(folder) / name).parent.mkdir(parents=True)
        ...         Image.new("RGB", (32, 32)).save(path)
        ...     trainer = Trainer(Run(recipe, data=folder), Path(folder) / "run")
        ...     trainer.fit(Reporter(None, total=trainer.total))
        ...     trainer.step, trainer.evaluate().images, trainer.net.training
        (1, 2, True)
    """

    def __init__(self, run: Run, folder: Path, *, world: World | None = None) -> None:
        self.run, self.folder, self.world = run, folder, world or World()
        recipe = run.recipe
        self.device = find_device(run.device)
        if self.device.type == "cuda" and self.world.size > 1:
            self.device = torch.device("cuda", self.world.local_rank)
        if run.deterministic:
            make_deterministic()
        with self.world.main_first():  # the digits are written, tars walked through, once
            self.data = open_data(run.data)
        self.training = Samples(self.data.training, training_transform(recipe), seed=run.seed, bad="replace")
        self.validation = Samples(
            self.data.validation, evaluation_transform(recipe), bad="skip" if run.skip_bad else "raise"
        )
        images = len(self.training)
        self.per_epoch = steps_in_epoch(images, recipe.batch_size, world=self.world.size, parts=run.accumulate)
        self.total = steps(recipe, per_epoch=self.per_epoch)
        self.epochs = math.ceil(self.total / self.per_epoch)
        self.learner = Learner(run, len(self.data.classes), self.device, self.world)
        together = recipe.batch_size // (self.world.size * run.accumulate)
        if together == 1 and recipe.size <= getattr(self.net, "total_stride", 0):
            raise InputError(
                f"{recipe.model} needs a batch of two or more at size {recipe.size}: batch norm would see one value"
            )
        self.step = 0
        self.best: float | None = None
        """The best top-1 accuracy so far, of the average of the weights if there is one."""
        self.best_step: int | None = None
        """When that was."""
        self.stop = Stop()
        """Whether the run is to end: see :func:`zoo.stopping.stopping`."""
        self.examiner = Examiner(run, self.learner, self.validation, self._end, self.world)
        self.books = Books(run, folder, len(self.training), self.device, self.world)

    @property
    def net(self) -> Any:
        """The network."""
        return self.learner.net

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.total

    @property
    def images_per_second(self) -> float:
        """Training images per second, over the whole run so far."""
        seconds = self.books.seconds
        return self.step * self.run.recipe.batch_size / seconds if seconds else 0.0

    @property
    def peak(self) -> int | None:
        """The most bytes of activations in a training step of one process, once one was measured."""
        return self.learner.peak

    # Where it was left

    def claim(self) -> None:
        """Takes the folder for this run alone, until :meth:`fit` ends.

        Raises:
            InputError: if another run has it.
        """
        self._main_does(self.books.claim)

    def restore(self, *, say: Callable[[str], None] = lambda _: None) -> bool:
        """Takes up the newest checkpoint that is whole; ``False`` if there never was one.

        What is damaged is put aside only if the folder was claimed.

        Raises:
            InputError: if all are damaged, or they are of other data or another network.
        """
        folder = self.folder / CHECKPOINTS
        found = self._newest(folder, say)
        if found is None:
            return False
        state = found.state
        if found.step > self.total:
            raise InputError(
                f"the run in {self.folder} is at step {found.step}, beyond the {self.total} of these options"
            )
        if list(state["classes"]) != self.data.classes or state["images"] != len(self.training):
            raise InputError(
                f"the training data is not that of the run in {self.folder}: other classes or number of images"
            )
        try:
            self.learner.restore(found.weights, found.average, state["optimizer"])
        except (RuntimeError, KeyError) as error:
            raise InputError(f"the checkpoints in {folder} are of another network: {error}".splitlines()[0]) from None
        self.step, self.best, self.best_step = found.step, state["best"], state["best_step"]
        self.learner.peak = state["peak"]
        self.learner.averaged_over = state["averaged_over"]
        self.books.restore(state["books"])
        if self.world.main:
            if self.books.claimed:
                checkpoints.mark_best(folder, self.best_step)  # a kill may have come between the two files
            changed = changes(self.folder / "config.json", environment(self.device))
            if changed:
                say(f"other bits may follow, for this is not what the run was made with: {'; '.join(changed)}")
        return True

    def _newest(self, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that the main process can read, the same in all."""
        found, problem = None, ""
        if self.world.main and checkpoints.any_left(folder):
            try:
                found = checkpoints.load(folder, owner=self.books.claimed, say=say)
            except InputError as error:
                problem = str(error)
        step, problem = self.world.first((None if found is None else found.step, problem))
        if problem:
            raise InputError(problem)
        if step is not None and found is None:
            found = checkpoints.load(folder, checkpoints.name_of(step))
        return found

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            InputError: if it can't be written; the last good one is as it was.
        """
        weights, average, optimizer = self.learner.tensors()
        state = {
            "classes": self.data.classes,
            "images": len(self.training),
            "optimizer": optimizer,
            "best": self.best,
            "best_step": self.best_step,
            "averaged_over": self.learner.averaged_over,
            "peak": self.peak,
            "books": self.books.state(),
        }
        keep = Keep(self.run.keep, self.run.keep_every)
        checkpoint = Checkpoint(self.step, weights, average, state)
        self._main_does(lambda: checkpoints.save(self.folder / CHECKPOINTS, checkpoint, best=self.best_step, keep=keep))

    def _main_does(self, act: Callable[[], Any]) -> None:
        """Lets the main process do something; if it fails, all end, and not by losing each other.

        Raises:
            InputError: the main process' own, in all.
        """
        problem = ""
        if self.world.main:
            try:
                act()
            except (InputError, OSError) as error:  # the latter of a disk that is full at the very end, say
                if self.world.size == 1:
                    raise
                problem = str(error)
        problem = self.world.first(problem)
        if problem:
            raise InputError(problem)

    # The course of a run

    def fit(self, reporter: Reporter) -> None:
        """Trains to the end of the recipe, or until it is asked to stop.

        Raises:
            Interrupted: after Ctrl-C, under :func:`zoo.stopping.stopping`, when all that was learnt is saved.
            Terminated: after SIGTERM or SIGUSR1, the same.
            InputError: if images can't be read, a file can't be written, or the run goes astray.
        """
        try:
            self.claim()
            with reporter, closing(self._batches()) as batches:
                self.books.refuse_bad()
                self._main_does(self._begin)
                self._take_steps(batches, reporter)
            self._main_does(self._draw)
        finally:
            self.books.close()

    def _begin(self) -> None:
        self.books.open(self.step)
        if not self.finished:  # these are of a run that was shorter
            for name in ("model.safetensors", REPORT):
                (self.folder / name).unlink(missing_ok=True)

    def _take_steps(self, batches: Iterator[Batch], reporter: Reporter) -> None:
        """What is due is derived from what has been counted, so that a run can be cut off anywhere."""
        while True:
            ends = self.step % self.per_epoch == 0 or self.finished
            if self.books.row.steps and (ends or self.step % self.run.recipe.log_every == 0):
                self._write_row(reporter)
            if self.books.epoch.steps and ends:
                self.save()  # evaluation may take longer than a scheduler is patient
                self._close_epoch(reporter)
                self.save()
            elif self.books.epoch.steps and self.run.save_every and self.step % self.run.save_every == 0:
                self.save()
            if self.finished:
                return
            start = time.perf_counter()
            parts, problem = read(batches, self.run.accumulate)
            waiting = time.perf_counter() - start
            if self._asked(problem):
                self.save()
                self._end(problem)
            self._learn(parts, waiting)
            reporter.at(self.step)

    def _asked(self, problem: str) -> int:
        """What the run is asked for in any process, which may have a problem."""
        return self.world.largest(FAILED if problem else self.stop.asked, self.device)

    def _end(self, problem: str) -> None:
        """Ends the run in all processes, if one was asked to or has a problem."""
        asked = self._asked(problem)
        if asked == FAILED:
            raise InputError(next(each for each in self.world.gathered(problem) if each))
        if asked:
            raise Interrupted if asked == INTERRUPTED else Terminated

    def _learn(self, parts: Sequence[Batch], waiting: float) -> None:
        """Takes one step."""
        recipe = self.run.recipe
        start = time.perf_counter()
        seed = seed_of(self.run.seed, self.step, self.world.rank)  # of dropout and of mixing, whatever was drawn before
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        self.net.train()
        rate = learning_rate(recipe, self.step, total=self.total, per_epoch=self.per_epoch)
        outcome = self.learner.step(parts, rate, self.step + 1)
        self.step += 1
        if outcome.finite and self.step % recipe.ema_every == 0:
            self.learner.update_average()
        seconds = waiting + time.perf_counter() - start
        self.books.count(outcome, parts, step=self.step, seconds=seconds, waiting=waiting)

    def _write_row(self, reporter: Reporter) -> None:
        self.books.gather_bad()
        if self.books.too_many_bad:
            self.save()
        self.books.refuse_bad()
        rate = learning_rate(self.run.recipe, self.step - 1, total=self.total, per_epoch=self.per_epoch)
        row = self.books.close_row({**self._head(), "lr": rate}, self.peak)
        reporter.row(row, epochs=self.epochs, per_epoch=self.per_epoch)

    def _close_epoch(self, reporter: Reporter) -> None:
        """Evaluates, and sees whether the network is the best so far."""
        self.learner.equalise()
        results = {"": self.examiner.evaluate(average=False)}
        if self.learner.average is not None:
            results["ema_"] = self.examiner.evaluate(average=True)
        figures: dict[str, Any] = {"images": results[""].images, "unread": results[""].unread}
        for prefix, result in results.items():
            loss = result.loss if math.isfinite(result.loss) else None  # JSON has no other numbers
            figures |= {prefix + "loss": loss, prefix + "top1": result.top1, prefix + "top5": result.top5}
        row = self.books.close_epoch(self._head(), figures)
        reporter.epoch(row, self.epochs)
        top1 = list(results.values())[-1].top1
        if self.best is None or top1 > self.best:
            self.best, self.best_step = top1, self.step

    def _head(self) -> dict[str, int]:
        return {"step": self.step, "epoch": math.ceil(self.step / self.per_epoch)}

    # Data

    def _batches(self) -> Generator[Batch]:
        sampler = StepSampler(
            len(self.training),
            self.run.recipe.batch_size,
            seed=self.run.seed,
            start=self.step,
            stop=self.total,
            rank=self.world.rank,
            world=self.world.size,
            parts=self.run.accumulate,
        )
        yield from loader(self.training, sampler, workers=self.run.workers, pin=self.device.type == "cuda")

    def finish(self, report: Mapping[str, str]) -> None:
        """Writes what was reported in the end: a sign that nothing is left to be done."""
        content = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        self._main_does(lambda: checkpoints.write(self.folder / REPORT, content.encode()))

    # What it has learnt

    def evaluate(self) -> Evaluation:
        """Classifies the validation images, with the average of the weights if there is one."""
        return self.examiner.evaluate(average=True)

    def invert(self) -> InversionError | None:
        """Inverts every validation image from its last features, and draws ``reconstructions.png``."""
        return self.examiner.invert(self.folder / "reconstructions.png")

    def _draw(self) -> None:
        """Writes what a finished run leaves: weights and curves."""
        about = {"model": self.run.recipe.model, "classes": json.dumps(self.data.classes)}
        checkpoint = checkpoints.load(self.folder / CHECKPOINTS)
        for name, tensors in (("model", checkpoint.weights), ("ema", checkpoint.average)):
            if tensors is not None:
                plain = {key: t.contiguous() for key, t in tensors.items()}
                checkpoints.write(self.folder / f"{name}.safetensors", serialized(plain, about))
        plots.save(plots.draw_curves(courses_of([self.folder])), self.folder / "curves.png")
