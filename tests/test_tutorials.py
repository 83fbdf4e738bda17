"""The tutorials are programs that run as they are, and the gallery shows them in the order of ``docs_order``."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs import docs_order

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "tutorials"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]


def test_the_order_and_the_folder_agree():
    assert sorted(docs_order.ORDER) == NAMES, "ORDER in docs/docs_order.py names each file in examples/tutorials once"


def test_a_tutorial_that_is_not_in_the_order_comes_first():
    key = docs_order.TutorialOrder(str(FOLDER))
    assert sorted(["conditional_flow.py", "other.py", "build_and_invert.py"], key=key)[0] == "other.py"


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_it_begins_with_a_title_and_ends_with_links(path):
    title, line, *_ = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()
    assert line == "=" * len(title)
    _, _, links = path.read_text(encoding="utf-8").lower().rpartition("where to go next")
    assert ":doc:" in links
    assert links.count("\n") < 20


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_it_runs_as_a_script(path, tmp_path):
    without = {"DISPLAY", "WAYLAND_DISPLAY"}  # with a display, Agg warns that it shows nothing
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment |= {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert 2 <= len(result.stdout.splitlines()) <= 40
    assert not list(tmp_path.iterdir()), "a tutorial leaves no files behind"
