"""Files that others' programs read: how to cite, how the site is built, the forms for issues."""

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest

import invertible

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; make lint and make docs install it")


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version_and_has_what_the_format_asks_for():
    """cffconvert --validate says so, too; here are the fields that change."""
    found = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["version"] == invertible.__version__
    assert found["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    (paper,) = found["references"]
    assert paper["title"].replace("i-RevNet", "{i-RevNet}") in (ROOT / "docs" / "references.bib").read_text("utf-8")
    assert [each["family-names"] for each in paper["authors"]] == ["Jacobsen", "Smeulders", "Oyallon"]


def test_the_site_is_built_elsewhere_as_it_is_here():
    found = read(".readthedocs.yaml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / found["sphinx"]["configuration"]).is_file()
    assert found["sphinx"]["fail_on_warning"]
    (install,) = found["python"]["install"]
    assert set(install["extra_requirements"]) <= project["optional-dependencies"].keys()
    oldest = re.search(r">=3\.(\d+)", project["requires-python"])
    assert int(found["build"]["tools"]["python"].split(".")[1]) >= int(oldest[1])


@pytest.mark.parametrize("path", [each for each in FORMS if each.name != "config.yml"], ids=lambda each: each.stem)
def test_a_form_is_one(path):
    """By GitHub's rules: https://docs.github.com/communities, "Syntax for issue forms"."""
    form = read(path)
    assert form.keys() <= {"name", "description", "title", "labels", "assignees", "projects", "type", "body"}
    assert form["name"]
    assert form["description"]
    fields = [each for each in form["body"] if each["type"] != "markdown"]
    names = [each["id"] for each in fields]
    labels = [each["attributes"]["label"] for each in fields]
    assert fields
    assert len(set(names)) == len(names)
    assert len(set(labels)) == len(labels)
    for each in form["body"]:
        assert each["type"] in {"markdown", "textarea"}
        assert each["attributes"].keys() <= {"label", "description", "placeholder", "value", "render"}


def test_the_command_that_the_forms_ask_for_prints_what_they_want():
    commands = {c for path in FORMS for c in re.findall(r'`python -c "(.*?)"`', path.read_text(encoding="utf-8"))}
    (command,) = commands
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(command, {})  # noqa: S102
    assert printed.getvalue().startswith(invertible.__version__)
    assert "'torch': " in printed.getvalue()
