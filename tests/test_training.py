"""Training: the same bits twice, going on after an interruption, what is written, measured and refused."""

import copy
import dataclasses
import io
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import invertible as inv
import zoo
from zoo import examining, plots, training
from zoo.augment import Preparation
from zoo.building import load_net
from zoo.courses import course_of
from zoo.data import Batch, StepSampler
from zoo.digits import write_digits
from zoo.errors import DivergedError, InputError
from zoo.evaluation import evaluate
from zoo.inversion import InversionError, relative_errors
from zoo.journal import TIMING, rows_of
from zoo.progress import Reporter
from zoo.recipes import RECIPES
from zoo.run import BACKPROP, Run
from zoo.stopping import Interrupted, Terminated, stopping
from zoo.training import Trainer


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(write_digits(tmp_path_factory.mktemp("digits")))


SHORT = dataclasses.replace(RECIPES["digits"], epochs=2, batch_size=256, log_every=2)  # 5 steps in an epoch
ONE_EPOCH = dataclasses.replace(SHORT, epochs=1)
RICH = dataclasses.replace(  # all that a recipe may ask for
    SHORT, mixup=0.2, cutmix=1.0, ema_decay=0.9, ema_every=2, colour="inception", trivial_augment=True,
    random_erase=0.3, mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3), decay_norms=False, flip=True, channels_last=True,
)  # fmt: skip


def silent(trainer):
    return Reporter(Console(file=io.StringIO()), total=trainer.total)


def fit(trainer, reporter=None):
    with stopping() as trainer.stop:
        trainer.fit(reporter or silent(trainer))
    return trainer


def resumed(folder, *, claimed=False, **changes):
    trainer = Trainer(dataclasses.replace(Run.load(folder / "config.json"), **changes), folder)
    if claimed:  # and let go when it has been fit
        trainer.claim()
    assert trainer.restore()
    return trainer


def rows(folder, kind=None):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows_of(folder, kind)]


def same(a, b):
    pairs = [(folder / "model.safetensors", folder / "ema.safetensors") for folder in (a, b)]
    assert pairs[0][1].exists() == pairs[1][1].exists()
    for x, y in zip(*pairs, strict=True):
        if x.exists():
            x, y = load_file(x), load_file(y)
            if x.keys() != y.keys() or not all(torch.equal(x[key], y[key]) for key in x):
                return False
    return True


def replace(run, **changes):
    """Another recipe in a run."""
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **changes))


