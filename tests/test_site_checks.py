"""Each check of the built site finds what it is for: it is given a sound site, and then one fault at a time."""

import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from site_checks import CHECKS, Site, contents, contrast
from site_checks.access import inaccessible
from site_checks.contents import heavy_files, heavy_pictures, missing_names
from site_checks.contrast import WRITTEN, low_contrast
from site_checks.links import dead_links, outside_requests

DOCS = Path(__file__).parents[1] / "docs"
PAGE = """<!doctype html>
<html lang="en">
<head>
  <title>A page</title>
  <meta name="viewport" content="width=device-width,initial-scale=1">
  <link rel="stylesheet" href="_static/theme.css?v=1"><link rel="next" href="other.html">
</head>
<body>
<label for="q">Search</label><input id="q" name="q"><input type="hidden" name="area">
<label>Theme <input name="theme"></label>
<main>
  <h1>Title<a class="headerlink" href="#title">¶</a></h1>
  <section id="title">
    <h2>A part</h2><h3>A part of it</h3><h2>Another</h2>
    <p><a href="other.html#place">there</a>
    <a href="deep/">a folder</a> <a href="https://example.org/">elsewhere</a></p>
    <p><a href="other.html">
    <img src="_images/plot.png" srcset="_images/plot.png 1x, _images/plot.png 2x" alt="A plot"></a>
    <button aria-label="Copy"></button><img src="_images/plot.png" alt=""></p>
    <dl><dt id="package.First">First</dt><dd><p>The first of two.</p></dd></dl>
    <dl><dt id="package.Second">Second</dt><dd><p>The last.</p></dd></dl>
    <table><tr><th>name</th></tr><tr><td>1</td></tr></table>
    <table class="indextable genindextable"><tr><td>A</td></tr></table>
  </section>
</main>
</body>
</html>
"""
CODE = ".highlight { background: #fff; color: #000 } .highlight .k { color: #00f }\n"
DARK = "body[data-theme='dark'] "
VARIABLES = sorted({*WRITTEN, *" ".join(WRITTEN.values()).split()} | {"color-background-primary"})


def theme(text, paper):
    return " ".join(f"--{name}: {paper if name in WRITTEN else text};" for name in VARIABLES)


CSS = (
    f"@charset 'utf-8'; body {{ {theme('#000', '#fff')} }}\n"
    f"@media not print {{ {DARK}{{ {theme('#eee', '#111')} }} }}\n"
    f"@media print {{ body {{ {theme('#fff', '#fff')} }} }}\n"
    f"{CODE}{DARK}.highlight {{ background: #222 }} {DARK}.highlight .k {{ color: #8af }}\n"
    ".icon { background: url('../_images/plot.png'), url(data:image/png;base64,AA) }"
)


@pytest.fixture
def site(tmp_path):
    """A sound site of a few pages; a test spoils a file and asks a check."""
    files = {
        "index.html": PAGE,
        "other.html": PAGE.replace('id="title"', 'id="title"><span id="place"></span').replace("#place", "#title"),
        "deep/index.html": PAGE.replace('="_', '="../_').replace(', _', ', ../_').replace("other.html", "../other.html")
        .replace('"deep/"', '"./"'),
        "_static/theme.css": CSS,
        "_images/drawing.svg": '<svg xmlns="http://www.w3.org/2000/svg"><defs id="a"/><use xlink:href="#a"/></svg>',
        "_images/plot.png": "not looked into",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    names = "".join(f"package.{name} py:class 1 other.html# -\n" for name in ("First", "Second"))
    (tmp_path / "objects.inv").write_bytes(b"#\n#\n#\n#\n" + zlib.compress(names.encode()))
    return tmp_path


def spoilt(root, old, new, name="index.html"):
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))
    return Site(root)


