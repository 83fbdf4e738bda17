"""Builds the documentation: ``python -m sphinx -W -n --keep-going -b html docs docs/_build/html``.

What is documented is what ``__all__`` says. Nothing is fetched, neither to build the pages nor to view them.
"""

import enum
import importlib
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autosummary import autosummary_table
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import restify, stringify_annotation
from torch import nn

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import layer_table  # noqa: E402

import invertible  # noqa: E402
import zoo  # noqa: E402
from invertible.testing import LAWS  # noqa: E402
from tests.broken_layers import BROKEN, Broken  # noqa: E402
from zoo.cards import COSTS, HEADER, cells, costs  # noqa: E402
from zoo.flows.cards import FLOW_HEADER, flow_cells  # noqa: E402
from zoo.registry import Kind  # noqa: E402

project = "invertible"
version = release = invertible.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
nitpicky = True

html_theme = "furo"
html_title = f"invertible {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_logo = html_favicon = "_static/logo.svg"
html_domain_indices = False  # the page of the reference lists the packages
html_copy_source = False
html_show_copyright = False
pygments_style, pygments_dark_style = "a11y-light", "a11y-dark"  # with a contrast of 4.5 or more, by check_site.py

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# The offline MathJax is version 3; without this line myst_parser configures version 4, which has the same option.
mathjax3_config = {"options": {"processHtmlClass": "tex2jax_process|mathjax_process|math|output_area"}}

autosummary_ignore_module_all = False
autodoc_inherit_docstrings = False  # a layer's page tells what is its own; the contract is at InvertibleModule
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The tutorials are programs of their own; a build runs those that it has not run before, and shows what they drew.
sphinx_gallery_conf = {
    "examples_dirs": "../examples/tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "docs_order.TutorialOrder",
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", "docs_order.seed"),
    "image_scrapers": ("matplotlib",),
    "capture_repr": (),  # what a program prints is shown, and nothing else
    "doc_module": ("invertible", "zoo"),
    "backreferences_dir": "generated/backreferences",
    "download_all_examples": False,
    "write_computation_times": False,
    "min_reported_time": 1000,
    "remove_config_comments": True,
    "show_signature": False,
}

doctest_global_setup = "__import__('torch').manual_seed(0)"  # a page's networks are the same in each build
doctest_test_doctest_blocks = ""  # pytest runs the examples of the docstrings; here those of the pages

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "torchvision": "https://docs.pytorch.org/vision/stable/",
    "hypothesis": "https://hypothesis.readthedocs.io/en/latest/",
    "matplotlib": "https://matplotlib.org/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pillow": "https://pillow.readthedocs.io/en/stable/",
    "rich": "https://rich.readthedocs.io/en/stable/",
}


def compile_inventories(app: Sphinx, config: object) -> None:
    """Makes intersphinx inventories of the lists in ``inventories/``, so that no build needs the network."""
    folder = Path(app.doctreedir) / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    app.config.intersphinx_mapping = {}
    for project_name, site in INVENTORIES.items():
        lines = (DOCS / "inventories" / f"{project_name}.txt").read_text(encoding="utf-8").splitlines()
        entries = [line.split() for line in lines if line and not line.startswith("#")]
        body = "".join(f"{name} py:{role} 1 {page} -\n" for name, role, page in entries)
        head = f"# Sphinx inventory version 2\n# Project: {project_name}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        file = folder / f"{project_name}.inv"
        file.write_bytes(head.encode() + zlib.compress(body.encode()))
        app.config.intersphinx_mapping[project_name] = (site, str(file))


def remove_stale_pages(app: Sphinx, config: object) -> None:
    """Forgets the pages of the last build, or a name that is gone from the library would stop this one."""
    shutil.rmtree(DOCS / "generated", ignore_errors=True)


def rebase_links(app: Sphinx, path: Path, document: str, content: list[str]) -> None:
    """Lets the links of an included file, such as the README, start where that file is: one folder up."""
    for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"):  # they have pages here
        content[0] = content[0].replace(f"]({name}.md", f"](docs/{name.lower()}.md")
    code_or_link = r"(?s)```.*?```|`[^`]*`|\]\((?!\w+:|#)"
    content[0] = re.sub(code_or_link, lambda m: m[0] + "../" if m[0] == "](" else m[0], content[0])


def insert_cards(app: Sphinx, document: str, content: list[str]) -> None:
    """Writes the tables of the zoo's models, from their cards."""
    if document == "zoo":
        tables: tuple[tuple[str, Kind, tuple[str, ...], Callable], ...] = (
            ("<!-- cards -->", "classifier", HEADER, cells),
            ("<!-- costs -->", "classifier", ("model", *COSTS), costs),
            ("<!-- flows -->", "flow", FLOW_HEADER, flow_cells),
        )
        for mark, kind, header, row in tables:
            rows = [header, ["---"] * len(header), *map(row, zoo.names(kind=kind))]
            content[0] = content[0].replace(mark, "\n".join(f"| {' | '.join(each)} |" for each in rows))


def insert_layers(app: Sphinx, document: str, content: list[str]) -> None:
    """Writes the table of all layers, from their classes."""
    if document == "layers":
        layer_table.check_complete()
        lines = [layer_table.HEADER, ["---"] * len(layer_table.HEADER), *layer_table.rows()]
        content[0] = content[0].replace("<!-- layers -->", "\n".join(f"| {' | '.join(each)} |" for each in lines))


