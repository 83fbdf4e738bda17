"""What is shipped: a wheel that installs into a clean environment, and a README whose code runs."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd):
    result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_installs_and_works_in_a_clean_environment(tmp_path):
    """Of the surrounding environment it sees the dependencies, not the editable install of this checkout."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    wheel = next(tmp_path.glob("*.whl"))
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    where = "import invertible, zoo; print(invertible.__file__, zoo.__file__)"
    assert all(str(tmp_path / "env") in path for path in run(python, "-c", where, cwd=tmp_path).split())
    run(python, "-c", "from invertible import Sequential, Coupling", cwd=tmp_path)
    for package in ("invertible", "zoo"):
        assert (site / package / "py.typed").exists()
    assert "29,201,092" in run(python, "-m", "zoo", cwd=tmp_path)
    assert not (site / "tests").exists()


def test_the_library_alone_needs_torch_and_einops():
    """Importing it loads none of the extras."""
    code = "import sys, invertible, invertible.testing; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run(sys.executable, "-c", code, cwd=ROOT).split()}
    assert not loaded & {"torchvision", "PIL", "sklearn", "matplotlib", "safetensors", "rich", "hypothesis", "zoo"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split(r"[><=]", need)[0] for need in project["dependencies"]] == ["torch", "einops"]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
def test_the_readmes_code_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102