@pytest.mark.parametrize("check", [check for check in CHECKS if check is not missing_names])
def test_a_sound_site_has_no_fault(site, check):
    assert list(check(Site(site))) == []
    assert len(Site(site).pages) == 3


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("other.html#place", "gone.html", "gone.html leads nowhere: no such file"),
        ("other.html#place", "other.html#gone", "other.html#gone leads nowhere: no such anchor"),
        ("other.html#place", "#gone", "#gone leads nowhere: no such anchor"),
        ("deep/", "_images/", "_images/ leads nowhere: no such file"),
        ("other.html#place", "../index.html", "../index.html leads nowhere: no such file"),  # not within the site
        ("other.html#place", "javascript:open()", "a scheme of its own"),
        ('<img src="_images/plot.png"', '<img src="_images/gone.png"', "_images/gone.png leads nowhere"),
        ("plot.png 2x", "gone.png 2x", "_images/gone.png leads nowhere"),
        ("theme.css", "gone.css", "_static/gone.css?v=1 leads nowhere"),
    ],
)
def test_dead_links_are_found(site, old, new, fault):
    assert fault in "\n".join(dead_links(spoilt(site, old, new)))


def test_dead_links_in_style_sheets_are_found(site):
    assert list(dead_links(spoilt(site, "plot.png", "gone.png", "_static/theme.css"))) == [
        "_static/theme.css: ../_images/gone.png leads nowhere"
    ]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("index.html", "_static/theme.css", "https://cdn.example.org/theme.css"),
        ("index.html", '<link rel="next"', '<link rel="shortcut icon" href="//example.org/a.ico"><link rel="next"'),
        ("index.html", '<link rel="next"', '<link rel="preconnect" href="https://example.org"><link rel="next"'),
        ("index.html", "<main>", '<script src="https://example.org/a.js"></script><main>'),
        ("index.html", "<main>", '<main style="background: url(https://example.org/a.png)">'),
        ("index.html", "<main>", '<style>@import "https://example.org/a.css";</style><main>'),
        ("index.html", "<main>", '<iframe src="https://example.org/"></iframe><main>'),
        ("index.html", '<img src="_images/plot.png"', '<img src="https://example.org/a.png"'),
        ("index.html", "_images/plot.png 2x", "https://example.org/a.png 2x"),
        ("_static/theme.css", "../_images/plot.png", "https://example.org/a.png"),
        ("_static/theme.css", "@charset 'utf-8'", "@import url(//example.org/a.css)"),
        ("_images/drawing.svg", 'xlink:href="#a"', 'xlink:href="https://example.org/a.svg#a"'),
    ],
)
def test_requests_to_other_hosts_are_found(site, name, old, new):
    (fault,) = outside_requests(spoilt(site, old, new, name))
    assert fault.startswith(f"{name}: fetches ")
    assert "example.org" in fault


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (' lang="en"', "", "no language"),
        ("A page", " ", "no <title>"),
        ("width=device-width,", "", "no viewport"),
        ("main>", "div>", "0 main parts"),
        ("<main>", '<div role="main"></div><main>', "2 main parts"),
        ("<h1>", "<h2>", "0 headings h1"),
        ("<h2>A part</h2>", "<h1>A part</h1>", "2 headings h1"),
        ("<h2>A part</h2>", "", "<h3> 'A part of it' after a heading of level 1"),
        ("A part of it", "¶", "an empty <h3>"),
        ("<main>", '<main><p role="heading">Start</p>', "a heading without a level: <p> 'Start'"),
        (' alt="A plot"', "", "no alt text: _images/plot.png"),
        ('alt="A plot"', 'alt="_images/plot.png"', "a file's name as alt text"),
        (
            'alt="A plot"',
            'alt="index"',
            "the program's name as alt text, so give the picture a title: _images/plot.png",
        ),
        ('alt="A plot"', 'alt=""', "no words: <a href='other.html'"),
        (">there<", "><", "no words: <a href='other.html#place'"),
        (' aria-label="Copy"', "", "no words: <button"),
        ('for="q"', 'for="p"', "no label: <input name='q'>"),
        ("Theme ", "", "no label: <input name='theme'>"),
        ('id="q"', 'id="title"', "the id 'title' is there 2 times"),
        ("<th>name</th>", "<td>name</td>", "a table without header cells: 'name1'"),
    ],
)
def test_what_a_screen_reader_misses_is_found(site, old, new, fault):
    assert fault in "\n".join(inaccessible(spoilt(site, old, new)))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "--color-link: #000",
            "--color-link: #777",
            "light: color-link on color-background-primary has a contrast of 4.48",
        ),
        (
            "--color-link: #eee",
            "--color-link: rgba(255, 255, 255, 0.3)",
            "dark: color-link on color-background-primary",
        ),
        ("--color-link: #000", "--color-link: var(--other)", "there is no variable --other"),
        ("--color-link: #000", "--color-link: hsl(0, 0%, 60%)", "light: color-link on"),
        ("--color-link: #000", "--color-link: red-ish", "not a colour: red-ish"),
        ("#00f", "#99f", "light: code in .highlight .k has a contrast of 2.5"),
        ("#8af", "#446", "dark: code in body[data-theme=dark] .highlight .k has a contrast of"),
        ("background: #222", "", "dark: no colours of code"),
    ],
)
def test_faint_text_is_found(site, old, new, fault):
    assert fault in "\n".join(low_contrast(spoilt(site, old, new, "_static/theme.css")))