@pytest.mark.slow
def test_one_seed_gives_the_same_bits_twice_and_another_gives_others(digits, tmp_path):
    for name, seed, workers in [("a", 0, 0), ("b", 0, 1), ("c", 1, 0)]:
        fit(Trainer(Run(RICH, digits, seed=seed, workers=workers), tmp_path / name))
    assert same(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")
    train, validation = rows_of(tmp_path / "a", "train"), rows_of(tmp_path / "a", "validation")
    assert [row["step"] for row in train] == [2, 4, 5, 6, 8, 10]
    assert [row["step"] for row in validation] == [5, 10]
    assert set(TIMING) <= set(train[0])
    assert {"loss", "lr", "top1", "drift", "skipped", "bad_images", "epoch"} <= set(train[0]) - set(TIMING)
    assert {"loss", "top1", "top5", "images", "ema_top1", "train_loss", "unread"} <= set(validation[0])


class Stopping(Reporter):
    """Sends the process a signal at a step."""

    def __init__(self, trainer, step, number):
        super().__init__(None, total=trainer.total)
        self.step, self.number = step, number

    def at(self, done):
        if done == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("recipe", "number"),
    [
        (RICH, signal.SIGTERM),
        pytest.param(SHORT, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(RICH, signal.SIGUSR1, marks=pytest.mark.slow),
    ],
    ids=["rich, SIGTERM", "short, SIGINT", "rich, SIGUSR1"],
)
def test_an_interrupted_run_ends_with_the_same_bits(digits, tmp_path, recipe, number):
    """There are 5 steps in an epoch: interrupted in the middle of one, at the end of it, and between two rows."""
    fit(Trainer(Run(recipe, digits), tmp_path / "whole"))
    trainer = Trainer(Run(recipe, digits), tmp_path / "cut")
    for stop_at in (1, 5, 7):
        with pytest.raises(Interrupted if number == signal.SIGINT else Terminated):
            fit(trainer, Stopping(trainer, stop_at, number))
        assert trainer.step == stop_at
        assert not (tmp_path / "cut" / "model.safetensors").exists()
        with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "step": 9')  # what a killed process may leave
        trainer = resumed(tmp_path / "cut")
        assert trainer.step == stop_at
    fit(trainer)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert trainer.books.seconds > 0


@pytest.mark.slow
def test_a_signal_during_the_evaluation_stops_it_and_nothing_is_lost(digits, tmp_path, monkeypatch):
    fit(Trainer(Run(SHORT, digits), tmp_path / "whole"))
    trainer = Trainer(Run(SHORT, digits), tmp_path / "cut")
    real = examining.evaluate

    def interrupting(net, batches, **options):
        signal.raise_signal(signal.SIGTERM)
        return real(net, batches, **options)

    monkeypatch.setattr(examining, "evaluate", interrupting)
    with pytest.raises(Terminated):
        fit(trainer)
    monkeypatch.undo()
    trainer = resumed(tmp_path / "cut")
    assert trainer.step == 5
    assert rows(tmp_path / "cut", "validation") == []
    fit(trainer)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


def test_checkpoints_are_kept_as_asked(digits, tmp_path):
    trainer = fit(Trainer(Run(SHORT, digits, save_every=3, keep=1, keep_every=6), tmp_path))
    assert {path.name for path in (tmp_path / "checkpoints").glob("step_*")} >= {"step_000000006", "step_000000010"}
    best = max(rows(tmp_path, "validation"), key=lambda row: row["top1"])
    assert (tmp_path / "checkpoints" / "best").read_text() == f"step_{best['step']:09d}"
    assert (trainer.best, trainer.best_step) == (best["top1"], best["step"])
    (tmp_path / "checkpoints" / "best").write_text("step_000000003")  # as a kill before it was written would leave it
    resumed(tmp_path)  # to evaluate, say, while another process has the run
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_000000003"
    fit(resumed(tmp_path, claimed=True))
    assert (tmp_path / "checkpoints" / "best").read_text() == f"step_{best['step']:09d}"


def test_what_a_run_leaves_behind(digits, tmp_path):
    trainer = fit(Trainer(Run(SHORT, digits, seed=3), tmp_path / "run"))
    error = trainer.invert()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "lock",
        "metrics.jsonl",
        "model.safetensors",
        "reconstructions.png",
    ]
    assert Run.load(tmp_path / "run" / "config.json") == trainer.run
    assert error == InversionError(0, 0, 0)
    net = zoo.create("irevnet_small", num_classes=10)
    net.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    net.grid = "exact"
    result = evaluate(net, ((x, labels) for x, labels, _ in trainer.examiner.batches([])))
    last = rows(tmp_path / "run", "validation")[-1]
    assert (result.top1, result.top5, result.loss) == (last["top1"], last["top5"], last["loss"])
    assert last["step"] == trainer.total == 10
    assert trainer.images_per_second > 0
    loaded, run = load_net(tmp_path / "run", torch.device("cpu"))
    assert run == trainer.run
    assert all(torch.equal(t, loaded.state_dict()[key]) for key, t in net.state_dict().items())


def test_evaluation_against_a_count_by_hand():
    class Table(torch.nn.Module):
        def forward(self, x):
            return logits[x[:, 0].long()]

    logits = torch.randn(40, 12)
    labels = torch.randint(12, (40,))
    numbers = torch.arange(40.0)[:, None]
    batches = [(numbers[k : k + 7], labels[k : k + 7]) for k in range(0, 40, 7)]
    net = Table().train()
    result = evaluate(net, iter(batches))
    order = logits.argsort(dim=1, descending=True)
    assert result.top1 == pytest.approx(100 * sum(order[i, 0] == labels[i] for i in range(40)).item() / 40)
    assert result.top5 == pytest.approx(100 * sum(labels[i] in order[i, :5] for i in range(40)) / 40)
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert result.images == 40
    assert net.training
    with pytest.raises(InputError, match="there is no validation image that can be read"):
        evaluate(net, iter([]))


