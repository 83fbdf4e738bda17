"""The order in which a run sees its images: a function of the seed and the step."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from zoo.errors import InputError

__all__ = ["StepSampler", "seed_of", "share", "steps_in_epoch"]


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of these numbers, each not negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def share(length: int, rank: int, world: int) -> range:
    """The part of ``length`` things that one of ``world`` processes takes: whole, in order, without padding.

    Example:
        >>> [list(share(5, rank, 3)) for rank in range(3)]
        [[0], [1, 2], [3, 4]]
    """
    return range(length * rank // world, length * (rank + 1) // world)


def steps_in_epoch(length: int, batch_size: int, *, world: int = 1, parts: int = 1) -> int:
    """How many whole batches there are.

    Raises:
        InputError: if there is none, or ``world`` processes can't share it equally, each in ``parts`` pieces.
    """
    if batch_size > length:
        raise InputError(f"the batch size {batch_size} is more than the {length} training images")
    if batch_size % (world * parts):
        pieces = f"{world} processes" + (f" in {parts} pieces each" if parts > 1 else "")
        raise InputError(f"the batch size {batch_size} can't be shared equally by {pieces}")
    return length // batch_size


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one process for the steps ``start`` to ``stop``, as addresses ``(epoch, index)``.

    A pure function of seed and step, so that a run can go on: each epoch visits the images in an order of its own and
    leaves out the last incomplete batch. That order is the same whatever the number of processes; each takes a part of
    every batch, in ``parts`` pieces if gradients are accumulated.

    Args:
        length: the number of images.
        batch_size: images per step, over all processes, at most ``length``.
        seed: of the order.
        start: the first step, counted from the beginning of the run.
        stop: the step after the last.
        rank: which process this is.
        world: the number of processes.
        parts: pieces of a process' part.

    Raises:
        InputError: if there are fewer images than a batch has, or the batch can't be shared equally.

    Example:
        >>> list(StepSampler(5, 2, seed=0, start=1, stop=3)) == list(StepSampler(5, 2, seed=0, start=0, stop=3))[1:]
        True
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ) -> None:
        self.per_epoch = steps_in_epoch(length, batch_size, world=world, parts=parts)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.world, self.parts = rank, world, parts

    def __len__(self) -> int:
        return max(self.stop - self.start, 0) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps = self.per_epoch
        mine = self.batch_size // self.world
        piece = mine // self.parts
        for epoch in itertools.count(self.start // steps):
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator)
            for step in range(max(self.start, epoch * steps), (epoch + 1) * steps):
                if step >= self.stop:
                    return
                first = (step - epoch * steps) * self.batch_size + self.rank * mine
                for part in range(self.parts):
                    chosen = order[first + part * piece : first + (part + 1) * piece].tolist()
                    yield [(epoch, index) for index in chosen]
