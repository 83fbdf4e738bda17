"""Every classifier of the registry: its card is true, and a thin version trains, comes back, goes through files.

Flows are in ``test_zoo_flows.py``.
"""

import copy
import inspect
import pickle
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import zoo
from invertible import Budget, Recompute, Reconstruct, Store
from tests.zoo_networks import randomize
from zoo.cards import CARDS
from zoo.dry_run import cost_of, flops_of
from zoo.pretrained import from_pretrained, save_pretrained
from zoo.recipes import RECIPES
from zoo.registry import _builders
from zoo.run import BACKPROP


@dataclass(frozen=True)
class Thin:
    """A version of a model that is quick."""

    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (2, 3, 32, 32)


THIN = {
    "irevnet_a": Thin({"split_channels": 48}, (4, 3, 32, 32)),
    "irevnet_b": Thin({"in_channels": 1}, (4, 1, 32, 32)),
    "irevnet_cifar": Thin(shape=(2, 3, 8, 8)),
    "irevnet_small": Thin({"blocks": (2, 1, 2)}),
    "iunet": Thin({"channels": 8, "blocks": (1, 2)}, (2, 3, 8, 8)),
    "resnet50": Thin(),
    "resnet101": Thin(),
    "resnet_small": Thin(shape=(2, 3, 16, 16)),
    "revnet38": Thin(shape=(2, 3, 8, 8)),
    "revnet56": Thin(),
    "revnet104": Thin(),
    "revnet110": Thin(shape=(2, 3, 8, 8)),
    "revnet164": Thin(shape=(2, 3, 8, 8)),
    "revvit_s": Thin({"dim": 12, "depth": 2, "heads": 3, "patch_size": 8, "image_size": 16}, (2, 3, 16, 16)),
}

MODELS = [name for name in zoo.names(kind="classifier") if _builders[name].__module__.startswith("zoo.")]
INVERTIBLE = [name for name in MODELS if name not in CARDS or CARDS[name].inverse != "none"]

LARGE = ["resnet101", "revnet104"]  # and as resnet50 and revnet56 are

every_model = pytest.mark.parametrize("name", MODELS)
every_model_with_values = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in MODELS]
)


def thin(name):
    """The options of a model's thin version, with few classes, and images for it."""
    if name not in THIN:
        pytest.fail(f'add to THIN in tests/test_zoo_models.py a line for the new model:\n    "{name}": Thin(),')
    images = torch.rand(THIN[name].shape, generator=torch.Generator().manual_seed(1))
    return {"num_classes": 3, **THIN[name].options}, images


def meta(name, **options):
    with torch.device("meta"):
        return zoo.create(name, **options)


def assert_same(a, b):
    """The same model, and the same tensors by the same names."""
    assert type(a) is type(b)
    assert zoo.config_of(a) == zoo.config_of(b)
    found, expected = a.state_dict(), b.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(t, expected[key]) for key, t in found.items())


def test_the_tables_have_every_model_and_nothing_else():
    missing = set(MODELS) - CARDS.keys()
    assert not missing, f"add cards for {sorted(missing)} to zoo/cards.py"
    assert CARDS.keys() <= set(MODELS)
    assert THIN.keys() <= set(MODELS)
    assert all(each.name == name for name, each in CARDS.items())


@every_model
def test_its_card_is_true(name):
    card = zoo.card(name)
    net = meta(name).eval()
    assert (sum(p.numel() for p in net.parameters()), flops_of(net, card.size)) == (card.parameters, card.flops)
    body = getattr(net, "body", None)
    expected = "none" if not hasattr(net, "inverse") else "bijective" if body.bijective else "injective"
    assert card.inverse == expected
    assert "https://" in card.source
    assert card.recipe in {None, "digits"} or RECIPES[card.recipe].model == name


@pytest.mark.slow  # three minutes in all, half of them for the deep ones
@every_model
def test_its_bytes_are_counted(name):
    found = {}
    for kept, strategy in BACKPROP.items():
        net = meta(name)
        if hasattr(net, "backprop"):
            net.backprop = strategy
        if hasattr(net, "backprop") or kept == "store":
            found[kept] = cost_of(net, zoo.card(name).size).per_image
    assert found.keys() == zoo.card(name).activations.keys()
    for kept, number in zoo.card(name).activations.items():
        assert found[kept] == pytest.approx(number, rel=0.02), kept


@every_model
def test_it_remembers_what_it_was_built_from(name):
    options, _ = thin(name)
    with torch.device("meta"):
        net = getattr(zoo, name)(**options)
    config = zoo.config_of(net)
    assert config.model == name
    assert config.options.items() >= options.items()
    again = meta(name, **config.options)
    assert zoo.config_of(again) == config
    assert [p.shape for p in again.parameters()] == [p.shape for p in net.parameters()]


