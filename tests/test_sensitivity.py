"""Where the inverse amplifies: against whole matrices, and against what is known of an additive coupling."""

import json
import math
from functools import partial

import pytest
import torch

import zoo
from invertible import Coupling
from tests.zoo_networks import randomize
from zoo.analysis import draw_sensitivity, sensitivity_at, sensitivity_cost
from zoo.analysis import sensitivity as analysis
from zoo.analysis.__main__ import main
from zoo.analysis.sensitivity import worst_blocks
from zoo.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("digits_once")


def network(**options):
    """In eval, with statistics and weights that are not those of initialisation."""
    net = randomize(zoo.create("irevnet_small", num_classes=2, blocks=(2, 1), **options), 0.3)
    net.features(torch.rand(16, 3, 8, 8))
    return net.eval().requires_grad_(False)


def values(function, x):
    """All singular values of a function of a flat vector."""
    return torch.linalg.svdvals(torch.autograd.functional.jacobian(function, x))


def flat(value):
    return torch.cat([part.flatten() for part in value]) if isinstance(value, tuple) else value.flatten()


def shaped(function, shape, v):
    return flat(function(v.view(shape)))


def on_pairs(function, shape, v):
    return flat(function(tuple(half.view(shape) for half in v.chunk(2))))


def test_every_figure_is_that_of_the_whole_matrix():
    net, x = network(), torch.rand(1, 3, 8, 8)
    found = sensitivity_at(net, x)
    assert ([each.name for each in found.blocks], found.stages, found.residual) == (["2", "3", "4"], [0, 2], 0)
    body, features = net.double().body, net.features(x.double())
    for each in found.blocks:
        block, way_back = body[int(each.name)], body[int(each.name) :]
        pair = body[: int(each.name)](x.double())
        ahead = values(partial(on_pairs, block, pair[0].shape), flat(pair))
        slope = values(partial(shaped, block.function, pair[1].shape), pair[1].flatten())[0]
        back = values(partial(shaped, way_back.inverse, features.shape), features.flatten())
        assert each.largest == pytest.approx(float(ahead[0]), rel=1e-4)
        assert each.inverse == pytest.approx(float(1 / ahead[-1]), rel=1e-4)
        assert each.condition == pytest.approx((float(slope + (slope**2 + 4).sqrt()) / 2) ** 2, rel=1e-4)
        assert each.cumulative == pytest.approx(float(back[0]), rel=1e-4)
        assert each.typical == pytest.approx(float(back.square().mean().sqrt()), rel=1e-4)


def test_no_way_back_amplifies_more_than_its_blocks_together():
    blocks = sensitivity_at(network(), torch.rand(1, 3, 8, 8)).blocks
    assert blocks[-1].cumulative == pytest.approx(blocks[-1].inverse)  # all that is after it moves elements only
    for i, each in enumerate(blocks):
        assert 1 <= each.typical <= each.cumulative <= math.prod(block.inverse for block in blocks[i:]) * (1 + 1e-5)


def test_a_basis_that_does_not_hold_the_whole_space_gives_the_same_figures(monkeypatch):
    net, x = network(), torch.rand(1, 3, 8, 8)
    dense = sensitivity_at(net, x)
    monkeypatch.setattr(analysis, "DENSE", 0)
    found = sensitivity_at(net, x)
    assert 0 < found.residual < 0.1
    for each, expected in zip(found.blocks, dense.blocks, strict=True):
        for key in ("largest", "inverse", "condition", "cumulative"):
            assert getattr(each, key) == pytest.approx(getattr(expected, key), rel=1e-3)
        assert each.typical == pytest.approx(expected.typical, rel=0.1)


def test_the_network_its_grid_and_the_threads_stay_as_they_are():
    net, x = network(), torch.rand(1, 3, 8, 8)
    expected = sensitivity_at(net, x)
    net.train().grid = "exact"
    assert sensitivity_at(net, x) == expected
    assert net.training
    assert net.grid is not None
    seen = []
    sensitivity_at(net, x, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert sensitivity_cost(net, x) > 0


def test_an_invertible_unet_has_blocks_in_its_branches():
    net = randomize(zoo.create("iunet", num_classes=2, channels=4, blocks=(1, 1)), 0.3).eval().requires_grad_(False)
    x = torch.rand(1, 3, 4, 4)
    found = sensitivity_at(net, x)
    couplings = {name for name, part in net.body.named_modules() if isinstance(part, Coupling)}
    assert {each.name for each in found.blocks} == couplings
    assert found.stages == [0, 1, 3]  # the top, the level below, the top again
    inside = [each for each in found.blocks if each.dimension == 32]
    assert [each.name.count(".") > 0 for each in inside] == [True, True]
    body, features = net.double().body, net.features(x.double())
    back = values(partial(shaped, body[1:].inverse, features.shape), features.flatten())
    assert found.blocks[0].cumulative == pytest.approx(float(back[0]), rel=1e-4)
    assert found.blocks[-1].cumulative == pytest.approx(found.blocks[-1].inverse)


def test_the_block_that_blows_up_comes_first_and_is_drawn():
    net = network()
    net.body[3].function[-1].weight.mul_(100)
    found = [sensitivity_at(net, torch.rand(1, 3, 8, 8)) for _ in range(2)]
    rows = worst_blocks(found)
    assert (rows[0][0], rows[0][1]) == ("3", "2 of 3")
    assert float(rows[0][3]) > 100 * float(rows[1][3])
    assert worst_blocks(found, 1) == rows[:1]
    axes = draw_sensitivity(found).axes
    assert axes[0].get_yscale() == "log"
    assert all(each.get_xlabel() and each.get_ylabel() for each in axes)


def test_the_command_writes_a_table_and_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_pretrained(network(), tmp_path / "net")
    options = ["--checkpoint", str(checkpoint), "--output", "out", "--size", "8"]
    assert main(["sensitivity", *options, "--images", "1"]) == 0
    shown = capsys.readouterr().out
    assert "for each of 1 images" in shown
    assert "condition number" in shown
    found = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert [len(each["blocks"]) for each in found["found"]] == [3]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"sensitivity.{e}" for e in ("json", "png", "svg")}
    other = save_pretrained(zoo.create("resnet_small", num_classes=2), tmp_path / "resnet")
    assert main(["sensitivity", "--checkpoint", str(other), "--size", "8"]) == 2
    assert "error: resnet_small has no inverse" in capsys.readouterr().err
