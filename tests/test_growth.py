"""What the page on numerics says of round-off, by the benchmark whose tables it has."""

import math
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

from benchmarks.growth import ARITHMETIC, draw, errors, slope

SMALL = {"channels": 8, "size": 4}


def test_round_off_grows_with_depth_and_the_bound_much_faster():
    shallow, deep = (errors("float32", depth, **SMALL) for depth in (4, 40))
    assert 0 < shallow["inverse"] < deep["inverse"] < 1e-4
    assert shallow["inverse"] < shallow["bound"]
    assert deep["bound"] / shallow["bound"] > 10 * deep["inverse"] / shallow["inverse"]
    assert shallow["gradients"] < 1e-5
    assert 0 < shallow["arithmetic"] < 1e-4


@pytest.mark.parametrize("values", [each for each in ARITHMETIC if "grid" in each])
def test_on_a_grid_nothing_is_off(values):
    found = errors(values, 20, **SMALL)
    assert found["inverse"] == found["drift"] == found["gradients"] == 0
    assert found["arithmetic"] > 1e-4  # that of bfloat16
    assert math.isnan(found["bound"])


def test_values_in_bfloat16_do_not_come_back():
    assert errors("all in bfloat16", 20, **SMALL)["inverse"] > 1e-3


def test_the_slope_is_the_largest_singular_value():
    torch.manual_seed(0)
    linear = nn.Linear(6, 6, dtype=torch.float64)
    found = slope(linear, torch.randn(3, 6, dtype=torch.float64))
    assert found == pytest.approx(float(torch.linalg.matrix_norm(linear.weight.detach(), 2)), rel=1e-2)


def test_the_picture_is_written_with_and_without_errors(tmp_path):
    columns = ("inverse", "drift", "gradients", "arithmetic", "bound")
    rows = [{"values": "float32", "depth": depth, **dict.fromkeys(columns, 1e-7)} for depth in (4, 8)]
    rows += [{"values": "a grid", "depth": depth, **dict.fromkeys(columns, 0.0)} for depth in (4, 8)]
    draw(rows, tmp_path / "errors.svg")
    assert ET.parse(tmp_path / "errors.svg").getroot().tag.endswith("svg")  # noqa: S314 (matplotlib's own)