@every_model
def test_without_a_classifier_and_with_another(name):
    options, x = thin(name)
    net, x = meta(name, **{**options, "num_classes": 0}).eval(), x.to("meta")
    keys = list(net.state_dict())
    assert net(x).shape[:2] == (len(x), net.feature_channels)
    assert zoo.replace_head(net, 4)(x).shape[:2] == (len(x), 4)
    assert zoo.config_of(net).options["num_classes"] == 4
    assert len(net.state_dict()) == len(keys) + 2
    assert list(zoo.replace_head(net, 0).state_dict()) == keys


@every_model
def test_images_of_other_channels(name):
    if "in_channels" not in inspect.signature(getattr(zoo, name)).parameters:
        assert name in {"resnet50", "resnet101"}, "torchvision's have none"
        return
    options, x = thin(name)
    net, x = meta(name, **{**options, "in_channels": 2}).eval(), x.to("meta")[:, :1].repeat_interleave(2, dim=1)
    assert net(x).shape[:2] == (len(x), 3)
    assert name not in INVERTIBLE or net.inverse(net.features(x)).shape == x.shape
    words = "expected images of shape (batch, 2, height, width), got a tensor of shape ("
    with pytest.raises(ValueError, match=re.escape(words)):
        net(torch.cat([x, x], dim=1))


@pytest.mark.parametrize("name", INVERTIBLE)
def test_images_come_back(name):
    """From the features of any image; where the map is bijective, so do any features from their image."""
    options, x = thin(name)
    net, x = randomize(zoo.create(name, **options), 0.01).double().eval(), x.double()
    with torch.no_grad():
        y = net.features(x)
        torch.testing.assert_close(net.inverse(y), x, rtol=1e-9, atol=1e-9)
        if zoo.card(name).inverse == "bijective":
            y = y + torch.randn_like(y)
            torch.testing.assert_close(net.features(net.inverse(y)), y, rtol=1e-9, atol=1e-9)


def trained(net, x, strategy):
    """The logits, gradients and buffers of a training step; ``net`` is left with these gradients."""
    net.zero_grad()
    if hasattr(net, "backprop"):
        net.backprop = strategy
    torch.manual_seed(2)  # of dropout
    y = net(x)
    y.square().sum().backward()
    grads = {key: p.grad for key, p in net.named_parameters()}
    return {"logits": y.detach(), **grads, **{key: b.clone() for key, b in net.named_buffers()}}


def assert_near(found, expected, strategy):
    """The same up to rounding in double precision."""
    for key, value in found.items():
        error = (value - expected[key]).double().norm()
        assert error <= 1e-8 * max(expected[key].double().norm(), 1), f"{strategy}: {key} is off by {error:.1e}"


@every_model_with_values
def test_a_training_step_leaves_the_same_behind_whatever_is_kept(name):
    options, x = thin(name)
    net, x = randomize(zoo.create(name, **options), 0.01).double(), x.double()
    buffers = {key: b.clone() for key, b in net.named_buffers()}
    expected = trained(net, x, Store())
    assert all(g is not None and g.isfinite().all() for g in expected.values())
    assert not buffers or any(not torch.equal(expected[key], b) for key, b in buffers.items())
    for strategy in (Recompute(), Reconstruct()) if hasattr(net, "backprop") else ():
        net.load_state_dict({**net.state_dict(), **buffers})
        assert_near(trained(net, x, strategy), expected, strategy)
        assert net.drift is not None or not isinstance(strategy, Reconstruct)


@pytest.mark.slow
@every_model
def test_a_training_step_within_a_budget(name):
    """The tightest one."""
    options, x = thin(name)
    net, x = randomize(zoo.create(name, **options), 0.01).double(), x.double()
    if not hasattr(net, "backprop"):
        return
    buffers = {key: b.clone() for key, b in net.named_buffers()}
    expected = trained(net, x, Store())
    net.load_state_dict({**net.state_dict(), **buffers})
    with pytest.raises(ValueError, match="bytes at least for this input, got 1") as refused:
        trained(net, x, Budget(1))
    budget = Budget(int(re.search(r"needs (\d+) bytes", str(refused.value))[1]))
    assert_near(trained(net, x, budget), expected, budget)


@every_model_with_values
def test_it_goes_through_copies_pickling_and_files(name, tmp_path):
    options, x = thin(name)
    net = zoo.create(name, **options)
    net(x)  # statistics are not those of initialisation
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert_same(net, again)
    again = from_pretrained(save_pretrained(net, tmp_path))
    (tmp_path / "model.safetensors").unlink()  # up to 100 MB, which pytest would keep
    assert_same(net, again)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), net.eval()(x))
    fresh = meta(name, **options)
    fresh.load_state_dict(net.state_dict(), assign=True)
    assert_same(net, fresh)
