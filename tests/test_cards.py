"""Cards, what a network was built from, and other classifiers; ``test_zoo_models.py`` has every model."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from zoo.__main__ import main
from zoo.cards import CARDS, HEADER, cells
from zoo.flows.cards import FLOW_HEADER, FLOWS, flow_cells
from zoo.recipes import RECIPES
from zoo.registry import kind_of

ROOT = Path(__file__).parents[1]


def test_the_errors_of_the_cards_are_those_of_the_recipes():
    """Both quote Table 1, and the page on training."""
    for name in ("irevnet_a", "irevnet_b"):
        assert f"(error {zoo.card(name).reported[0].error} %)" in RECIPES[f"paper_{name}"].top1
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for each in zoo.card("irevnet_small").measured:
        assert f"{100 - each.error:.2f} %" in page


def test_step_times_are_on_the_cards_of_all_that_classify_images_of_224_pixels():
    assert [name for name, each in CARDS.items() if each.size == 224 and not each.step] == []


def test_no_page_has_a_placeholder():
    words = re.compile(r"\b(TODO|TBD|FIXME|XXX+|PLACEHOLDER|DATE|COMMIT|MEASURED|FIGURES?|TIMES?|RESULTS?)\b")
    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]:
        assert not words.search(page.read_text(encoding="utf-8")), page.name


def test_names_take_a_pattern():
    assert zoo.names("irevnet_[ab]") == ["irevnet_a", "irevnet_b"]
    assert zoo.names("nothing*") == []
    assert set(zoo.names("irevnet*")) <= set(zoo.names()) == set(zoo.names("*"))


def test_names_are_of_two_kinds():
    flows, classifiers = zoo.names(kind="flow"), zoo.names(kind="classifier")
    assert sorted([*flows, *classifiers]) == zoo.names()
    assert zoo.names("irevnet*", kind="flow") == []
    assert (kind_of("glow"), kind_of("iunet")) == ("flow", "classifier")
    with pytest.raises(ValueError, match=re.escape("zoo.names: kind must be one of 'classifier', 'flow', got 'net'.")):
        zoo.names(kind="net")


def test_the_table_fits_80_columns_and_shows_every_card(capsys):
    command = [sys.executable, "-W", "error", "-m", "zoo"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert max(map(len, out.splitlines())) <= 80
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    for name, card in CARDS.items():
        assert all(cell in rows[name] for cell in cells(name)), rows[name]
        assert f"{card.parameters:,}" in rows[name]
    for name in FLOWS:
        assert all(cell in rows[name] for cell in flow_cells(name)), rows[name]
    assert cells("somebody's")[1:] == ("-",) * (len(HEADER) - 1)
    assert flow_cells("somebody's")[1:] == ("-",) * (len(FLOW_HEADER) - 1)
    assert main(["irevnet_[ab]"]) == 0
    out = capsys.readouterr().out
    assert "irevnet_small" not in out
    assert "flow" not in out
    assert main(["*glow"]) == 0
    assert "classif" not in capsys.readouterr().out


def test_one_card(capsys):
    assert main(["irevnet_b"]) == 0
    out = capsys.readouterr().out
    for words in (
        "29,201,092",
        "6,113,140,224",
        "224 pixels",
        "26.7 % (ImageNet, Table 1)",
        "store 92,674,269, recompute 33,926,400, reconstruct 4,110,336 bytes",
        "not run",
        "MIT",
        "26.0 %",
    ):
        assert words in out
    assert main(["irevnet_c"]) == 2
    assert capsys.readouterr().err.startswith("error: no model 'irevnet_c'; there are glow, iresnet, irevnet_a, ")


def test_the_card_of_a_flow(capsys):
    assert main(["glow"]) == 0
    out = capsys.readouterr().out
    for words in (
        "44,052,816",
        "3 × 32 × 32",
        "3.35 bits per dimension (CIFAR-10, Table 2",
        "rounds",
        "not run",
        "MIT",
    ):
        assert words in out
    with pytest.raises(ValueError, match="expected a network with a linear classifier"):
        zoo.replace_head(zoo.create("glow", shape=(1, 2, 2), levels=1, steps=1, width=2), 3)


def test_a_model_without_a_card(capsys, monkeypatch):
    monkeypatch.delitem(CARDS, "irevnet_small")
    message = (
        "zoo.card: there is no card for 'irevnet_small' in zoo/cards.py, nor in zoo/flows/cards.py; there are irevnet_a"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        zoo.card("irevnet_small")
    assert main(["irevnet_small"]) == 2
    assert "error: zoo.card: there is no card" in capsys.readouterr().err
    assert main(["irevnet*"]) == 0


# What a network remembers


def test_the_memory_goes_through_pickling_and_changes_nothing_else():
    net = zoo.create("irevnet_small", num_classes=3, kernel_sizes=(3, 3, 3))
    again = pickle.loads(pickle.dumps(net))  # noqa: S301
    assert zoo.config_of(again) == zoo.config_of(net)
    assert dict(zoo.config_of(net).options) == {
        "num_classes": 3,
        "in_channels": 3,
        "blocks": (3, 3, 3),
        "kernel_sizes": (3, 3, 3),
        "dimensions": 2,
    }
    assert not any("config" in key for key in net.state_dict())
    assert pickle.loads(pickle.dumps(zoo.irevnet_small)) is zoo.irevnet_small  # noqa: S301


def test_what_the_zoo_did_not_build_has_no_memory():
    for net in (nn.Linear(1, 1), nn.Sequential(zoo.create("irevnet_small"))):
        message = (
            "zoo.config_of: expected a network built by zoo.create, or the one inside of a wrapper such as DDP, got a"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            zoo.config_of(net)


# The classifier


def test_another_classifier():
    net = zoo.create("irevnet_small", num_classes=5).double().eval()
    before = {key: t.clone() for key, t in net.state_dict().items()}
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    features = net.features(x)
    assert zoo.replace_head(net, 0) is net
    pooled = net(x)
    assert pooled.shape == (2, 768)
    assert zoo.replace_head(net, 4)(x).shape == (2, 4)
    assert (net.num_classes, zoo.config_of(net).options["num_classes"]) == (4, 4)
    assert not net.head[-1].training
    assert net.head[-1].weight.dtype == torch.float64
    torch.testing.assert_close(net.head[-1](pooled), net(x))
    torch.testing.assert_close(net.features(x), features)
    assert all(torch.equal(before[key], t) for key, t in net.state_dict().items() if not key.startswith("head.4."))
    with pytest.raises(ValueError, match="logits have no inverse"):
        net.inverse(net(x))


def test_the_classifier_of_torchvisions_networks():
    class Torchvisions(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 10)

        def forward(self, x):
            return self.fc(x)

    net = Torchvisions()
    assert zoo.replace_head(net, 2)(torch.zeros(1, 6)).shape == (1, 2)


def test_networks_without_a_classifier_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        zoo.replace_head(zoo.create("irevnet_small"), -1)
    net = zoo.create("irevnet_small", num_classes=3, blocks=(1,))
    for number in (2.5, True, "3", None):
        with pytest.raises(TypeError, match=r"zoo\.replace_head: num_classes must be an integer, got"):
            zoo.replace_head(net, number)
    assert zoo.config_of(net).options["num_classes"] == 3
    for net in (nn.Linear(2, 2), nn.Sequential()):
        with pytest.raises(
            ValueError, match=re.escape("expected a network with a linear classifier in head[-1] or fc")
        ):
            zoo.replace_head(net, 2)
