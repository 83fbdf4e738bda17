"""A built page as a tree of elements, and the site as its pages: all that the checks read."""

import re
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
URL = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")


class Element:
    """A tag with its attributes, and what is between it and its end."""

    def __init__(self, tag: str, attributes: dict[str, str], parent: "Element | None") -> None:
        self.tag = tag
        self.attributes = attributes
        self.parent = parent
        self.children: list[Element | str] = []

    def __getitem__(self, name: str) -> str:
        """The value of an attribute, or an empty string."""
        return self.attributes.get(name, "")

    def __contains__(self, name: str) -> bool:
        return name in self.attributes

    def __iter__(self) -> Iterator["Element"]:
        """The element itself, and all in it."""
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child

    @property
    def text(self) -> str:
        """All words in it."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def name(self) -> str:
        """What a screen reader calls it: its label, its words, or those of its images."""
        inner = [self["aria-label"], self["title"], self.text, *(each["alt"] for each in self if each.tag == "img")]
        return " ".join(" ".join(inner).split())

    @property
    def ancestors(self) -> Iterator["Element"]:
        """What it is in, from the inside."""
        if self.parent is not None:
            yield self.parent
            yield from self.parent.ancestors


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.open = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.open)
        self.open.children.append(element)
        if tag not in VOID:
            self.open = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.children.append(Element(tag, {name: value or "" for name, value in attrs}, self.open))

    def handle_endtag(self, tag: str) -> None:
        match = next((each for each in (self.open, *self.open.ancestors) if each.tag == tag), None)
        if match is not None and match.parent is not None:
            self.open = match.parent

    def handle_data(self, data: str) -> None:
        self.open.children.append(data)


class Page:
    """One HTML file of a site; ``path`` is relative to the site."""

    def __init__(self, path: str, html: str) -> None:
        self.path = path
        builder = _Builder()
        builder.feed(html)
        self.root = builder.root
        self.elements = list(builder.root)

    def all(self, *tags: str) -> list[Element]:
        """The elements of these tags, in order."""
        return [element for element in self.elements if element.tag in tags]

    @cached_property
    def anchors(self) -> set[str]:
        """What may follow a # in a link to this page."""
        return {""} | {each["id"] for each in self.elements} | {each["name"] for each in self.all("a")}


class Site:
    """A folder that Sphinx has made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}

    @cached_property
    def pages(self) -> dict[str, Page]:
        """The pages by their paths; those of the theme's own folder are none."""
        names = sorted(name for name in self.files if name.endswith(".html") and not name.startswith("_"))
        return {name: Page(name, self.read(name)) for name in names}

    def read(self, name: str) -> str:
        """The text of a file."""
        return (self.root / name).read_text(encoding="utf-8")

    @cached_property
    def stylesheets(self) -> dict[str, str]:
        """The texts of the style sheets by their paths."""
        return {name: self.read(name) for name in sorted(self.files) if name.endswith(".css")}


def urls(css: str) -> list[str]:
    """What a style sheet loads."""
    return [a or b for a, b in URL.findall(re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL))]