def test_images_that_leave_the_grid_are_classified_without_it():
    torch.manual_seed(0)
    net = zoo.create("irevnet_small", num_classes=10).eval()
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6)
    images[1] *= 1e5  # beyond 8192
    expected = evaluate(net, [(images, labels)])
    net.grid = "exact"
    found = evaluate(net, [(images[:1], labels[:1]), (images[1:], labels[1:])])
    assert (found.top1, found.top5) == (expected.top1, expected.top5)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert net.grid is not None


def test_the_papers_inversion_error():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    recovered = torch.tensor([[3.0, 4.5], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert relative_errors(recovered, x).tolist() == pytest.approx([0.1, 0.0, math.inf, 0.0])
    assert InversionError.of(torch.tensor([1.0, 2.0, 6.0])) == InversionError(3.0, 2.0, 6.0)
    assert InversionError.of(torch.tensor([1.0, 3.0])).median == 2.0


def test_the_picture_shows_original_reconstruction_and_difference(tmp_path):
    red, green = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    red[:, 0], green[:, 1] = 1, 1
    plots.reconstructions(red, green, tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))

    def height(*colour):
        return np.argwhere((pixels == colour).all(-1))[:, 0].mean() / len(pixels)

    assert height(255, 0, 0) < height(0, 255, 0) < height(255, 255, 0)  # |red - green| is yellow
    plots.reconstructions(0 * red, 1e-7 * green, tmp_path / "close.png")
    pixels = np.asarray(Image.open(tmp_path / "close.png").convert("RGB"))
    assert height(0, 255, 0) > 0.5  # a difference of 1e-7 fills the scale


def test_a_run_is_the_recipe_and_nothing_else(digits, tmp_path):
    """Against plain SGD, written out: momentum, decay, smoothing, schedule, average, and the figures of the row."""
    changes = {"lr": 0.02, "weight_decay": 0.05, "label_smoothing": 0.2, "warmup_epochs": 0.4, "ema_decay": 0.75}
    recipe = dataclasses.replace(SHORT, epochs=1, batch_size=480, **changes)  # 3 steps, the first to warm up
    trainer = Trainer(Run(recipe, digits), tmp_path)
    net = copy.deepcopy(trainer.net).train()
    batches = [(trainer.learner.prepare(batch.images, batch.draws), batch.labels) for batch in trainer._batches()]
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    losses, hits, average = [], 0, {}
    for step, (images, labels) in enumerate(batches):
        rate = 0.02 if step == 0 else 0.02 * (1 + math.cos(math.pi * (step - 1) / 2)) / 2
        logits = net(images)
        target = torch.full_like(logits, 0.2 / 10).scatter_(1, labels[:, None], 0.8 + 0.2 / 10)
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        losses.append(loss.item())
        hits += (logits.argmax(1) == labels).sum().item()
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in net.named_parameters():
                gradient = torch.add(p.grad, p, alpha=0.05)
                velocity[name] = 0.9 * velocity[name] + gradient
                p -= rate * (gradient + 0.9 * velocity[name])  # Nesterov
                decay = min(0.75, step / (step + 9))
                average[name] = decay * average[name] + (1 - decay) * p if name in average else p.clone()
    fit(trainer)
    found = load_file(tmp_path / "ema.safetensors")
    for name, p in trainer.net.named_parameters():
        torch.testing.assert_close(p, dict(net.named_parameters())[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[name], average[name], rtol=1e-3, atol=1e-4)
    [row] = rows(tmp_path, "validation")
    assert row["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert row["train_top1"] == pytest.approx(100 * hits / (3 * 480), abs=0.2)
    train = rows(tmp_path, "train")
    assert [row["loss"] for row in train] == pytest.approx([sum(losses[:2]) / 2, losses[2]], rel=1e-4)
    assert train[0]["lr"] == pytest.approx(0.02)


def test_parts_of_a_batch_add_up_to_it(digits, tmp_path):
    """But for batch norm, which sees each part by itself: in eval, that is the same step."""
    steps = {}
    for parts in (1, 2, 4):
        run = Run(dataclasses.replace(ONE_EPOCH, batch_size=64, grid="none"), digits, accumulate=parts)
        trainer = Trainer(run, tmp_path / str(parts))
        trainer.net.eval()
        batches = trainer._batches()
        outcome = trainer.learner.step([next(batches) for _ in range(parts)], 0.1, 1)
        steps[parts] = (outcome.sums, dict(trainer.net.named_parameters()))
    for parts in (2, 4):
        torch.testing.assert_close(steps[parts][0], steps[1][0], rtol=1e-5, atol=1e-5)
        for key, p in steps[parts][1].items():
            torch.testing.assert_close(p, steps[1][1][key], rtol=1e-4, atol=1e-5)


def test_the_average_is_what_is_evaluated_and_inverted(digits, tmp_path):
    trainer = fit(Trainer(Run(dataclasses.replace(SHORT, ema_decay=0.5), digits), tmp_path))
    last = rows(tmp_path, "validation")[-1]
    assert trainer.evaluate().loss == last["ema_loss"] != last["loss"]
    before = {key: t.clone() for key, t in trainer.net.state_dict().items()}
    with trainer.learner.examined(average=True) as net:
        assert not torch.equal(net.head[-1].weight, before["head.4.weight"])
    assert all(torch.equal(t, before[key]) for key, t in trainer.net.state_dict().items())
    net, _ = load_net(tmp_path, torch.device("cpu"))
    assert torch.equal(net.head[-1].weight, load_file(tmp_path / "ema.safetensors")["head.4.weight"])


def test_the_pictures_are_the_first_of_each_class(digits, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(examining.plots, "reconstructions", lambda *arguments: drawn.append(arguments))
    recipe = dataclasses.replace(SHORT, grid="none", mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3))
    trainer = Trainer(Run(recipe, digits), tmp_path)
    trainer.invert()
    [(originals, recovered, path)] = drawn
    labels = trainer.data.validation.labels.tolist()
    first = [trainer.validation[0, labels.index(k)].image for k in range(10)]
    torch.testing.assert_close(originals, torch.stack(first).float() / 255)
    assert not torch.equal(originals, recovered)
    torch.testing.assert_close(originals, recovered)
    assert path == tmp_path / "reconstructions.png"


def test_curves_of_several_runs_share_a_picture(tmp_path):
    def course(loss):
        train = [{"kind": "train", "step": 10 * i, "loss": loss, "top1": 10.0 * i} for i in range(1, 6)]
        return [*train, {"kind": "validation", "step": 50, "loss": loss, "top1": 60.0}]

    for names in (["one"], ["one", "another"]):
        courses = {name: course_of(course(1.0 + i)) for i, name in enumerate(names)}
        plots.save(plots.draw_curves(courses), tmp_path / f"{len(names)}.png")
    one, two = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")).astype(int) for n in (1, 2))
    orange = [((p - (255, 127, 14)) ** 2).sum(-1).min() for p in (one, two)]  # the second run's colour
    assert orange[1] < 500 < orange[0]


@pytest.mark.slow
def test_a_failed_run_can_go_on(digits, tmp_path):
    """What was done before too many bad images is kept; the run goes on when they are mended."""
    tree = tmp_path / "tree"
    shutil.copytree(digits, tree)
    contents = {path: path.read_bytes() for path in sorted(tree.glob("train/*/*.png"))[:3]}
    fit(Trainer(Run(SHORT, str(tree)), tmp_path / "whole"))
    for path in contents:
        path.write_bytes(b"no image")
    with pytest.raises(
        InputError, match=r"not an image file \(\d of 1442 training images can't be read, and --max-bad"
    ):
        fit(Trainer(Run(SHORT, str(tree)), tmp_path / "cut"))
    assert (tmp_path / "cut" / "bad_images.jsonl").exists()
    with pytest.raises(InputError, match="training images can't be read, and --max-bad"):
        fit(resumed(tmp_path / "cut"))  # nor does the same command get past it
    for path, content in contents.items():
        path.write_bytes(content)
    assert fit(resumed(tmp_path / "cut", max_bad=1.0)).step == 10


@pytest.mark.slow
def test_few_bad_images_are_replaced_logged_and_the_same_each_time(digits, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(digits, tree)
    bad = sorted(tree.glob("train/*/*.png"))[::500]
    for path in bad:
        path.write_bytes(b"no image")
    for name, workers in (("a", 0), ("b", 2)):
        trainer = fit(Trainer(Run(SHORT, str(tree), max_bad=0.01, workers=workers), tmp_path / name))
        lines = [json.loads(line) for line in (tmp_path / name / "bad_images.jsonl").read_text().splitlines()]
        assert [line["name"] for line in lines] == [str(path) for path in bad if str(path) in trainer.books.bad]
        assert len(lines) == rows(tmp_path / name, "train")[-1]["bad_images"] > 0
    assert same(tmp_path / "a", tmp_path / "b")


def test_two_runs_do_not_write_to_one_folder(digits, tmp_path):
    class Second(Reporter):
        def at(self, done):
            if done == 2:
                with pytest.raises(
                    InputError, match=f"another run is writing to {tmp_path} now; wait, or take another"
                ):
                    fit(Trainer(Run(ONE_EPOCH, digits), tmp_path))

    trainer = Trainer(Run(ONE_EPOCH, digits), tmp_path)
    fit(trainer, Second(None, total=trainer.total))
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 5]


def test_a_second_run_changes_nothing_in_the_folder_of_the_first(digits, tmp_path):
    """It is refused before it puts aside what the first is writing; reading is no claim."""
    first = Trainer(Run(ONE_EPOCH, digits), tmp_path)
    first.claim()
    first.save()
    (tmp_path / "checkpoints" / ".partial-step_000000001").mkdir()  # as if it were saving
    second = Trainer(Run(ONE_EPOCH, digits), tmp_path)
    with pytest.raises(InputError, match=f"another run is writing to {tmp_path} now; wait, or take another"):
        second.claim()
    assert second.restore()
    first.run.save(tmp_path / "config.json")
    load_net(tmp_path, torch.device("cpu"))
    assert (tmp_path / "checkpoints" / ".partial-step_000000001").is_dir()
    first.books.close()


def test_a_restart_of_a_run_whose_checkpoints_are_all_damaged_begins_nothing(digits, tmp_path):
    fit(Trainer(Run(ONE_EPOCH, digits), tmp_path))
    log = (tmp_path / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "checkpoints").glob("step_*/state.pt"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match=r"no checkpoint in .*: all are damaged"):
            resumed(tmp_path)
    trainer = Trainer(Run(ONE_EPOCH, digits), tmp_path)
    trainer.claim()
    for _ in range(2):
        with pytest.raises(InputError, match=r"no checkpoint in .*: all are damaged"):
            trainer.restore()
    trainer.books.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_bad_validation_images_are_refused_or_counted(digits, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(digits, tree)
    bad = min(tree.glob("val/*/*.png"))
    content = bad.read_bytes()
    fit(Trainer(Run(ONE_EPOCH, str(tree)), tmp_path / "whole"))
    bad.write_bytes(b"no image")
    fit(Trainer(Run(ONE_EPOCH, str(tree), skip_bad=True), tmp_path / "skip"))
    [row] = rows(tmp_path / "skip", "validation")
    assert (row["images"], row["unread"]) == (354, 1)
    assert resumed(tmp_path / "skip").evaluate().unread == 1
    with pytest.raises(InputError, match="cannot read the image"):
        fit(Trainer(Run(ONE_EPOCH, str(tree)), tmp_path / "cut"))
    bad.write_bytes(content)
    fit(resumed(tmp_path / "cut"))  # evaluates, for that was still to be done
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


def test_a_run_does_not_go_on_with_other_data(digits, tmp_path):
    fit(Trainer(Run(ONE_EPOCH, digits), tmp_path / "run"))
    moved = tmp_path / "moved"
    shutil.copytree(digits, moved)
    assert resumed(tmp_path / "run", data=str(moved)).step == 5
    next(moved.glob("train/3/*.png")).unlink()
    with pytest.raises(
        InputError, match=r"the training data is not that of the run in .*: other classes or number of images"
    ):
        resumed(tmp_path / "run", data=str(moved))


def test_a_run_with_something_new_says_so(digits, tmp_path):
    trainer = fit(Trainer(Run(ONE_EPOCH, digits), tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["environment"]["torch"] == torch.__version__
    assert config["environment"]["threads"] == torch.get_num_threads()
    said = []
    trainer.restore(say=said.append)
    assert said == []
    config["environment"]["torch"] = "2.0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    trainer.restore(say=said.append)
    [line] = said
    assert line.endswith(f"not what the run was made with: torch: 2.0, now {torch.__version__}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_digits_are_learnt_and_inverted(digits, tmp_path, seed):
    """The promise of the demo, by the recipe as it is."""
    trainer = fit(Trainer(Run(RECIPES["digits"], digits, seed=seed), tmp_path))
    assert trainer.evaluate().top1 >= 98.5
    assert rows(tmp_path, "validation")[-1]["top1"] >= 98.5
    error = trainer.invert()
    assert error.maximum == 0
    assert trainer.books.drift == 0


def test_refusals(digits, tmp_path):
    def run(**changes):
        return Run(dataclasses.replace(SHORT, **changes), digits)

    for make, words in [
        (lambda: Trainer(run(size=40), tmp_path), "irevnet_small needs a size that 16 divides, got 40"),
        (lambda: Trainer(run(test_size=40), tmp_path), "irevnet_small needs a size that 16 divides, got 40"),
        (
            lambda: Trainer(run(model="irevnet_c"), tmp_path),
            "unknown model 'irevnet_c'; there are glow, iresnet, irevnet_a",
        ),
        (lambda: Trainer(run(model_options={"depth": 3}), tmp_path), "irevnet_small has no option 'depth'"),
        (
            lambda: Trainer(run(size=16, batch_size=1), tmp_path),
            "irevnet_small needs a batch of two or more at size 16",
        ),
        (lambda: Trainer(dataclasses.replace(run(), device="meta"), tmp_path), "no device 'meta' here: "),
        (lambda: Trainer(run(batch_size=5000), tmp_path), "the batch size 5000 is more than the 1442 training images"),
        (
            lambda: Trainer(dataclasses.replace(run(), accumulate=3), tmp_path),
            "the batch size 256 can't be shared equally by 1 processes in 3 pieces",
        ),
        (lambda: Trainer(dataclasses.replace(run(), device="cuda:99"), tmp_path), "no device 'cuda:99' here: "),
        (lambda: Trainer(dataclasses.replace(run(), device="gpu"), tmp_path), "no device 'gpu' here: "),
        (lambda: Trainer(dataclasses.replace(run(), data="nowhere"), tmp_path), "no such folder: nowhere"),
        (lambda: Run.load(tmp_path / "nothing" / "config.json"), "config.json is missing"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    for changes in ({"backprop": "all"}, {"grid": "all"}, {"autocast": "fp8"}, {"colour": "sepia"}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} must be one of .*, got '"):
            run(**changes)


def test_a_damaged_run_goes_on_from_the_checkpoint_before(digits, tmp_path):
    fit(Trainer(Run(SHORT, digits), tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("model.safetensors", "curves.png"):
        (tmp_path / "cut" / name).unlink()
    newest = tmp_path / "cut" / "checkpoints" / "step_000000010" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    said = []
    trainer = Trainer(Run.load(tmp_path / "cut" / "config.json"), tmp_path / "cut")
    assert trainer.restore(say=said.append)
    assert trainer.step == 5
    assert "step_000000010 is damaged and passed over: state.pt is not what was written" in said[0]
    fit(trainer)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    config = tmp_path / "cut" / "config.json"
    config.write_text(config.read_text().replace('"batch_size": 256', '"batch_size": "many"'))
    with pytest.raises(InputError, match=r"cannot read .*config\.json: batch_size is 'many'"):
        Run.load(config)
    config.write_text("{}")
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        Run.load(config)


def test_evaluation_takes_no_more_images_at_once_than_training(digits, tmp_path):
    trainer = Trainer(Run(dataclasses.replace(ONE_EPOCH, batch_size=256), digits, accumulate=4), tmp_path)
    assert [len(labels) for _, labels, _ in trainer.examiner.batches([])] == [64] * 5 + [35]


def test_what_the_main_process_cannot_write_ends_all(digits, tmp_path, monkeypatch):
    """The others wait to be told, whichever error it is: a full disk is one of the system's."""
    trainer = Trainer(Run(ONE_EPOCH, digits), tmp_path)
    monkeypatch.setattr(training.World, "first", lambda world, thing: thing)
    trainer.world = dataclasses.replace(trainer.world, size=2)
    monkeypatch.setattr(training.checkpoints, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match="No space left"):
        trainer.finish({})


def test_a_checkpoint_of_another_network_is_refused(digits, tmp_path):
    fit(Trainer(Run(ONE_EPOCH, digits), tmp_path))
    other = replace(Run(ONE_EPOCH, digits), model_options={"blocks": (2, 2, 2)})
    with pytest.raises(InputError, match=r"the checkpoints in .* are of another network: ") as caught:
        Trainer(other, tmp_path).restore()
    assert "\n" not in str(caught.value)


class Poison(torch.nn.Identity):
    """Makes a value that is not finite at some steps."""

    def __init__(self, at):
        super().__init__()
        self.at, self.step = set(at), 0

    def forward(self, x):
        if self.training:
            self.step += 1
            if self.step in self.at:
                return x * math.nan
        return x


@pytest.mark.parametrize(("grid", "where"), [("none", "loss"), ("exact", "loss"), ("exact", "gradient")])
def test_a_step_without_a_finite_loss_or_gradient_is_not_taken(digits, tmp_path, grid, where):
    """Nothing of it stays: weights, statistics, momentum and average are those of the step before."""
    run = Run(dataclasses.replace(SHORT, grid=grid, backprop="store", ema_decay=0.9), digits)
    trainer = Trainer(run, tmp_path)
    batches = trainer._batches()
    trainer.learner.step([next(batches)], 0.1, 1)
    trainer.learner.update_average()
    if where == "loss":
        trainer.net.body[3].function.append(Poison([1]))
    else:
        hook = trainer.net.head[-1].weight.register_hook(lambda gradient: gradient * math.nan)
    trainer.net.train()
    before = copy.deepcopy(trainer.learner.tensors())
    outcome = trainer.learner.step([next(batches)], 0.1, 2)
    assert not outcome.finite
    if where == "gradient":
        assert outcome.trouble == "it was, but not its gradient"
        hook.remove()
    after = trainer.learner.tensors()
    statistics = [key for key in before[0] if "num_batches" not in key]
    assert all(torch.equal(before[0][key], after[0][key]) for key in statistics)
    assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])
    for i, moment in before[2]["state"].items():
        assert torch.equal(moment["momentum_buffer"], after[2]["state"][i]["momentum_buffer"])
    assert trainer.learner.step([next(batches)], 0.1, 3).finite


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(digits, tmp_path):
    trainer = Trainer(replace(Run(SHORT, digits, max_skipped=3), backprop="store"), tmp_path / "few")
    trainer.net.body[3].function.append(Poison([2, 3, 6]))
    fit(trainer)
    assert trainer.books.skipped == 3
    skipped = rows(tmp_path / "few", "skipped")
    assert [row["step"] for row in skipped] == [2, 3, 6]
    sampler = list(StepSampler(1442, SHORT.batch_size, seed=0, start=0, stop=10))
    assert [row["images"] for row in skipped] == [[i for _, i in sampler[k - 1]] for k in (2, 3, 6)]
    assert [row["skipped"] for row in rows(tmp_path / "few", "train")] == [1, 2, 2, 3, 3, 3]
    assert [row["loss"] is None for row in rows(tmp_path / "few", "train")] == [False, False, False, True, False, False]
    trainer = Trainer(replace(Run(SHORT, digits, max_skipped=2), backprop="store"), tmp_path / "many")
    trainer.net.body[3].function.append(Poison([2, 4, 5]))
    with pytest.raises(
        DivergedError, match=r"not finite in 2 steps in a row, the last is step 5 \(.*nan.*\); try a lower --lr"
    ):
        fit(trainer)


def test_a_reconstruction_that_drifts_ends_the_run_which_can_go_on_otherwise(digits, tmp_path, monkeypatch):
    strict = inv.Reconstruct(drift_warn=0, drift_error=0)
    monkeypatch.setitem(BACKPROP, "reconstruct", strict)
    run = replace(Run(SHORT, digits), grid="none")
    with pytest.raises(InputError, match=r"the reconstruction is off by \de-\d+ at step 1, .* --backprop recompute"):
        fit(Trainer(run, tmp_path))
    trainer = fit(Trainer(replace(run, backprop="recompute"), tmp_path))
    assert trainer.step == trainer.total
    assert trainer.books.drift is None


@pytest.mark.slow
def test_what_is_kept_decides_the_memory_and_nothing_else(digits, tmp_path):
    runs = {name: Run(dataclasses.replace(ONE_EPOCH, backprop=name, grid="none"), digits) for name in BACKPROP}
    trainers = {name: fit(Trainer(run, tmp_path / name)) for name, run in runs.items()}
    store, reconstruct = trainers["store"], trainers["reconstruct"]
    assert store.peak > 1.5 * reconstruct.peak
    assert 0 < reconstruct.books.drift < 1e-3
    losses = [rows(tmp_path / name, "validation")[0]["train_loss"] for name in trainers]
    assert losses[1] == losses[0]
    assert abs(losses[2] - losses[0]) < 0.1
    between = (store.peak + reconstruct.peak) // 2
    budget = fit(Trainer(dataclasses.replace(runs["store"], budget=between), tmp_path / "budget"))
    assert reconstruct.peak < budget.peak < store.peak
    assert isinstance(budget.net.backprop, inv.Budget)


@pytest.mark.parametrize("grid", ["exact", pytest.param("exact32", marks=pytest.mark.slow)])
def test_on_a_grid_what_is_kept_changes_no_bit(grid, digits, tmp_path):
    """Nor does the way back: the images come back as they were, or as they entered the grid."""
    runs = {name: Run(dataclasses.replace(ONE_EPOCH, backprop=name, grid=grid), digits) for name in BACKPROP}
    trainers = {name: fit(Trainer(run, tmp_path / name)) for name, run in runs.items()}
    assert same(tmp_path / "store", tmp_path / "recompute")
    assert same(tmp_path / "store", tmp_path / "reconstruct")
    assert trainers["reconstruct"].books.drift == 0
    error = trainers["reconstruct"].invert()
    assert error.maximum == 0 if grid == "exact" else 0 < error.maximum < 1e-4
    net, _ = load_net(tmp_path / "store", torch.device("cpu"))
    assert net.grid == inv.Sequential(grid=grid).grid


def test_autocast_is_the_recipes(digits, tmp_path):
    trainer = Trainer(Run(dataclasses.replace(ONE_EPOCH, autocast="bf16"), digits), tmp_path)
    seen = set()
    trainer.net.body[3].function[-1].register_forward_hook(lambda _, x, y: seen.add(y.dtype))
    fit(trainer)
    assert seen == {torch.bfloat16}
    assert trainer.books.drift == 0
    assert trainer.invert().maximum == 0


def test_activations_beyond_the_grid_are_skipped_and_then_end_the_run(digits, tmp_path):
    run = Run(dataclasses.replace(SHORT, lr=1e6, warmup_epochs=0), digits, max_skipped=2)
    words = r"in 2 steps in a row, the last is step 3 \(the activations reach \S+, and the grid ends at 8192\)"
    with pytest.raises(DivergedError, match=words):
        fit(Trainer(run, tmp_path))


def test_a_function_that_does_not_repeat_its_bits_ends_the_run(digits, tmp_path):
    class Noisy(torch.nn.Identity):
        generator = torch.Generator()

        def forward(self, x):
            return x + 1e-6 * torch.rand(x.shape, generator=self.generator)

    trainer = Trainer(Run(SHORT, digits), tmp_path)
    trainer.net.body[3].function.append(Noisy())
    before = {key: value.clone() for key, value in trainer.net.named_parameters()}
    with pytest.raises(InputError, match="the reconstruction is no longer exact at step 1, so that the gradients are"):
        fit(trainer)
    for key, parameter in trainer.net.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[key])


def test_tensorboard_has_the_numbers_of_the_rows(digits, tmp_path):
    run = Run(ONE_EPOCH, digits, tensorboard=True)
    trainer = Trainer(run, tmp_path)
    with pytest.raises(Terminated):
        fit(trainer, Stopping(trainer, 3, signal.SIGTERM))
    fit(resumed(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        expected = [(row["step"], pytest.approx(row[key])) for row in rows(tmp_path, "train")]
        assert found == expected


def test_a_learner_needs_no_loader():
    """A step from tensors at hand."""
    run = Run(dataclasses.replace(SHORT, size=32))
    learner = training.Learner(run, 10, torch.device("cpu"), training.World())
    batch = Batch(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), torch.rand(4, 5), [(0, 0)] * 4, [])
    first = learner.step([batch], 0.1, 1)
    assert first.sums[2] == 4
    assert Preparation(run.recipe)(batch.images).shape == (4, 3, 32, 32)
    for _ in range(5):
        last = learner.step([batch], 0.1, 1)
    assert last.sums[0] < first.sums[0]


@pytest.mark.parametrize("content", ["[1]\n", '{"loss": 1}\n', "{"])
def test_a_log_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"cannot read .*metrics\.jsonl: "):
        rows_of(tmp_path)
