"""The bibliography has every paper that code and pages cite, and no entry says less than a reader needs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(path for folder in ("invertible", "zoo") for path in sorted((ROOT / folder).rglob("*.py"))),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
]
NUMBER = re.compile(r"arxiv(?:\.org/(?:abs|pdf|html)/|:\s?)(\d{4}\.\d{4,5})", re.IGNORECASE)
DOI = re.compile(r"doi\.org/(10\.\d+/[\w./-]*\w)", re.IGNORECASE)
PRIVATE = {"10.1145/2660193.2660195"}  # of the constants of a checksum, which no page shows


def entries():
    """The fields of each entry by its key; values are in braces on lines of their own."""
    text = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
    found = re.findall(r"^@(\w+)\{(\w+),\n(.*?)^\}$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == text.count("@")
    return {key: dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.MULTILINE)) for _, key, body in found}


ENTRIES = entries()


def cited(pattern):
    """Each paper's number, and the first file that names it."""
    return {
        number: str(path.relative_to(ROOT))
        for path in reversed(SOURCES)
        for number in pattern.findall(path.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize(("pattern", "least"), [(NUMBER, 30), (DOI, 6)], ids=["arXiv", "DOI"])
def test_every_paper_that_is_cited_has_an_entry(pattern, least):
    found = cited(pattern)
    assert len(found) >= least  # or the pattern sees nothing
    known = {match for each in ENTRIES.values() for match in pattern.findall(each["url"])}
    assert {number: path for number, path in found.items() if number not in known | PRIVATE} == {}


def test_every_entry_says_who_what_when_and_where():
    for key, each in ENTRIES.items():
        assert {"author", "title", "year", "url"} < set(each), key
        assert each.keys() & {"booktitle", "journal", "howpublished"}, key
        assert key.endswith(each["year"]), key
        assert each["url"].startswith("https://"), key
    urls = [each["url"] for each in ENTRIES.values()]
    assert len(urls) == len(set(urls))


def test_every_citation_of_a_page_is_known():
    """A build says so, too, but takes minutes."""
    found = [
        (path.name, key)
        for path in SOURCES
        if path.suffix == ".md"
        for keys in re.findall(r"\{cite:[pt]\}`([^`]+)`", path.read_text(encoding="utf-8"))
        for key in keys.split(",")
    ]
    assert len(found) > 20
    assert [(page, key) for page, key in found if key not in ENTRIES] == []
