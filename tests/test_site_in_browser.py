"""The site as a reader sees it, in headless Chromium: nothing fails, nothing is fetched from elsewhere.

It looks at ``docs/_build/html`` if that is newer than what it is made from. Otherwise it builds the pages anew, without
running the tutorials. Screenshots are in ``runs/site``. Needs Chromium, and ``pip install '.[browser]'``.
"""

import fcntl
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

from tests.documented import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BUILT = ROOT / "docs" / "_build" / "html"
SCREENSHOTS = ROOT / "runs" / "site"
SIZES = {"wide": (1280, 900), "phone": (390, 844)}
PADSPLIT = "generated/invertible.PadSplit.html"
TUTORIAL = "tutorials/build_and_invert.html"
LOOKED_AT = ["index.html", TUTORIAL, "tutorials/index.html", PADSPLIT, "zoo.html", "analysis.html", "layers.html"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: chromium, chromium-browser or google-chrome"),
]


def sources():
    """The files that the site is made from."""
    code = [path for folder in ("invertible", "zoo", "examples/tutorials") for path in (ROOT / folder).rglob("*.py")]
    pages = [path for kind in ("*.md", "*.py", "*.bib", "_static/*", "_templates/**/*", "figures/*")
             for path in (ROOT / "docs").glob(kind)]  # fmt: skip
    return [*code, *pages, *ROOT.glob("*.md")]


def is_fresh():
    index = BUILT / "index.html"
    return index.is_file() and all(path.stat().st_mtime <= index.stat().st_mtime for path in sources())


def build(folder):
    """Builds the pages from a copy, so that the files of a build that goes on beside this one are left alone."""
    copy = folder / "copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name not in {"docs", "runs"} and not path.name.startswith("."):
            (copy / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", copy / "docs", ignore=shutil.ignore_patterns("_build", "generated", "tutorials"))
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-D",
        "plot_gallery=0",
        "-b",
        "html",
        "docs",
        folder / "html",
    ]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the site. Several workers share one build."""
    if is_fresh():
        return BUILT
    worker = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent / "site" if worker else tmp_path_factory.mktemp("site")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "html" / "objects.inv").exists():
            build(folder)
    return folder / "html"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where a server of our own shows the site."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")  # its event loop must not outlive this file
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


class Reader:
    """A window, and all that went wrong in it."""

    def __init__(self, browser, address, size="wide", scheme="light"):
        width, height = SIZES[size]
        self.address, self.look = address, f"{size}-{scheme}"
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.faults = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("request", self._watch)
        self.page.on(
            "response", lambda answer: answer.status < 400 or self.faults.append(f"{answer.status} {answer.url}")
        )

    def _listen(self, message):
        if message.type in {"error", "warning"}:
            self.faults.append(f"console: {message.text}")

    def _watch(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.faults.append(f"request: {request.url}")

    def open(self, path):
        self.page.goto(self.address + path)
        self.page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")

    def keep(self, name):
        """Writes a picture of the whole page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(
            path=SCREENSHOTS / f"{re.sub('[^a-z0-9A-Z.]+', '_', name)}-{self.look}.png", full_page=True
        )


@pytest.fixture
def read(browser, address):
    """Opens windows; at the end nothing may have gone wrong in any."""
    readers = []

    def opened(path, size="wide", scheme="light"):
        readers.append(Reader(browser, address, size, scheme))
        readers[-1].open(path)
        return readers[-1]

    yield opened
    faults = [fault for reader in readers for fault in reader.faults]
    for reader in readers:
        reader.context.close()
    assert faults == []


