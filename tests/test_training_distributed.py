"""Training on two processes: they see one order, stop, skip and evaluate together, and go on to the same bits."""

import dataclasses
import math
import shutil
import signal
import time

import pytest
import torch

from tests.distributed import on_two, one_of_two
from tests.test_training import ONE_EPOCH, RICH, SHORT, Stopping, fit, rows, same
from zoo import checkpoints
from zoo.building import load_net
from zoo.digits import write_digits
from zoo.distributed import World, joined
from zoo.errors import DivergedError, InputError
from zoo.run import Run
from zoo.stopping import Terminated
from zoo.training import Trainer


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(write_digits(tmp_path_factory.mktemp("digits")))


def trainer_of(rank, run, folder):
    trainer = Trainer(run, folder, world=one_of_two(rank))
    trainer.restore()
    return trainer


def go_on(rank, run, folder, stops):
    """Trains, stopped by a signal to one process at each of these steps, and then to the end."""
    for k, step in enumerate(stops):
        trainer = trainer_of(rank, run, folder)
        try:
            fit(trainer, Stopping(trainer, step if rank == k % 2 else -1, signal.SIGTERM))
        except Terminated:
            assert trainer.step == step
    trainer = fit(trainer_of(rank, run, folder))
    result, error = trainer.evaluate(), trainer.invert()
    return result, error, [p.detach().clone() for p in trainer.net.parameters()] if run.parallel == "ddp" else None


