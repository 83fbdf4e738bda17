"""Numbers and pictures in the pages have their command beside them; prose is spelt as it is in Britain."""

import re
from pathlib import Path

import pytest

from tests.documented import PAGES, ROOT, commands_of, pictures, sections, tables_of_numbers, without_fences

NOT_MEASURED = {  # tables of numbers that no command makes, by page and heading
    ("gpu.md", "Aims"): "what is to be measured",
    ("gpu.md", "An optimizer inside the backward pass"): "counted on the meta device, by the function it names",
    ("grid.md", "Exact arithmetic"): "what the presets are",
    ("irevnet.md", "i-RevNet"): "what the networks are",
    ("irevnet.md", "The networks it is compared with"): "what the networks are",
    ("reconstruction.md", "The cost, in runs of F"): "counted by the example below it",
    ("speed.md", "What was tried"): "of code that was not kept",
}
MACHINE = re.compile(r"\b(cores?|threads?|GPU|H200|EPYC)\b")


def speaks_for_the_page(text):
    """Whether a paragraph says of all on its page by which command it was made."""
    paragraphs = re.split(r"\n\s*\n", text)
    return any(re.search(r"(?s)\bAll\b.* (of|on) this page\b", each) and commands_of(each, "") for each in paragraphs)


def unexplained(page, text):
    """A line for each table of numbers, or picture, whose section and those around it name no command."""
    for section in sections(text):
        shown = [*tables_of_numbers(section.body), *pictures(section.body)]
        if not shown or (page, section.heading) in NOT_MEASURED:
            continue
        if not commands_of(section.context, page) and not speaks_for_the_page(text):
            yield f"{page}, {section.heading}: no command for {shown[0].strip()[:60]!r}"
        for what, pattern in (
            ("date", r"\b20\d\d-\d\d-\d\d\b"),
            ("version of torch", r"\btorch\s+\d+\.\d+"),
            ("machine", MACHINE),
        ):
            if tables_of_numbers(section.body) and not re.search(pattern, text):
                yield f"{page}, {section.heading}: no {what} on the page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_and_pictures_have_their_command(page):
    assert list(unexplained(page.name, page.read_text())) == []


TABLE = "| | time |\n|---|---|\n| a | 1.0 |\n| b | 2.0 |\n"
SAID = "On 2026-11-29, on one core, torch 2.14.1, by `python -m benchmarks.grid`:\n\n"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (f"# Page\n\n{SAID}{TABLE}", []),
        (f"# Page\n\n{SAID}\n## Below\n\n{TABLE}", []),  # what is said above holds below
        (f"# Page\n\n## One\n\n{SAID}\n## Two\n\n{TABLE}", ["page.md, Two: no command"]),
        (f"# Page\n\n## One\n\nAll tables of this page: {SAID}\n## Two\n\n{TABLE}", []),
        (f"# Page\n\n## One\n\nAll tables of this page.\n\n{SAID}\n## Two\n\n{TABLE}", ["page.md, Two: no command"]),
        (f"# Page\n\n{SAID.replace('-11', '')}{TABLE}", ["page.md, Page: no date"]),
        (f"# Page\n\n{SAID.replace('torch', 'it')}{TABLE}", ["page.md, Page: no version of torch"]),
        (f"# Page\n\n{SAID.replace('core', 'thing')}{TABLE}", ["page.md, Page: no machine"]),
        ("# Page\n\n![A plot](figures/plot.png)\n", ["page.md, Page: no command for 'figures/plot.png'"]),
        ("# Page\n\n```{figure} _static/plot.svg\n```\n", ["page.md, Page: no command for '_static/plot.svg'"]),
        ("# Page\n\n    python -m zoo.analysis curves\n\n![A plot](figures/plot.png)\n", []),
        ("# Page\n\n| a | b |\n|---|---|\n| c | words |\n| d | words |\n", []),
        (f"# Page\n\n```text\n# no heading\n{TABLE}```\n", []),
    ],
)
def test_a_number_without_its_command_is_found(text, faults):
    found = list(unexplained("page.md", text))
    assert len(found) == len(faults)
    assert all(one.startswith(other) for one, other in zip(found, faults, strict=True))


def test_the_exceptions_are_still_needed():
    there = {
        (page.name, each.heading)
        for page in PAGES
        for each in sections(page.read_text())
        if tables_of_numbers(each.body)
    }
    assert set(NOT_MEASURED) <= there


ALLOWED = {
    "optimizer",
    "optimizers",
    "normalizing",
    "program",
    "programs",
}  # terms of the field; and what a computer runs


def americanisms(text):
    """Words of a page's prose that are spelt otherwise in Britain."""
    spelling = pytest.importorskip("codespell_lib")
    lines = (Path(spelling.__file__).parent / "data" / "dictionary_en-GB_to_en-US.txt").read_text().splitlines()
    american = {word.strip() for line in lines for word in line.partition("->")[2].split(",")} - ALLOWED - {""}
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", " ", without_fences(text))
    return sorted({word for word in re.findall(r"[a-z]+", prose.lower()) if word in american})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_prose_is_spelt_as_in_britain(page):
    assert americanisms(page.read_text()) == []


def test_american_spelling_is_found():
    assert americanisms("Color, the `color` of\n```python\ncolor\n```\nthe center, standardized.") == [
        "center",
        "color",
        "standardized",
    ]