# What a reader of a narrow window would not see: the theme hides it, and nothing that scrolls is around it.
OVERFLOW = """() => {
    const width = document.documentElement.clientWidth;
    const clips = each => getComputedStyle(each).overflowX !== "visible";
    const held = each => each.tagName !== "ARTICLE" && (clips(each) || held(each.parentElement));
    const wide = [...document.querySelectorAll("article *:not(mjx-assistive-mml, mjx-assistive-mml *)")].filter(each =>
        each.getBoundingClientRect().right > width + 1 && !held(each.parentElement));
    const out = document.documentElement.scrollWidth > width ? ["the window scrolls sideways"] : [];
    return [...out, ...wide.slice(0, 5).map(each => each.outerHTML.slice(0, 200))];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path", LOOKED_AT)
def test_pages_open(read, path, size, scheme):
    reader = read(path, size, scheme)
    assert reader.page.locator("h1").count() == 1
    reader.keep(path)
    assert reader.page.evaluate(OVERFLOW) == []


def test_no_page_is_wider_than_a_phone(read, site):
    reader = read("index.html", "phone")
    wide = {}
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        if not name.startswith("_") and "refresh" not in path.read_text()[:400]:
            reader.page.goto(reader.address + name, wait_until="load")
            wide[name] = reader.page.evaluate(OVERFLOW)
    assert len(wide) > 200
    assert {name: found for name, found in wide.items() if found} == {}


def test_the_check_of_the_width_bites(read):
    reader = read("index.html", "phone")
    reader.page.evaluate(
        "document.querySelector('h1').insertAdjacentHTML('afterend', '<p style=\"width: 500px\">wide</p>')"
    )
    assert "500px" in "\n".join(reader.page.evaluate(OVERFLOW))


def test_the_search_finds_a_layer(read):
    """From the field of the front page to the layer's own page."""
    reader = read("index.html")
    reader.page.fill("input[name=q]", "PadSplit")
    reader.page.keyboard.press("Enter")
    found = reader.page.locator(f"#search-results a[href*='{PADSPLIT}']").first
    found.wait_for()
    reader.page.get_by_text(re.compile("found [0-9]+ page")).wait_for()
    reader.keep("search")
    found.click()
    reader.page.wait_for_url(f"**/{PADSPLIT}*")
    assert reader.page.locator("[id='invertible.PadSplit']").is_visible()


def test_formulas_are_set(read):
    reader = read(PADSPLIT)
    reader.page.locator("div.math mjx-container").first.wait_for()


def test_the_zoos_table_is_full(read):
    import zoo

    text = read("zoo.html").page.locator("table").first.inner_text()
    assert [name for name in zoo.names(kind="classifier") if name not in text] == []


def test_dark_is_dark(read):
    """By the reader's system, and by the button, which a next page remembers."""
    brightness = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3))"
    assert read("index.html").page.evaluate(brightness) > 200
    assert read("index.html", scheme="dark").page.evaluate(brightness) < 50
    reader = read("index.html")
    button = reader.page.locator(".theme-toggle-content button")
    for _ in range(3):  # by way of auto and light
        if reader.page.evaluate("document.body.dataset.theme") != "dark":
            button.click()
    reader.open("zoo.html")
    assert reader.page.evaluate(brightness) < 50


def test_a_phone_has_the_menu(read):
    """The pages are behind the button at the top."""
    reader = read("index.html", "phone")
    link = reader.page.locator(".sidebar-tree a", has_text="The zoo").first
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    reader.page.locator(".nav-overlay-icon").click()
    reader.page.wait_for_function("document.querySelector('.sidebar-drawer').getBoundingClientRect().left >= 0")
    reader.keep("menu")
    link.click()
    reader.page.wait_for_url("**/zoo.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", [*LOOKED_AT, "search.html?q=PadSplit", "genindex.html"])
def test_axe_finds_no_fault(read, path, scheme):
    """The rules of WCAG 2.2, A and AA, as axe-core has them."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: pip install '.[browser]'")
    reader = read(path, scheme=scheme)
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
    found = axe.Axe().run(reader.page, options=rules).response["violations"]
    assert [f"{each['id']}: {each['help']}: {node['html'][:200]}" for each in found for node in each["nodes"][:3]] == []
