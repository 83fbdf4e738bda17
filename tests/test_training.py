"""Training: the schedule, the same bits twice, going on after an interruption, what is written and measured."""

import copy
import dataclasses
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import invertible as inv
import zoo
from zoo import plots, training
from zoo.digits import write_digits
from zoo.errors import InputError
from zoo.evaluation import evaluate
from zoo.inversion import InversionError, relative_errors
from zoo.progress import Reporter
from zoo.recipes import RECIPES, Recipe
from zoo.run import BACKPROP, Run
from zoo.training import TIMING, Interrupted, Trainer, learning_rate


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(write_digits(tmp_path_factory.mktemp("digits")))


SHORT = dataclasses.replace(RECIPES["digits"], epochs=2, batch_size=256)  # 5 steps in an epoch


ONE_EPOCH = dataclasses.replace(SHORT, epochs=1)


def fit(trainer):
    trainer.fit(Reporter(Console(file=io.StringIO()), total=trainer.total))
    return trainer


def rows(folder, *, timing=False):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines if timing else [{k: v for k, v in row.items() if k not in TIMING} for row in lines]


def same(a, b):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_one_seed_gives_the_same_bits_twice_and_another_gives_others(digits, tmp_path):
    for name, seed, workers in [("a", 0, 0), ("b", 0, 1), ("c", 1, 0)]:
        fit(Trainer(Run(SHORT, digits, seed=seed, workers=workers), tmp_path / name))
    assert same(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")
    assert set(rows(tmp_path / "a", timing=True)[0]) == {*rows(tmp_path / "a")[0], *TIMING}


@pytest.mark.parametrize("stop_at", [0, 3, 5, 9])
def test_an_interrupted_run_ends_with_the_same_bits(digits, tmp_path, monkeypatch, stop_at):
    """There are 5 steps in an epoch: interrupted before, in the middle of, and at the end of one."""
    fit(Trainer(Run(SHORT, digits), tmp_path / "whole"))
    trainer = Trainer(Run(SHORT, digits), tmp_path / "cut")
    flag = training.threading.Event()
    real = learning_rate

    def stopping(recipe, step, **lengths):
        if step >= stop_at - 1:
            flag.set()
        return real(recipe, step, **lengths)

    monkeypatch.setattr(training, "_stop_on_interrupt", lambda: training.contextmanager(lambda: (yield flag))())
    monkeypatch.setattr(training, "learning_rate", stopping)
    if stop_at == 0:
        flag.set()
    with pytest.raises(Interrupted):
        fit(trainer)
    assert trainer.step == stop_at
    monkeypatch.undo()
    resumed = Trainer.resume(tmp_path / "cut")
    assert resumed.step == stop_at
    fit(resumed)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert resumed.seconds > 0


def test_what_a_run_leaves_behind(digits, tmp_path):
    trainer = fit(Trainer(Run(SHORT, digits, seed=3), tmp_path / "run"))
    error = trainer.invert()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "model.safetensors",
        "reconstructions.png",
    ]
    assert Run.load(tmp_path / "run" / "config.json") == trainer.run
    assert error == InversionError(0, 0, 0)
    net = zoo.create("irevnet_small", num_classes=10)
    net.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    net.grid = "exact"
    result = evaluate(net, trainer._validation_batches())
    last = rows(tmp_path / "run")[-1]
    assert (result.top1, result.top5, result.loss) == (last["top1"], last["top5"], last["loss"])
    assert last["step"] == trainer.total == 10
    assert trainer.images_per_second > 0


@given(st.integers(1, 50), st.integers(2, 40), st.floats(0, 3), st.booleans())
def test_the_schedule_is_a_function_of_the_step(epochs, per_epoch, warmup_epochs, cosine):
    drops = None if cosine else (0.25, 0.5, 0.75)
    recipe = Recipe("x", "m", 1, 0.1, 0.0, epochs=epochs, warmup_epochs=warmup_epochs, drops=drops)
    total = epochs * per_epoch
    rates = [learning_rate(recipe, step, total=total, per_epoch=per_epoch) for step in range(total)]
    warmup = round(warmup_epochs * per_epoch)
    assert all(0 <= rate <= 0.1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < total and (cosine or warmup < round(total / 4)):
        assert math.isclose(rates[warmup], 0.1)


def test_the_papers_schedule_at_its_boundaries():
    """0.1, tenfold less every 160k of 600k steps."""
    recipe = RECIPES["imagenet"]
    at = {step: learning_rate(recipe, step, total=600_000, per_epoch=5004) for step in range(0, 600_000, 40_000)}
    assert {step: rate for step, rate in at.items() if step % 160_000 == 0} == pytest.approx(
        {0: 0.1, 160_000: 0.01, 320_000: 0.001, 480_000: 0.0001}
    )
    for drop in (160_000, 320_000, 480_000):
        before, after = (learning_rate(recipe, s, total=600_000, per_epoch=5004) for s in (drop - 1, drop))
        assert before == pytest.approx(10 * after)
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay, recipe.iterations) == (256, 0.9, 1e-4, 600_000)
    assert (recipe.size, recipe.resize, recipe.crop_scale, recipe.crop_ratio) == (224, 256, (0.08, 1), (3 / 4, 4 / 3))
    assert recipe.top1 == "not run"


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


