"""Trains a network by a recipe: resumable to the bit, and reported in a folder of its own."""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from invertible.testing import measure_memory
from zoo import plots, registry
from zoo.data import ImageTree, StepSampler, evaluation_transform, loader, training_transform
from zoo.digits import write_digits
from zoo.errors import DivergedError, InputError, diverging, reason
from zoo.evaluation import Evaluation, evaluate, image_batches
from zoo.inversion import InversionError, relative_errors
from zoo.irevnet import IRevNet
from zoo.progress import Reporter
from zoo.recipes import Recipe
from zoo.run import BACKPROP, GRIDS, Run, load_checkpoint, readable, write

__all__ = [
    "TIMING",
    "DivergedError",
    "Interrupted",
    "Trainer",
    "build",
    "find_device",
    "learning_rate",
    "load_net",
]

TIMING = ("seconds", "images_per_second")
"""The fields of ``metrics.jsonl`` that differ between two runs with the same seed."""

DIGITS = Path("runs/data/digits")
"""Where the embedded digits are written, if a run has no data of its own."""


class Interrupted(Exception):  # noqa: N818 (not an error: the user asked for it)
    """The user pressed Ctrl-C; the run is saved."""


def learning_rate(recipe: Recipe, step: int, *, total: int, per_epoch: int) -> float:
    """Returns the learning rate of a step, counted from 0: a pure function.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> [learning_rate(RECIPES["imagenet"], s, total=600_000, per_epoch=5005) for s in (0, 159_999, 160_000)]
        [0.1, 0.1, 0.01]
    """
    warmup = round(recipe.warmup_epochs * per_epoch)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.drops is not None:
        passed = sum(step >= round(drop * total) for drop in recipe.drops)
        return recipe.lr / 10**passed
    return recipe.lr * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


