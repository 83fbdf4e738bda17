"""What a network in training has learnt: how it classifies the validation images, and how they come back."""

import dataclasses
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from zoo import plots
from zoo.data import Batch, Samples, batches_of, loader
from zoo.data.order import share
from zoo.distributed import World
from zoo.errors import DivergedError, InputError, reason
from zoo.evaluation import Evaluation, evaluate
from zoo.inversion import InversionError, invert_batches, relative_errors
from zoo.irevnet import IRevNet
from zoo.learner import Learner
from zoo.run import Run

__all__ = ["Examiner", "read"]


class Examiner:
    """Evaluates a network that learns, in all processes together: each has a part of the images.

    Args:
        run: the configuration.
        learner: what learns.
        validation: the images.
        end: a collective that ends the run in all processes, if one has a problem, which it is given, or was asked to.
        world: the processes.
    """

    def __init__(
        self, run: Run, learner: Learner, validation: Samples, end: Callable[[str], None], world: World
    ) -> None:
        self.run, self.learner, self.validation, self.end, self.world = run, learner, validation, end, world

    def batches(self, unread: list[tuple[str, str]]) -> Generator[tuple[Tensor, Tensor, list[int]]]:
        """What the network sees, labels and numbers, of this process' part; names of unread images go into the list."""
        device = self.learner.device
        # No more than training has at once: what gradients are accumulated for is that more do not fit.
        size = max(self.run.recipe.batch_size // (self.world.size * self.run.accumulate), 1)
        mine = share(len(self.validation), self.world.rank, self.world.size)
        found = loader(self.validation, batches_of(mine, size), workers=self.run.workers, pin=device.type == "cuda")
        largest = -(-len(self.validation) // self.world.size)
        for _ in range(-(-largest // size)):  # as often in each process, for it may have to stop
            part, problem = read(found, 1)
            self.end(problem)
            for batch in part:
                unread += batch.bad
                if len(batch.labels):
                    images, labels = (t.to(device, non_blocking=True) for t in (batch.images, batch.labels))
                    yield self.learner.prepare(images), labels, [index for _, index in batch.addresses]

    def evaluate(self, *, average: bool) -> Evaluation:
        """Classifies the images, with the average of the weights if that is wanted and there is one."""
        unread: list[tuple[str, str]] = []
        batches = ((x, labels) for x, labels, _ in self.batches(unread))
        with self.learner.examined(average=average) as net, self.learner.autocast():
            found = evaluate(net, batches, world=self.world)
        return dataclasses.replace(found, unread=sum(len(each) for each in self.world.gathered(unread)))

    def invert(self, path: Path) -> InversionError | None:
        """Inverts every image from its last features and draws some; nothing, if the network has no inverse.

        With the average of the weights, if there is one.

        Args:
            path: of the picture: the first image of each class, ten classes at the most.

        Raises:
            DivergedError: in all processes, if values leave the grid in one.
            InputError: in all processes, if the picture can't be written.
        """
        if not isinstance(self.learner.net, IRevNet):
            return None
        labels = self.validation.source.labels.tolist()
        shown = sorted({label: i for i, label in reversed(list(enumerate(labels)))}.values())[:10]
        errors: list[Tensor] = []
        pictures: list[tuple[Tensor, ...]] = []
        numbers: list[int] = []
        batches = self.batches([])

        def images() -> Iterator[Tensor]:
            for x, _, numbers[:] in batches:
                yield x

        problem = ""
        with self.learner.examined(average=True) as net, self.learner.autocast():
            try:
                for x, recovered in invert_batches(cast("IRevNet", net), images()):
                    errors.append(relative_errors(recovered, x).cpu())
                    for i in (numbers.index(i) for i in shown if i in numbers):
                        pictures.append(tuple(self.learner.prepare.restored(t[i]).cpu() for t in (x, recovered)))
            except DivergedError as error:
                problem = str(error)
                for _ in batches:  # the other processes go on reading, and ask this one whether to end
                    pass
        problems = [each for each in self.world.gathered(problem) if each]
        if problems:
            raise DivergedError(problems[0])
        found = torch.cat([each for part in self.world.gathered(errors) for each in part])
        everywhere = [each for part in self.world.gathered(pictures) for each in part]
        if self.world.main and everywhere:
            originals, recoveries = (torch.stack(list(column)) for column in zip(*everywhere, strict=True))
            try:
                plots.reconstructions(originals, recoveries, path)
            except OSError as error:  # the folder of somebody else's run, say
                problem = f"cannot write {path}: {reason(error)}"
        problem = self.world.first(problem)
        if problem:
            raise InputError(problem)
        return InversionError.of(found)


def read(batches: Iterator[Batch], count: int) -> tuple[list[Batch], str]:
    """The next batches, fewer at the end; and why they can't be had, if they can't: other processes must know, too."""
    try:
        return list(islice(batches, count)), ""
    except InputError as error:
        return [], str(error)