def test_the_ratios_are_those_of_wcag():
    """Of black on white, 21; of the grey that is known as the lightest to be legible on white, 4.54."""
    white, black, grey = (contrast.colour(each, {}) for each in ("white", "#000000", "#767676"))
    assert contrast.contrast(black, white) == pytest.approx(21)
    assert contrast.contrast(white, black) == pytest.approx(21)
    assert contrast.contrast(grey, white) == pytest.approx(4.54, abs=0.005)
    assert contrast.over(contrast.colour("#00000080", {}), white)[0] == pytest.approx(0.498, abs=0.001)
    assert contrast.colour("hsla(120, 100%, 25%, .5)", {}) == pytest.approx((0, 0.5, 0, 0.5))


def test_public_names_without_a_page_or_a_word_are_found(site, monkeypatch, tmp_path):
    package = type(sys)("package")
    monkeypatch.setitem(sys.modules, "package", package)
    monkeypatch.setattr(contents, "DOCS", tmp_path)
    (tmp_path / "api.md").write_text("# Reference\n\n   :toctree: generated\n\n   package\n")
    package.__all__ = ["First", "Second"]
    assert list(missing_names(Site(site))) == []
    assert list(missing_names(spoilt(site, "<p>The last.</p>", "<p></p>", "other.html"))) == [
        "other.html: package.Second has no description"
    ]
    package.__all__ = ["First", "Third"]
    assert list(missing_names(Site(site))) == ["objects.inv: package.Third is public and is not there"]


def test_the_packages_are_those_of_the_reference():
    found = contents.packages((DOCS / "api.md").read_text())
    assert {"invertible", "invertible.testing.strategies", "zoo", "zoo.flows.fitting"} <= set(found)


@pytest.mark.parametrize(
    ("name", "size", "heavy"),
    [
        ("index.html", 500_000, False),
        ("index.html", 500_001, True),
        ("_images/plot.png", 1_000_000, False),
        ("_images/plot.png", 1_000_001, True),
    ],
)
def test_heavy_files_are_found(site, name, size, heavy):
    (site / name).write_bytes(PAGE.encode().ljust(size))
    found = list(heavy_files(Site(site)))
    assert [fault.partition(":")[0] for fault in found] == [name] * heavy


def test_heavy_pictures_are_found(tmp_path):
    (tmp_path / "small.png").write_bytes(bytes(200_000))
    (tmp_path / "large.svg").write_bytes(bytes(201_000))
    (tmp_path / "text.md").write_bytes(bytes(300_000))
    assert list(heavy_pictures(tmp_path)) == ["large.svg: 201 kB, more than 200"]


@pytest.mark.parametrize("folder", ["figures", "_static"])
def test_the_pictures_of_this_documentation_are_light(folder):
    assert list(heavy_pictures(DOCS / folder)) == []


def test_the_command_says_what_it_wants(tmp_path):
    """It ends with 2 where there is no site; with 1 it says that a site has faults."""
    command = [sys.executable, str(DOCS / "check_site.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "usage: python docs/check_site.py FOLDER" in result.stderr


@pytest.mark.slow
def test_the_command_names_the_faults(site):
    command = [sys.executable, str(DOCS / "check_site.py"), str(site)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "missing_names: objects.inv: invertible.PadSplit is public and is not there" in result.stdout
    assert "3 pages checked, faults: " in result.stdout
