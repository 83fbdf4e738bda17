"""What of accessibility can be seen in a page's text; contrast is in ``contrast.py``, the rest is for a browser."""

import re
from collections import Counter
from collections.abc import Iterator

from .page import Element, Page, Site

LAYOUT = {"indextable"}  # Sphinx lays its index out in columns: no data, so no header cells
FILE_NAME = re.compile(r"\.(png|svg|jpe?g|gif|webp)$", re.IGNORECASE)


def inaccessible(site: Site) -> Iterator[str]:
    """Faults that a screen reader's user would meet."""
    for page in site.pages.values():
        for rule in RULES:
            yield from (f"{page.path}: {fault}" for fault in dict.fromkeys(rule(page)))


def document(page: Page) -> Iterator[str]:
    """A language, a title, a viewport for phones, and one main part."""
    if not any(element["lang"] for element in page.all("html")):
        yield "no language: <html lang=...>"
    if not any(title.text.strip() for title in page.all("title") if title.parent and title.parent.tag == "head"):
        yield "no <title>"
    if not any("width=device-width" in meta["content"] for meta in page.all("meta") if meta["name"] == "viewport"):
        yield "no viewport for phones"
    main = [element for element in page.elements if element.tag == "main" or element["role"] == "main"]
    if len(main) != 1:
        yield f"{len(main)} main parts in place of one"


def headings(page: Page) -> Iterator[str]:
    """One h1, no empty heading, and no level left out."""
    found = page.all("h1", "h2", "h3", "h4", "h5", "h6")
    first = sum(heading.tag == "h1" for heading in found)
    if first != 1:
        yield f"{first} headings h1 in place of one"
    level = 0
    for heading in found:
        if not heading.text.strip("¶# \n"):
            yield f"an empty <{heading.tag}>"
        if int(heading.tag[1]) > level + 1:
            yield f"<{heading.tag}> {heading.text.strip()!r} after a heading of level {level}"
        level = int(heading.tag[1])
    for element in page.elements:
        if element["role"] == "heading" and not element["aria-level"]:
            yield f"a heading without a level: <{element.tag}> {element.text.strip()!r}"


def images(page: Page) -> Iterator[str]:
    """Pictures have a text in their place: empty for decoration, and never the name of a file."""
    program = page.path.rpartition("/")[2].removesuffix(".html").replace("_", " ")  # so does sphinx-gallery
    for image in page.all("img"):
        if "alt" not in image:
            yield f"no alt text: {image['src']}"
        elif FILE_NAME.search(image["alt"]):
            yield f"a file's name as alt text: {image['alt']}"
        elif image["alt"] == program:
            yield f"the program's name as alt text, so give the picture a title: {image['src']}"


def controls(page: Page) -> Iterator[str]:
    """Links, buttons and fields have a name."""
    labels = {label["for"] for label in page.all("label") if label.name}
    for element in page.all("input", "select", "textarea"):
        wrapped = any(each.tag == "label" and each.name for each in element.ancestors)
        named = any(element[name].strip() for name in ("aria-label", "aria-labelledby", "title"))
        if element["type"] not in {"hidden", "submit"} and not (named or wrapped or element["id"] in labels - {""}):
            yield f"no label: <{element.tag} name={element['name']!r}>"
    for element in page.all("a", "button"):
        if not element.name and ("href" in element or element.tag == "button") and not hidden(element):
            yield f"no words: <{element.tag} href={element['href']!r} class={element['class']!r}>"


def hidden(element: Element) -> bool:
    """Whether it is kept from screen readers."""
    return any(each["aria-hidden"] == "true" for each in (element, *element.ancestors))


def ids(page: Page) -> Iterator[str]:
    """No id is given twice."""
    counts = Counter(element["id"] for element in page.elements if element["id"])
    yield from (f"the id {name!r} is there {count} times" for name, count in counts.items() if count > 1)


def tables(page: Page) -> Iterator[str]:
    """Tables have header cells, unless they are layout."""
    for table in page.all("table"):
        layout = table["role"] in {"presentation", "none"} or LAYOUT & set(table["class"].split())
        if not layout and not any(cell.tag == "th" for cell in table):
            yield f"a table without header cells: {' '.join(table.text.split())[:60]!r}"


RULES = (document, headings, images, controls, ids, tables)
