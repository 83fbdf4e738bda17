"""Links and pictures lead somewhere, and nothing is fetched from elsewhere."""

import posixpath
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from .page import Element, Page, Site, urls

LOADED = {  # the relations of a <link> that make a browser fetch something
    "stylesheet", "icon", "apple-touch-icon", "mask-icon", "preload", "modulepreload", "prefetch", "preconnect",
    "dns-prefetch", "manifest", "search",
}  # fmt: skip
SOURCES = ("src", "poster", "data")


def dead_links(site: Site) -> Iterator[str]:
    """Links, anchors and pictures within the site that lead nowhere."""
    for page in site.pages.values():
        for target in dict.fromkeys(targets(page)):
            wrong = dead(site, page.path, target)
            if wrong:
                yield f"{page.path}: {target} leads nowhere: {wrong}"
    for name, css in site.stylesheets.items():
        for target in dict.fromkeys(urls(css)):
            if dead(site, name, target):
                yield f"{name}: {target} leads nowhere"


def targets(page: Page) -> Iterator[str]:
    """All that a page refers to, as it is written there."""
    for element in page.elements:
        for name in ("href", "xlink:href", "action", *SOURCES):
            if name in element and not (name == "data" and element.tag != "object"):
                yield element[name]
        yield from candidates(element)


def candidates(element: Element) -> list[str]:
    """The pictures of a ``srcset``, of which the browser takes one."""
    return [each.split()[0] for each in element["srcset"].split(",") if each.strip()]


def dead(site: Site, source: str, target: str) -> str | None:
    """What is wrong with a target, or None; what is elsewhere is not looked up."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        known = parts.netloc or parts.scheme in {"mailto", "data"}
        return None if known else f"a scheme of its own, {parts.scheme}"
    path = source
    if parts.path:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(parts.path)))
    if path not in site.files:
        path = posixpath.normpath(posixpath.join(path, "index.html"))
    if path not in site.files:
        return "no such file"
    if path in site.pages and unquote(parts.fragment) not in site.pages[path].anchors:
        return "no such anchor"
    return None


def outside_requests(site: Site) -> Iterator[str]:
    """What a browser would fetch from another host to show a page. What a script fetches shows in a browser only."""
    for page in site.pages.values():
        for target in fetched(page):
            if is_outside(target):
                yield f"{page.path}: fetches {target}"
    for name, css in site.stylesheets.items():
        yield from (f"{name}: fetches {target}" for target in urls(css) if is_outside(target))
    for name in sorted(site.files):
        if name.endswith(".svg"):
            picture = Page(name, site.read(name))
            yield from (f"{name}: fetches {target}" for target in fetched(picture) if is_outside(target))


def fetched(page: Page) -> Iterator[str]:
    """All that a browser fetches for a page, as far as its text says so."""
    for element in page.elements:
        if element.tag == "link" and LOADED & set(element["rel"].lower().split()):
            yield element["href"]
        if element.tag in {"image", "use", "feimage"}:
            yield from (element[name] for name in ("href", "xlink:href"))
        yield from (element[name] for name in SOURCES)
        yield from candidates(element)
        yield from urls(element["style"] + (element.text if element.tag == "style" else ""))


def is_outside(target: str) -> bool:
    """Whether the target is on another host."""
    return bool(urlsplit(target).netloc)
