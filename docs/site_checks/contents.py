"""Every public name has its place, and no page or picture is too heavy."""

import importlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from .page import Page, Site

DOCS = Path(__file__).parents[1]
PAGE, SHOWN, COMMITTED = 500_000, 1_000_000, 200_000  # bytes
PICTURES = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"}


def missing_names(site: Site) -> Iterator[str]:
    """Public names of the packages in ``api.md`` that no search finds, or that stand on their page without a word."""
    known = inventory((site.root / "objects.inv").read_bytes())
    for package in packages((DOCS / "api.md").read_text(encoding="utf-8")):
        for name in importlib.import_module(package).__all__:
            page = known.get(f"{package}.{name}")
            if page is None:
                yield f"objects.inv: {package}.{name} is public and is not there"
            elif not described(site.pages[page], f"{package}.{name}"):
                yield f"{page}: {package}.{name} has no description"


def described(page: Page, name: str) -> bool:
    """Whether something follows the signature of a name."""
    lists = [entry.parent for entry in page.all("dt") if entry["id"] == name and entry.parent is not None]
    return any(each.tag == "dd" and each.text.strip() for entries in lists for each in entries)


def packages(page: str) -> list[str]:
    """The packages that the page of the reference lists."""
    return re.findall(r"^   ([a-z_]+(?:\.[a-z_]+)*)$", page, re.MULTILINE)


def inventory(data: bytes) -> dict[str, str]:
    """Python's names in an inventory of Sphinx, version 2, and their pages: four lines, then compressed ones."""
    rows = [line.split() for line in zlib.decompress(data.split(b"\n", 4)[4]).decode().splitlines()]
    return {name: page.partition("#")[0] for name, kind, _, page, *_ in rows if kind.startswith("py:")}


def heavy_files(site: Site) -> Iterator[str]:
    """Pages of more than 500 kB; and pictures of more than 1 MB, of which the gallery makes large ones, too."""
    for name in site.pages:
        yield from too_heavy(site.root / name, PAGE, name)
    for name in sorted(site.files):
        if name.startswith("_images/"):
            yield from too_heavy(site.root / name, SHOWN, name)


def heavy_pictures(folder: Path) -> Iterator[str]:
    """Committed pictures of more than 200 kB."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in PICTURES:
            yield from too_heavy(file, COMMITTED, file.relative_to(folder).as_posix())


def too_heavy(file: Path, most: int, name: str) -> Iterator[str]:
    """A line if the file has more bytes than that."""
    size = file.stat().st_size
    if size > most:
        yield f"{name}: {size / 1000:.0f} kB, more than {most // 1000}"
