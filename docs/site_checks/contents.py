"""Every public name has its place, and no page or picture is too heavy."""

import importlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from .page import Site

DOCS = Path(__file__).parents[1]
PAGE, SHOWN, COMMITTED = 500_000, 1_000_000, 200_000  # bytes
PICTURES = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"}


def missing_names(site: Site) -> Iterator[str]:
    """Public names of the packages in ``api.md`` that ``objects.inv`` doesn't have, and so no search finds."""
    known = inventory((site.root / "objects.inv").read_bytes())
    for package in packages((DOCS / "api.md").read_text(encoding="utf-8")):
        for name in importlib.import_module(package).__all__:
            if f"{package}.{name}" not in known:
                yield f"objects.inv: {package}.{name} is public and is not there"


def packages(page: str) -> list[str]:
    """The packages that the page of the reference lists."""
    return re.findall(r"^   ([a-z_]+(?:\.[a-z_]+)*)$", page, re.MULTILINE)


def inventory(data: bytes) -> set[str]:
    """The names of Python's domain in an inventory of Sphinx, version 2: four lines, then compressed ones."""
    lines = zlib.decompress(data.split(b"\n", 4)[4]).decode().splitlines()
    return {line.split()[0] for line in lines if line.split()[1].startswith("py:")}


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
