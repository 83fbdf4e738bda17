"""What the page of measurements says of depth, at small depths."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks.depth import SETTINGS, draw_bytes, draw_errors, errors_of, peak_of


def test_only_reconstruction_is_flat_in_depth():
    assert abs(peak_of("reconstruct", 2) - peak_of("reconstruct", 4)) < 1024  # of 990 KiB; a coupling stores 290
    assert peak_of("store", 4) - peak_of("store", 2) > 2 * 280 * 1024


@pytest.mark.parametrize("setting", SETTINGS)
def test_errors_are_none_on_a_grid_and_of_the_precision_without(setting):
    found = errors_of(setting, 2, 0)
    if "grid" in setting:
        assert found["inverse"] == found["gradients"] == found["drift"] == 0
    else:
        assert 0 < found["inverse"] < 1e-5
        assert 0 < found["gradients"] < 1e-5
    assert (found["rounding"] > 1e-3) == ("bfloat16" in setting)


def test_both_pictures_are_written(tmp_path):
    draw_bytes({"store": {4: 100, 8: 200}, "revlib": {4: 100, 8: 100}}, tmp_path / "bytes.svg")
    one = {"inverse": 1e-7, "gradients": 1e-7, "rounding": 1e-7, "drift": 1e-7}
    zero = dict.fromkeys(one, 0.0)
    draw_errors(
        {"float32": {4: [one], 8: [one]}, 'float32, grid="exact"': {4: [zero], 8: [zero]}}, tmp_path / "errors.svg"
    )
    for picture in ("bytes.svg", "errors.svg"):
        assert ET.parse(tmp_path / picture).getroot().tag.endswith("svg")  # noqa: S314 (matplotlib's own)