def test_the_papers_inversion_error():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    recovered = torch.tensor([[3.0, 4.5], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert relative_errors(recovered, x).tolist() == pytest.approx([0.1, 0.0, math.inf, 0.0])
    assert InversionError.of(torch.tensor([1.0, 2.0, 6.0])) == InversionError(3.0, 2.0, 6.0)
    assert InversionError.of(torch.tensor([1.0, 3.0])).median == 2.0


def test_a_run_is_the_recipe_and_nothing_else(digits, tmp_path):
    """Against plain SGD, written out: momentum, decay, smoothing, schedule, and the figures of the row."""
    changes = {"lr": 0.02, "weight_decay": 0.05, "label_smoothing": 0.2, "warmup_epochs": 0.4}
    recipe = dataclasses.replace(SHORT, epochs=1, batch_size=480, **changes)  # 3 steps, the first to warm up
    trainer = Trainer(Run(recipe, digits), tmp_path)
    net = copy.deepcopy(trainer.net).train()
    batches = [(images.clone(), labels) for images, labels in trainer._batches()]
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    losses, hits = [], 0
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
    fit(trainer)
    for name, p in trainer.net.named_parameters():
        torch.testing.assert_close(p, dict(net.named_parameters())[name], rtol=1e-3, atol=1e-4)
    row = rows(tmp_path)[0]
    assert row["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert row["train_top1"] == pytest.approx(100 * hits / (3 * 480), abs=0.2)


def test_the_pictures_are_the_first_of_each_class(digits, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training.plots, "reconstructions", lambda *arguments: drawn.append(arguments))
    trainer = Trainer(Run(SHORT, digits, grid="none"), tmp_path)
    trainer.invert()
    [(originals, recovered, path)] = drawn
    first = [trainer.validation[0, [lab for _, lab in trainer.validation.samples].index(k)][0] for k in range(10)]
    assert torch.equal(originals, torch.stack(first).float() / 255)
    assert not torch.equal(originals, recovered)
    torch.testing.assert_close(originals, recovered)
    assert path == tmp_path / "reconstructions.png"


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


def test_a_failed_run_can_go_on(digits, tmp_path):
    """What was done before a bad image is kept; the run goes on when it is mended."""
    tree = tmp_path / "tree"
    shutil.copytree(digits, tree)
    bad = min(tree.glob("train/*/*.png"))
    content = bad.read_bytes()
    fit(Trainer(Run(SHORT, str(tree)), tmp_path / "whole"))
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match="not an image file"):
        fit(Trainer(Run(SHORT, str(tree)), tmp_path / "cut"))
    bad.write_bytes(content)
    resumed = fit(Trainer.resume(tmp_path / "cut"))
    assert resumed.step == 10
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_a_run_does_not_go_on_with_other_data(digits, tmp_path):
    fit(Trainer(Run(dataclasses.replace(SHORT, epochs=1), digits), tmp_path / "run"))
    moved = tmp_path / "moved"
    shutil.copytree(digits, moved)
    assert Trainer.resume(tmp_path / "run", data=str(moved)).step == 5
    next(moved.glob("train/3/*.png")).unlink()
    with pytest.raises(
        InputError, match=r"the training data is not that of the run in .*: other classes or number of images"
    ):
        Trainer.resume(tmp_path / "run", data=str(moved))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_digits_are_learnt_and_inverted(digits, tmp_path, seed):
    """The promise of the demo, by the recipe as it is."""
    trainer = fit(Trainer(Run(RECIPES["digits"], digits, seed=seed), tmp_path))
    assert trainer.evaluate().top1 >= 98.5
    assert rows(tmp_path)[-1]["top1"] >= 98.5
    error = trainer.invert()
    assert error.maximum == 0
    assert trainer.drift == 0


def test_refusals(digits, tmp_path):
    def run(**changes):
        return Run(dataclasses.replace(SHORT, **changes), digits)

    for make, words in [
        (lambda: Trainer(run(size=40), tmp_path), "irevnet_small needs a size that 16 divides, got 40"),
        (lambda: Trainer(run(model="irevnet_c"), tmp_path), "unknown model 'irevnet_c'; there are irevnet_a"),
        (
            lambda: Trainer(run(size=16, batch_size=1), tmp_path),
            "irevnet_small needs a batch of two or more at size 16",
        ),
        (lambda: Trainer(dataclasses.replace(run(), device="meta"), tmp_path), "no device 'meta' here: "),
        (lambda: Trainer(run(batch_size=5000), tmp_path), "the batch size 5000 is more than the 1442 training images"),
        (lambda: Trainer(dataclasses.replace(run(), device="cuda:99"), tmp_path), "no device 'cuda:99' here: "),
        (lambda: Trainer(dataclasses.replace(run(), device="gpu"), tmp_path), "no device 'gpu' here: "),
        (lambda: Trainer(dataclasses.replace(run(), data="nowhere"), tmp_path), "no such folder: nowhere"),
        (lambda: Trainer.resume(tmp_path / "nothing"), "config.json is missing"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_damaged_runs_are_refused_in_one_line(digits, tmp_path):
    fit(Trainer(Run(dataclasses.replace(SHORT, epochs=1), digits), tmp_path))
    checkpoint = tmp_path / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cannot read .*checkpoint\.pt"):
        Trainer.resume(tmp_path)
    for content in (b"", b"nothing"):
        checkpoint.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*checkpoint\.pt: \S"):
            Trainer.resume(tmp_path)
    torch.save({"net": {}}, checkpoint)
    with pytest.raises(InputError, match=r"cannot read .*checkpoint\.pt: 'optimizer'"):
        Trainer.resume(tmp_path)
    checkpoint.unlink()
    with pytest.raises(InputError, match=r"checkpoint\.pt is missing"):
        Trainer.resume(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"batch_size": 256', '"batch_size": "many"'))
    with pytest.raises(InputError, match=r"cannot read .*config\.json: batch_size is 'many'"):
        Trainer.resume(tmp_path)
    config.write_text("{}")
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        Trainer.resume(tmp_path)


@pytest.mark.parametrize(
    ("backprop", "words"),
    [("store", "the loss is nan at step 5"), ("reconstruct", "activations are not finite at step 2")],
)
def test_a_loss_that_is_not_finite_ends_the_run(backprop, words, digits, tmp_path):
    run = Run(dataclasses.replace(SHORT, lr=1e18, warmup_epochs=0), digits, backprop=backprop, grid="none")
    with pytest.raises(InputError, match=f"{words}; try a lower --lr"):
        fit(Trainer(run, tmp_path))


def test_a_reconstruction_that_drifts_ends_the_run_which_can_go_on_otherwise(digits, tmp_path, monkeypatch):
    strict = inv.Reconstruct(drift_warn=0, drift_error=0)
    monkeypatch.setitem(BACKPROP, "reconstruct", strict)
    with pytest.raises(InputError, match=r"the reconstruction is off by \de-\d+ at step 1, .* --backprop recompute"):
        fit(Trainer(Run(SHORT, digits, grid="none"), tmp_path))
    trainer = fit(Trainer.resume(tmp_path, backprop="recompute"))
    assert trainer.step == trainer.total
    assert trainer.drift is None


def test_what_is_kept_decides_the_memory_and_nothing_else(digits, tmp_path):
    trainers = {
        name: fit(Trainer(Run(ONE_EPOCH, digits, backprop=name, grid="none"), tmp_path / name)) for name in BACKPROP
    }
    assert trainers["store"].peak > 1.5 * trainers["reconstruct"].peak
    assert 0 < trainers["reconstruct"].drift < 1e-3
    losses = [trainer.rows[0]["train_loss"] for trainer in trainers.values()]
    assert losses[1] == losses[0]
    assert abs(losses[2] - losses[0]) < 0.1
    with pytest.raises(ValueError, match="grid must be one of exact, exact32, none, got 'all'"):
        Run(SHORT, digits, grid="all")
    with pytest.raises(ValueError, match="backprop must be one of store, recompute, reconstruct, got 'all'"):
        Run(SHORT, digits, backprop="all")


@pytest.mark.parametrize("grid", ["exact", "exact32"])
def test_on_a_grid_what_is_kept_changes_no_bit(grid, digits, tmp_path):
    """Nor does the way back: the images come back as they were, or as they entered the grid."""
    trainers = {
        name: fit(Trainer(Run(ONE_EPOCH, digits, backprop=name, grid=grid), tmp_path / name)) for name in BACKPROP
    }
    assert same(tmp_path / "store", tmp_path / "recompute")
    assert same(tmp_path / "store", tmp_path / "reconstruct")
    assert trainers["reconstruct"].drift == 0
    error = trainers["reconstruct"].invert()
    assert error.maximum == 0 if grid == "exact" else 0 < error.maximum < 1e-4
    net, _ = training.load_net(tmp_path / "store", torch.device("cpu"))
    assert net.grid == inv.Sequential(grid=grid).grid


def test_activations_beyond_the_grid_end_the_run(digits, tmp_path):
    run = Run(dataclasses.replace(SHORT, lr=1e6, warmup_epochs=0), digits)
    words = r"the activations reach \S+ at step 2, and the grid ends at 8192; try a lower --lr, or --grid none"
    with pytest.raises(InputError, match=words):
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
