"""The recipes' figures, and the learning rate at every boundary."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zoo.building import build, optimizer_of
from zoo.errors import InputError
from zoo.recipes import RECIPES, Recipe
from zoo.run import Run
from zoo.schedule import learning_rate, scaled, steps

IMAGENET = [name for name in RECIPES if name != "digits"]


@given(st.integers(1, 50), st.integers(2, 40), st.floats(0, 3), st.floats(0, 0.5), st.booleans())
def test_the_learning_rate_is_a_function_of_the_step(epochs, per_epoch, warmup_epochs, start, cosine):
    drops = None if cosine else (0.25, 0.5, 0.75)
    recipe = Recipe("x", "m", 1, 0.1, 0.0, epochs=epochs, warmup_epochs=warmup_epochs, warmup_start=start, drops=drops)
    total = steps(recipe, per_epoch=per_epoch)
    assert total == epochs * per_epoch
    rates = [learning_rate(recipe, step, total=total, per_epoch=per_epoch) for step in range(total)]
    warmup = round(warmup_epochs * per_epoch)
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert all(rate > 0.1 * start for rate in rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < total and (cosine or warmup < round(total / 4)):
        assert math.isclose(rates[warmup], 0.1)


@pytest.mark.parametrize(
    "name", ["paper_irevnet_a", "paper_irevnet_b", "gomez_revnet56", "gomez_revnet104", "gomez_resnet50"]
)
def test_the_papers_figures_and_its_schedule_at_every_boundary(name):
    """Section 3.2: 0.1, tenfold less every 160k of 600k steps."""
    recipe = RECIPES[name]
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay, recipe.nesterov) == (256, 0.9, 1e-4, False)
    assert (recipe.size, recipe.resize, recipe.crop_scale, recipe.crop_ratio) == (224, 256, (0.08, 1), (3 / 4, 4 / 3))
    assert (recipe.mean, recipe.std, recipe.colour, recipe.flip) == ((0, 0, 0), (1, 1, 1), "inception", True)
    assert (recipe.warmup_epochs, recipe.label_smoothing) == (0, 0)
    assert recipe.decay_norms == name.startswith("paper")
    total = steps(recipe, per_epoch=5004)
    assert total == 600_000
    for i, drop in enumerate((0, 160_000, 320_000, 480_000)):
        assert learning_rate(recipe, drop, total=total, per_epoch=5004) == pytest.approx(0.1 / 10**i)
        if drop:
            assert learning_rate(recipe, drop - 1, total=total, per_epoch=5004) == pytest.approx(0.1 / 10 ** (i - 1))
    assert learning_rate(recipe, total - 1, total=total, per_epoch=5004) == pytest.approx(1e-4)


def test_the_released_codes_figures():
    recipe = RECIPES["released_irevnet_b"]
    total = steps(recipe, per_epoch=5005)
    assert total == 128 * 5005
    for step, rate in [(0, 0.1), (160_159, 0.1), (160_160, 0.01), (320_320, 0.001), (480_480, 1e-4)]:
        assert learning_rate(recipe, step, total=total, per_epoch=5005) == pytest.approx(rate)
    with torch.device("meta"):
        net = build(recipe, num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) == 125_120_356
    norms = [part.momentum for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms[-1] == 0.9
    assert set(norms[:-1]) == {0.1}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_says_where_it_is_from(name):
    recipe = RECIPES[name]
    with torch.device("meta"):
        net = build(recipe, num_classes=1000)
        logits = net.eval()(torch.empty(1, 3, recipe.evaluation_size, recipe.evaluation_size))
    assert logits.shape == (1, 1000)
    assert recipe.source
    assert recipe.top1
    assert recipe.name == name
    if name in IMAGENET:
        assert recipe.size % 32 == recipe.evaluation_size % 32 == 0
        assert "not run" in recipe.top1
    Run(recipe)  # all names in it are known


def test_weight_decay_spares_norms_and_biases_if_the_recipe_says_so():
    with torch.device("meta"):
        net = build(RECIPES["modern"], num_classes=10)
    all_, (decayed, spared) = (
        optimizer_of(net, dataclasses.replace(RECIPES["modern"], decay_norms=True)).param_groups,
        optimizer_of(net, RECIPES["modern"]).param_groups,
    )
    assert len(all_) == 1
    assert spared["weight_decay"] == 0 < decayed["weight_decay"]
    assert len(spared["params"]) + len(decayed["params"]) == len(all_[0]["params"])
    owners = {id(p): part for part in net.modules() for p in part.parameters(recurse=False)}
    assert all(isinstance(owners[id(p)], nn.BatchNorm2d) or p.ndim == 1 for p in spared["params"])
    assert all(isinstance(owners[id(p)], nn.Conv2d | nn.Linear) and p.ndim > 1 for p in decayed["params"])


@given(st.sampled_from(sorted(RECIPES)), st.integers(1, 4096))
def test_the_linear_rule(name, batch):
    recipe = RECIPES[name]
    other = scaled(recipe, batch)
    assert other.lr / batch == pytest.approx(recipe.lr / recipe.batch_size)
    if recipe.iterations is not None:
        assert other.iterations * batch == pytest.approx(recipe.iterations * recipe.batch_size, abs=batch)
    assert other.epochs == recipe.epochs
    assert other.warmup_epochs == (recipe.warmup_epochs or (5 if batch > recipe.batch_size else 0))


def test_a_configuration_is_kept_and_read_again(tmp_path):
    for recipe in RECIPES.values():
        run = Run(recipe, str(tmp_path), seed=3, world_size=4, budget=10**9, skip_bad=True, keep_every=7)
        run.save(tmp_path / "config.json")
        assert Run.load(tmp_path / "config.json") == run
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["world_size"] == 4
    for change, words in [
        ({"seed": "many"}, "seed is 'many'"),
        ({"skip_bad": 1}, "skip_bad is 1"),
        ({"seed": True}, "seed is True"),
        ({"strange": 1}, "strange"),
        ({"parallel": "all"}, "parallel must be one of ddp, fsdp, got 'all'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=words):
            Run.load(tmp_path / "config.json")