@pytest.mark.parametrize(
    ("recipe", "parallel", "accumulate"),
    [
        pytest.param(RICH, "ddp", 2, marks=pytest.mark.slow),
        pytest.param(SHORT, "ddp", 1, marks=pytest.mark.slow),
        pytest.param(RICH, "fsdp", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(digits, tmp_path, recipe, parallel, accumulate):
    run = Run(recipe, digits, world_size=2, parallel=parallel, accumulate=accumulate)
    whole = on_two(go_on, run, tmp_path / "whole", [])
    cut = on_two(go_on, run, tmp_path / "cut", [3, 5, 8])
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert whole[0][0] == whole[1][0] == cut[0][0]  # all processes know the result
    assert whole[0][0].images == 355
    assert whole[0][1] == cut[0][1]
    net, _ = load_net(tmp_path / "cut", torch.device("cpu"))  # by one process
    assert sum(p.numel() for p in net.parameters()) == 484_738


def one_step(rank, run, folder):
    trainer = Trainer(run, folder, world=one_of_two(rank))
    trainer.net.eval()
    batches = trainer._batches()
    trainer.learner.step([next(batches) for _ in range(run.accumulate)], 0.1, 1)
    return trainer.learner.tensors()[0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_take_the_step_of_one(digits, tmp_path, parallel):
    """But for batch norm, which sees a part by itself: in eval, that is the same step."""
    recipe = dataclasses.replace(ONE_EPOCH, batch_size=64, grid="none")
    trainer = Trainer(Run(recipe, digits), tmp_path / "one")
    trainer.net.eval()
    trainer.learner.step([next(trainer._batches())], 0.1, 1)
    expected = trainer.learner.tensors()[0]
    found = on_two(one_step, Run(recipe, digits, world_size=2, parallel=parallel, accumulate=2), tmp_path / "two")
    for weights in found:
        for key, t in expected.items():
            torch.testing.assert_close(weights[key], t, rtol=1e-4, atol=1e-5)


def examined(rank, run, folder, beyond):
    trainer = Trainer(run, folder, world=one_of_two(rank))
    if beyond and rank:
        prepare = trainer.learner.prepare
        trainer.learner.prepare = lambda images, draws=None: prepare(images, draws) * 1e6
        trainer.learner.prepare.restored = prepare.restored
    result = trainer.evaluate()
    try:
        return result, trainer.invert()
    except DivergedError as error:
        return result, str(error)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_evaluate_batches_of_other_numbers(digits, tmp_path, parallel):
    """One has two batches, the other one; and in one of them values leave the grid."""
    run = Run(dataclasses.replace(ONE_EPOCH, batch_size=354), digits, world_size=2, parallel=parallel)
    alone = Trainer(dataclasses.replace(run, world_size=1), tmp_path)
    expected = alone.evaluate()
    (first, error), (second, _) = on_two(examined, run, tmp_path, False)
    assert first == second
    assert (first.images, first.top1, first.top5) == (expected.images, expected.top1, expected.top5)
    assert first.loss == pytest.approx(expected.loss)
    assert error.maximum == 0
    for _, words in on_two(examined, run, tmp_path, True):
        assert "and the grid ends at 8192; try a lower --lr" in words


class PoisonOne(torch.nn.Identity):
    def __init__(self, rank, at):
        super().__init__()
        self.rank, self.at, self.step = rank, at, 0

    def forward(self, x):
        if not self.training:
            return x
        self.step += 1
        return x * (math.nan if self.rank == 1 and self.step in self.at else 1)


def poisoned(rank, run, folder, at):
    trainer = Trainer(run, folder, world=one_of_two(rank))
    trainer.net.body[3].function.append(PoisonOne(rank, at))
    try:
        fit(trainer)
    except DivergedError as error:
        return str(error)
    return [p.detach() for p in trainer.net.parameters()]


@pytest.mark.parametrize("grid", ["none", "exact"])
def test_what_one_process_cannot_learn_from_none_does(digits, tmp_path, grid):
    run = Run(dataclasses.replace(ONE_EPOCH, backprop="store", grid=grid), digits, world_size=2, max_skipped=2)
    first, second = on_two(poisoned, run, tmp_path / "few", [2, 4])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    skipped = rows(tmp_path / "few", "skipped")
    assert [row["step"] for row in skipped] == [2, 4]
    assert all(len(row["images"]) == 256 for row in skipped)
    assert rows(tmp_path / "few", "train")[-1]["skipped"] == 2
    errors = on_two(poisoned, run, tmp_path / "many", [2, 3])
    assert all("not finite in 2 steps in a row, the last is step 3" in error for error in errors)


def drifting(rank, run, folder):
    trainer = Trainer(run, folder, world=one_of_two(rank))
    trainer.net.body[4].function.append(Fickle(rank))
    try:
        fit(trainer)
    except DivergedError as error:
        return str(error)
    return "went on"


class Fickle(torch.nn.Module):
    """A function that doesn't repeat its bits, in one process."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.calls = rank, 0

    def forward(self, x):
        self.calls += self.rank
        return x + 1e-3 * self.calls


def test_a_wrong_reconstruction_in_one_process_ends_both(digits, tmp_path):
    run = Run(ONE_EPOCH, digits, world_size=2)
    errors = on_two(drifting, run, tmp_path)
    assert all("so that the gradients are wrong; go on with --backprop recompute" in error for error in errors)


def unread(rank, run, folder):
    """What the process says that finds no image readable in training, and then one in validation."""
    found = []
    trainer = Trainer(run, folder, world=one_of_two(rank))
    source = trainer.training.source
    for step in (2, None):
        if step is not None and rank == 1:
            trainer.training.source = Broken(source)
        try:
            fit(trainer)
        except InputError as error:
            found.append((trainer.step, str(error)))
        trainer.training.source = source
    return found


class Broken:
    """A disk that is gone."""

    def __init__(self, source):
        self.labels = source.labels

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"image {index}"

    def read(self, index):
        raise InputError("the disk is gone")


def test_what_one_process_cannot_read_ends_both_and_nothing_is_lost(digits, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(digits, tree)
    last = max(tree.glob("val/*/*.png"))  # of the second process' part
    last.write_bytes(b"no image")
    first, second = on_two(unread, Run(ONE_EPOCH, str(tree), world_size=2), tmp_path / "run")
    assert first == second == [(0, "the disk is gone"), (5, f"cannot read the image {last}: not an image file")]
    assert checkpoints.names(tmp_path / "run" / "checkpoints") == ["step_000000000", "step_000000005"]


def words(rank):
    world = one_of_two(rank)
    order = []
    for fails in (False, True):
        try:
            with world.main_first():
                if rank == 1:
                    order.append(world.store.check(["done"]))
                else:
                    time.sleep(0.3)
                    world.store.set("done", "")
                    if fails:
                        raise InputError("no such folder")
        except InputError:
            assert fails
    torch.distributed.barrier()
    return order, world.first_to_say("no such folder"), world.first_to_say(f"rank {rank}")


def test_the_main_process_goes_first_and_an_error_is_said_once():
    (nothing, said, own), (order, also_said, others_own) = on_two(words)
    assert (nothing, order) == ([], [True, True])
    assert said != also_said
    assert own
    assert others_own


def with_other_count(rank, run, folder):
    return Trainer(run, folder, world=one_of_two(rank)).restore()


def test_a_run_may_go_on_with_another_number_of_processes(digits, tmp_path):
    """Not to the same bits, but with nothing lost: on two what one has begun."""
    trainer = Trainer(Run(SHORT, digits), tmp_path)
    with pytest.raises(Terminated):
        fit(trainer, Stopping(trainer, 3, signal.SIGTERM))
    assert on_two(with_other_count, Run(SHORT, digits, world_size=2), tmp_path) == [True, True]
    on_two(go_on, Run(SHORT, digits, world_size=2), tmp_path, [])
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 5, 6, 8, 10]
    assert all(row["loss"] > 0 for row in rows(tmp_path, "train"))


def test_one_process_has_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cpu") as world:
        assert world == World()
        assert not torch.distributed.is_initialized()
        assert world.gathered(3) == [3]
        assert world.first(3) == world.largest(3, torch.device("cpu")) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(InputError, match="2 processes can't share the device 'cuda:1'; take --device cuda"),
        joined("cuda:1"),
    ):
        pass