class Trainer:
    """A run in its folder: ``config.json``, ``metrics.jsonl``, ``checkpoint.pt``, then pictures and weights.

    Every step depends on the seed and its number alone, so that a run that was interrupted ends with the same bits as
    one that was not (on the CPU, with the same number of threads).

    Args:
        run: the configuration.
        folder: where the run is kept; made if it is not there.

    Raises:
        InputError: if data, device, size or model of the configuration are not to be had.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        recipe = run.recipe
        self.device = find_device(run.device)
        root = write_digits(DIGITS) if run.data is None else Path(run.data)
        if not root.is_dir():
            raise InputError(f"no such folder: {root}")
        self.training = ImageTree(root / "train", training_transform(recipe), seed=run.seed)
        self.validation = ImageTree(root / "val", evaluation_transform(recipe), classes=self.training.classes)
        torch.manual_seed(run.seed)
        net = build(recipe, num_classes=len(self.training.classes))
        _configure(net, run)
        self.net = net.to(self.device)
        self.optimizer = torch.optim.SGD(
            net.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        StepSampler(
            len(self.training), recipe.batch_size, seed=run.seed, start=0, stop=0
        )  # refuses an unfit batch size
        self.per_epoch = len(self.training) // recipe.batch_size
        self.total = recipe.iterations or (recipe.epochs or 1) * self.per_epoch
        self.epochs = math.ceil(self.total / self.per_epoch)
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.peak: int | None = None
        """The most bytes of activations in a training step, once one was measured."""
        self._drift: float | None = None  # the largest of the epoch
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of the epoch: loss, hits
        self._seconds = 0.0  # of the epoch

    @classmethod
    def resume(cls, folder: Path, **changes: Any) -> "Trainer":
        """Takes up the run in a folder where it was left; ``changes`` are to where it runs, not to what it does.

        Raises:
            InputError: if there is no run, or its checkpoint can't be read.
        """
        run = dataclasses.replace(Run.load(folder / "config.json"), **changes)
        trainer = cls(run, folder)
        state = load_checkpoint(folder)
        if state["classes"] != trainer.training.classes or state["images"] != len(trainer.training):
            raise InputError(f"the training data is not that of the run in {folder}: other classes or number of images")
        with readable(folder / "checkpoint.pt"):
            trainer.net.load_state_dict(state["net"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.step, trainer.rows = state["step"], state["rows"]
            trainer._sums, trainer._seconds = state["sums"].to(trainer.device), state["seconds"]
            trainer._drift, trainer.peak = state["drift"], state["peak"]
        return trainer

    def fit(self, reporter: Reporter) -> None:
        """Trains to the end of the recipe, or until Ctrl-C.

        Raises:
            Interrupted: after Ctrl-C, when all that was learnt is saved.
            InputError: if an image can't be read, or the loss is no longer finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run.save(self.folder / "config.json")
        self.save()
        with reporter, _stop_on_interrupt() as stop:
            try:
                self._train(stop, reporter)
            except DivergedError:
                raise
            except InputError:  # a bad image; the steps before it are good
                self.save()
                raise
        if self.rows:
            plots.curves(self.rows, self.folder / "curves.png")
        if stop.is_set():
            raise Interrupted

    def _train(self, stop: threading.Event, reporter: Reporter) -> None:
        batches = self._batches()
        while len(self.rows) < self.epochs and not stop.is_set():
            end = min((len(self.rows) + 1) * self.per_epoch, self.total)
            self._train_until(end, batches, stop, reporter)
            if not stop.is_set():
                self._close_epoch(self.evaluate(), end, reporter)
            self.save()

    def evaluate(self) -> Evaluation:
        """Classifies the validation images."""
        with diverging(f"in the evaluation after step {self.step}"):
            return evaluate(self.net, self._validation_batches())

    @torch.no_grad()
    def invert(self) -> InversionError | None:
        """Inverts every validation image from its last features and draws some; nothing, if the network has no inverse.

        The pictures are in ``reconstructions.png``: the first image of each class, ten classes at the most.
        """
        if not isinstance(self.net, IRevNet):
            return None
        self.net.eval()
        labels = [label for _, label in self.validation.samples]
        shown = sorted({labels.index(label) for label in set(labels)})[:10]
        errors: list[Tensor] = []
        pictures: list[tuple[Tensor, Tensor]] = []
        done = 0
        for images, _ in self._validation_batches():
            with diverging("in the inversion"):
                recovered = self.net.inverse(self.net.features(images))
            errors.append(relative_errors(recovered, images).cpu())
            pictures += [(images[i - done], recovered[i - done]) for i in shown if done <= i < done + len(images)]
            done += len(images)
        originals, recoveries = (torch.stack(list(column)).cpu() for column in zip(*pictures, strict=True))
        plots.reconstructions(originals, recoveries, self.folder / "reconstructions.png")
        return InversionError.of(torch.cat(errors))

    def save(self) -> None:
        """Writes the checkpoint, the weights and the metrics; each file whole or not at all."""
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "classes": self.training.classes,
            "images": len(self.training),
            "sums": self._sums.cpu(),
            "seconds": self._seconds,
            "drift": self._drift,
            "peak": self.peak,
        }
        partial = self.folder / "checkpoint.pt.tmp"
        torch.save(state, partial)
        partial.replace(self.folder / "checkpoint.pt")
        weights = {key: value.contiguous() for key, value in self.net.state_dict().items()}
        about = {"model": self.run.recipe.model, "classes": json.dumps(self.training.classes)}
        write(self.folder / "model.safetensors", save(weights, metadata=about))
        write(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    @property
    def seconds(self) -> float:
        """Seconds of training so far, evaluation apart."""
        return sum(row["seconds"] for row in self.rows) + self._seconds

    @property
    def drift(self) -> float | None:
        """The largest relative error of a reconstructed value, over all steps; ``None`` if none was reconstructed."""
        return max((row["drift"] for row in self.rows if row["drift"] is not None), default=self._drift)

    @property
    def images_per_second(self) -> float:
        """Training images per second, over the whole run so far."""
        return self.step * self.run.recipe.batch_size / self.seconds if self.seconds else 0.0

    def _batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        sampler = StepSampler(
            len(self.training), self.run.recipe.batch_size, seed=self.run.seed, start=self.step, stop=self.total
        )
        pin = self.device.type == "cuda"
        for images, labels in loader(self.training, sampler, workers=self.run.workers, pin=pin):
            yield images.to(self.device, non_blocking=True).float() / 255, labels.to(self.device, non_blocking=True)

    def _validation_batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        yield from image_batches(
            self.validation, batch_size=self.run.recipe.batch_size, workers=self.run.workers, device=self.device
        )

    def _train_until(
        self, end: int, batches: Generator[tuple[Tensor, Tensor], None, None], stop: threading.Event, reporter: Reporter
    ) -> None:
        recipe = self.run.recipe
        self.net.train()
        start = time.perf_counter() - self._seconds
        first = len(self.rows) * self.per_epoch
        while self.step < end and not stop.is_set():
            images, labels = next(batches)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, self.step, total=self.total, per_epoch=self.per_epoch)
            logits, loss = self._gradients(images, labels)
            self.optimizer.step()
            with torch.no_grad():
                hits = (logits.argmax(1) == labels).sum()
                self._sums += torch.stack([loss.double() * len(labels), hits.double()])
            self.step += 1
            self._seconds = time.perf_counter() - start
            if self.step == end or (reporter.live and self.step % 10 == 0):
                seen = (self.step - first) * recipe.batch_size
                mean, top1 = (self._sums / seen).tolist()
                if not math.isfinite(mean):
                    raise DivergedError(f"the loss is {mean} at step {self.step}; try a lower --lr")
                epoch = f"epoch {len(self.rows) + 1}/{self.epochs}"
                reporter.step(self.step, epoch=epoch, loss=mean, top1=100 * top1, speed=seen / self._seconds)

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sets the gradients of a batch and returns its logits and loss. The first time it counts bytes."""

        def step() -> tuple[Tensor, Tensor]:
            logits = self.net(images)
            loss = cross_entropy(logits, labels, label_smoothing=self.run.recipe.label_smoothing)
            loss.backward()
            return logits, loss

        try:
            with diverging(f"at step {self.step + 1}"):
                if self.peak is None:  # in later sessions it is known
                    for parameter in self.net.parameters():
                        parameter.grad = torch.zeros_like(parameter)  # no activation: not to be counted
                    result, memory = measure_memory(step, self.device)
                    self.peak = memory.peak
                else:
                    self.optimizer.zero_grad()
                    result = step()
        except DivergedError:
            self.optimizer.zero_grad()  # they are wrong
            raise
        drift = self.net.drift if isinstance(self.net, IRevNet) else None
        if drift is not None:
            self._drift = max(self._drift or 0.0, drift)
        return result

    def _close_epoch(self, result: Evaluation, end: int, reporter: Reporter) -> None:
        seen = (end - len(self.rows) * self.per_epoch) * self.run.recipe.batch_size
        loss, top1 = (self._sums / seen).tolist()
        row = {
            "epoch": len(self.rows) + 1,
            "step": end,
            "lr": learning_rate(self.run.recipe, end - 1, total=self.total, per_epoch=self.per_epoch),
            "train_loss": loss,
            "train_top1": 100 * top1,
            "loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "drift": self._drift,
            "seconds": self._seconds,
            "images_per_second": seen / self._seconds if self._seconds else 0.0,
        }
        self.rows.append(row)
        self._sums.zero_()
        self._seconds = 0.0
        self._drift = None
        reporter.epoch(row, self.epochs)


def build(recipe: Recipe, *, num_classes: int) -> nn.Module:
    """Builds the recipe's network.

    Raises:
        InputError: if there is no such network, or the recipe's size does not fit it.
    """
    try:
        net = registry.create(recipe.model, num_classes=num_classes)
    except ValueError as error:
        raise InputError(str(error)) from None
    divisor = getattr(net, "size_divisor", 1)
    if recipe.size % divisor or recipe.size < 1:
        raise InputError(f"{recipe.model} needs a size that {divisor} divides, got {recipe.size}")
    if recipe.size == divisor and recipe.batch_size == 1:
        raise InputError(
            f"{recipe.model} needs a batch of two or more at size {recipe.size}: batch norm would see one value"
        )
    return net


def load_net(folder: Path, device: torch.device) -> tuple[nn.Module, Run]:
    """Builds the network of a run with its weights; the data is not needed.

    Raises:
        InputError: if there is no run, or its checkpoint can't be read.
    """
    run = Run.load(folder / "config.json")
    state = load_checkpoint(folder)
    net = build(run.recipe, num_classes=len(state["classes"]))
    with readable(folder / "checkpoint.pt"):
        net.load_state_dict(state["net"])
    _configure(net, run)
    return net.to(device), run


def _configure(net: nn.Module, run: Run) -> None:
    if isinstance(net, IRevNet):
        net.backprop, net.grid = BACKPROP[run.backprop], GRIDS[run.grid]


def find_device(name: str) -> torch.device:
    """Returns a device that is there.

    Raises:
        InputError: if it is not.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"no device {name!r} here: {reason(error)}") from None
    return device


@contextmanager
def _stop_on_interrupt() -> Generator[threading.Event]:
    """Turns the first Ctrl-C into a flag, that training reads between steps; the second ends the program at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
