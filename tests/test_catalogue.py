"""Nothing is forgotten: a new layer is exported, has a row, keeps the import directions and is documented."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import invertible
from tests.catalogue import ROWS

ROOT = Path(__file__).parents[1]
HELPERS = {
    "_base",
    "_value",
    "_check",
    "_checksum",
    "_buffers",
    "_channels",
    "_compiled",
    "_eager",
    "_fixed_point",
    "_function",
    "_fused",
    "_lifting",
    "_lipschitz",
    "_log_det",
    "_noise",
    "_products",
    "_random",
    "_range",
    "_running",
    "_space",
    "_tracing",
    "grid",
    "transform",
}
CONTAINERS = {"sequential", "parallel", "inverse"}


def may_import(file):
    """Inside the library, helpers <- module <- layers, and module <- backprop <- containers; no layer imports one."""
    if file in HELPERS | {"module"}:
        return HELPERS
    above = {"backprop", "_grids", "_environment", "_estimate", "latent"}
    if file == "flow":  # no layer: a density, of what a container has
        return HELPERS | {"module", "dequantize"}
    above = above if file in CONTAINERS | {"_environment", "_estimate"} else set()
    return HELPERS | {"module"} | above


def layers():
    for file in pkgutil.walk_packages(invertible.__path__, "invertible."):
        importlib.import_module(file.name)
    found, todo = set(), [invertible.InvertibleModule]
    while todo:
        for child in todo.pop().__subclasses__():
            todo.append(child)
            private = child.__name__.startswith("_")
            ours = getattr(sys.modules.get(child.__module__), child.__name__, None) is child  # and no proxy of torch's
            in_library = ours and child.__module__.startswith("invertible.")
            if in_library and not inspect.isabstract(child) and not private:
                found.add(child)
    return found


def test_every_layer_is_public():
    missing = {layer.__name__ for layer in layers()} - set(invertible.__all__)
    assert not missing, f"add {missing} to invertible/__init__.py"


def test_every_layer_has_a_row():
    missing = {layer.__name__ for layer in layers() - {row.layer for row in ROWS.values()}}
    assert not missing, f"add a row for {missing} to tests/catalogue.py"


def test_every_layer_is_in_the_file_of_its_name():
    families = {"activations", "coupling", "split", "wavelets"}
    for layer in layers():
        file = layer.__module__.removeprefix("invertible.")
        assert file in families or file == "".join(f"_{c.lower()}" if c.isupper() else c for c in layer.__name__)[1:]


@pytest.mark.parametrize("name", invertible.__all__)
def test_public_names_are_documented(name):
    thing = getattr(invertible, name)
    if not inspect.isclass(thing):
        return
    assert inspect.getdoc(thing), f"{name} has no docstring"
    for member, value in vars(thing).items():
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, classmethod))):
            assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"


WITHOUT_EXAMPLE = {  # and why
    "Law": "a type; its laws have theirs",
    "push_to_hub": "needs a hub",
    "SpectrumCost": "that of spectrum_cost",
    "parts_of": "that of Parts",
}


@pytest.mark.parametrize("package", re.findall(r"^   ([a-z_.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
def test_public_names_have_an_example(package):
    """Functions and classes, errors and commands apart."""
    module = importlib.import_module(package)
    for name in set(module.__all__) - WITHOUT_EXAMPLE.keys():
        thing = getattr(module, name)
        if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, BaseException)):
            assert ">>>" in (inspect.getdoc(thing) or ""), f"{package}.{name} has no example"


@pytest.mark.parametrize("row", list(ROWS.values()), ids=list(ROWS))
def test_layers_say_what_they_do(row):
    """Formula or summary, shapes, errors and an example."""
    doc = inspect.getdoc(row.layer) or ""
    sections = ["Shape:", "Example:"] + (["Raises:"] if row.rejects else [])
    assert all(section in doc for section in sections)


def imported(path, package):
    """The modules that a file imports, with relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            yield from ([f"{base}.{node.module}"] if node.module else [f"{base}.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def test_import_directions_inside_the_library():
    for path in sorted((ROOT / "invertible").glob("*.py")):
        if path.stem == "__init__":
            continue
        inside = {name.split(".")[1] for name in imported(path, "invertible") if name.startswith("invertible.")}
        assert inside <= may_import(path.stem), f"{path.name} must not import {inside - may_import(path.stem)}"
    for path in sorted((ROOT / "invertible" / "backprop").glob("*.py")):
        inside = {
            name.split(".")[1] for name in imported(path, "invertible.backprop") if name.startswith("invertible.")
        }
        assert inside <= HELPERS | {"module", "backprop"}, f"{path.name} must not import {inside}"


def test_the_library_needs_torch_and_einops_only():
    for path in files("invertible"):
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        outside = {name.split(".")[0] for name in imported(path, package)} - set(sys.stdlib_module_names)
        allowed = {"invertible", "torch", "einops"} | ({"hypothesis"} if path.stem == "strategies" else set())
        assert outside <= allowed, f"{path} imports {outside - allowed}"
        assert path.stem == "strategies" or "invertible.testing.strategies" not in imported(path, package)


@pytest.mark.parametrize("package", ["zoo", "invertible"])
def test_nothing_imports_upwards(package):
    above = {"tests", "examples", "benchmarks", "docs"} | ({"zoo"} if package == "invertible" else set())
    for path in files(package):
        tops = {name.split(".")[0] for name in imported(path, ".".join(path.relative_to(ROOT).parts[:-1]))}
        assert not tops & above, f"{path} imports {tops & above}"


def test_only_the_gradient_engine_defines_an_autograd_function():
    for path in files("invertible") + files("zoo"):
        if "backprop" not in path.parts:
            assert "autograd.Function" not in path.read_text(encoding="utf-8"), path


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files("invertible") + files("zoo")}
    assert max(lengths.values()) <= 400, {p: n for p, n in lengths.items() if n > 400}