def insert_broken_layers(app: Sphinx, document: str, content: list[str]) -> None:
    """Writes the table of peers' bugs: tries each law, and tells what it says."""
    if document == "testing":
        rows = ["| library | its bug | law | which says |", "|---|---|---|---|"]
        for each in BROKEN:
            if each.peer is not None:
                found = " ".join(said_of(each).split())
                rows.append(f"| {each.peer} | {each.bug} | {{any}}`{each.law.__name__}` | {found} |")
        content[0] = content[0].replace("<!-- broken -->", "\n".join(rows))


def said_of(broken: Broken) -> str:
    """The first line of the error that a broken layer meets."""
    torch.manual_seed(0)
    try:
        broken.law(broken.layer, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    except Exception as error:  # noqa: BLE001 (that of the layer, too)
        return next(line for line in str(error).splitlines() if line.strip())
    raise RuntimeError(f"{type(broken.layer).__name__} is refused by no law")


def with_alias(text: str, write: object) -> str:
    """Puts the name ``Value`` back where Python has replaced it by what it stands for."""
    once = write(invertible.Value, "smart")
    twice = once.replace("Value", once)
    name = "~invertible.Value" if write is stringify_annotation else ":py:class:`~invertible.Value`"
    return text.replace(twice, name).replace(once, name)


def process_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str, str] | None:
    """Writes signatures as the source does: with aliases, and without the arguments that no one gives."""
    if what == "class" and obj.__init__ is nn.Module.__init__:
        return "()", ""
    if what == "class" and issubclass(obj, enum.Enum):
        return "", ""
    if what == "class" and getattr(obj, "_is_protocol", False):  # a function's type: how the function is called
        signature = stringify_signature(signature_of(obj.__call__, bound_method=True), unqualified_typehints=True)
        returns = ""
    if signature is None:
        return None
    if obj in LAWS:
        return "(module, x, /, *, condition=None, atol=None)", ""  # one for all laws; the types are at Law
    signature = signature.replace("<factory>", "{}")  # as a dataclass shows an empty dictionary
    return with_alias(signature, stringify_annotation), with_alias(returns or "", stringify_annotation)


def process_bases(app: Sphinx, name: str, obj: type, options: object, bases: list) -> None:
    """Writes the bases with aliases, too, and in place of a private one the public one that it has."""
    bases[:] = [with_alias(restify(public_base(base), "smart"), restify) for base in bases]


def public_base(base: type) -> type:
    """The class itself, or what it is made from, if its name is private."""
    return public_base(base.__orig_bases__[0]) if base.__name__.startswith("_") else base


def process_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Finds the docstrings of constants, and keeps napoleon from reading a first line as ``type: text``."""
    if what == "data":
        lines[:] = constant_docstring(*name.rsplit(".", 1))
    if what in {"attribute", "data", "property"}:
        lines[:0] = ["..", ""]  # an empty comment as the first line


def constant_docstring(package: str, name: str) -> list[str]:
    """The text below a constant, in whichever file of its package defines it."""
    for module in [m for m in sys.modules if f"{m}.".startswith(f"{package}.")]:
        documented = ModuleAnalyzer.for_module(module).find_attr_docs()
        if ("", name) in documented:
            return documented["", name]
    return []


def resolve_inherited(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Links a method that a docstring names to the base class that documents it."""
    if node.get("refdomain") != "py" or not node.get("py:class"):
        return None
    package, target = node["py:module"], node["reftarget"]
    bases = getattr(importlib.import_module(package), node["py:class"]).__mro__
    names = [f"{place}.{base.__name__}.{target}" for base in bases for place in (package, top_package(base))]
    domain = env.domains.python_domain
    found = next((name for name in names if name in domain.objects), None)
    return found and domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found, node, text)


def resolve_error(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Links an error of ours that a "Raises" section names without its module."""
    if node.get("reftype") != "exc":
        return None
    domain = env.domains.python_domain
    found = [name for name in domain.objects if name.endswith(f".{node['reftarget']}")]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, text) if found else None


def mark_names(app: Sphinx, doctree: nodes.document) -> None:
    """Makes header cells of the names in lists of names, as screen readers need them."""
    for listing in doctree.findall(autosummary_table):
        next(listing.findall(nodes.colspec))["stub"] = True


def level_captions(app: Sphinx, pagename: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Says of which level the captions of the contents are, for Sphinx calls them headings and does not."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace('role="heading">', 'role="heading" aria-level="2">')


def leave_type_variables(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.TextElement | None:
    """Writes type variables without a link, for they have no page."""
    module, _, name = node["reftarget"].rpartition(".")
    return text if isinstance(getattr(sys.modules.get(module), name, None), TypeVar) else None


def top_package(thing: type) -> str:
    """The package from which a class is imported, for the public ones are exported at the top."""
    return thing.__module__.partition(".")[0]


def setup(app: Sphinx) -> None:
    """Registers the functions above."""
    app.connect("config-inited", compile_inventories, priority=100)  # before intersphinx reads its mapping
    app.connect("config-inited", remove_stale_pages)
    app.connect("include-read", rebase_links)
    app.connect("source-read", insert_cards)
    app.connect("source-read", insert_layers)
    app.connect("source-read", insert_broken_layers)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-process-bases", process_bases)
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before napoleon
    app.connect("doctree-read", mark_names)
    app.connect("html-page-context", level_captions, priority=900)  # after the theme has made them
    app.connect("missing-reference", resolve_inherited)
    app.connect("missing-reference", resolve_error)
    app.connect("missing-reference", leave_type_variables)
