"""Training: the schedule, the same bits twice, going on after an interruption, what is written and measured."""

import dataclasses
import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

import zoo
from zoo import training
from zoo.digits import write_digits
from zoo.errors import InputError
from zoo.evaluation import evaluate
from zoo.inversion import InversionError, inversion_error, relative_errors
from zoo.progress import Reporter
from zoo.recipes import RECIPES, Recipe
from zoo.training import TIMING, Interrupted, Run, Trainer, learning_rate


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(write_digits(tmp_path_factory.mktemp("digits")))


SHORT = dataclasses.replace(RECIPES["digits"], epochs=2, batch_size=256)  # 5 steps in an epoch


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
    assert 0 < error.median <= error.maximum < 1e-5
    net = zoo.create("irevnet_small", num_classes=10)
    net.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
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
    net = zoo.create("irevnet_small", num_classes=3).eval()
    batches = [torch.rand(3, 3, 32, 32), torch.rand(2, 3, 32, 32)]
    error = inversion_error(net, batches)
    with torch.no_grad():
        each = torch.cat([relative_errors(net.inverse(net.features(b)), b) for b in batches])
    assert error == InversionError.of(each)


def test_refusals(digits, tmp_path):
    def run(**changes):
        return Run(dataclasses.replace(SHORT, **changes), digits)

    for make, words in [
        (lambda: Trainer(run(size=40), tmp_path), "irevnet_small needs a size that 16 divides, got 40"),
        (lambda: Trainer(run(model="irevnet_c"), tmp_path), "unknown model 'irevnet_c'; there are irevnet_a"),
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
    checkpoint.unlink()
    with pytest.raises(InputError, match=r"checkpoint\.pt is missing"):
        Trainer.resume(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        Trainer.resume(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(digits, tmp_path):
    with pytest.raises(InputError, match="the loss is nan at step 5; try a lower --lr"):
        fit(Trainer(Run(dataclasses.replace(SHORT, lr=1e18, warmup_epochs=0), digits), tmp_path))
