"""What the page of measurements says of bytes and depth, at small depths."""

import xml.etree.ElementTree as ET

from benchmarks import depth
from benchmarks.depth import draw, peak_of


def test_only_reconstruction_is_flat_in_depth():
    # Of 990 KiB; two couplings store 580. Kernels' workspaces moved it by 28 KiB once, on torch 2.11.
    assert abs(peak_of("reconstruct", 2) - peak_of("reconstruct", 4)) < 64 * 1024
    assert peak_of("store", 4) - peak_of("store", 2) > 2 * 280 * 1024


def test_the_picture_is_written(tmp_path):
    draw({"store": {4: 100, 8: 200}, "revlib": {4: 100, 8: 100}}, tmp_path / "bytes.svg")
    assert ET.parse(tmp_path / "bytes.svg").getroot().tag.endswith("svg")  # noqa: S314 (matplotlib's own)


def test_a_peer_that_is_not_installed_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, capsys):
    def no_peer(name, at):
        raise ModuleNotFoundError(name="revlib")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["depth", "--depths", "4"])
    monkeypatch.setattr(depth, "TITLES", {"store": "Store()", "revlib": "revlib"})
    monkeypatch.setattr(depth, "peak_of", lambda name, at: 2**20 if name == "store" else no_peer(name, at))
    depth.main()
    assert "without revlib: pip install '.[bench]'" in capsys.readouterr().out
