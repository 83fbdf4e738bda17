"""What the page of measurements says of bytes and depth, at small depths."""

import xml.etree.ElementTree as ET

from benchmarks.depth import draw, peak_of


def test_only_reconstruction_is_flat_in_depth():
    assert abs(peak_of("reconstruct", 2) - peak_of("reconstruct", 4)) < 1024  # of 990 KiB; a coupling stores 290
    assert peak_of("store", 4) - peak_of("store", 2) > 2 * 280 * 1024


def test_the_picture_is_written(tmp_path):
    draw({"store": {4: 100, 8: 200}, "revlib": {4: 100, 8: 100}}, tmp_path / "bytes.svg")
    assert ET.parse(tmp_path / "bytes.svg").getroot().tag.endswith("svg")  # noqa: S314 (matplotlib's own)
