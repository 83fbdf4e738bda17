"""The pages that put peers' lines beside ours: each library's lines run, and agree with ours, where it is installed."""

import doctest
import functools
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
IMPORTED = {
    "MemCNN": "memcnn",
    "RevTorch": "revtorch",
    "revlib": "revlib",
    "torch": "torch",
    "zuko": "zuko",
    "nflows": "nflows",
    "FrEIA": "FrEIA",
    "normflows": "normflows",
}
PEERS = {
    "migrating.md": ["MemCNN", "RevTorch", "revlib", "torch"],
    "coming_from.md": ["zuko", "nflows", "FrEIA", "normflows"],
}
WEIGHTS = "Their weights"
CASES = [(page, peer) for page, peers in PEERS.items() for peer in peers]
FENCE = re.compile(r"^```(\{doctest\}|\{testcode\}|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(rf"^# ({'|'.join(IMPORTED)})\b.*$", re.MULTILINE)


def sections(page):
    """The blocks of code of each section, by its heading: pairs of a language and a text."""
    parts = re.split(r"^## (.*)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]
    return {heading: FENCE.findall(text) for heading, text in named}


def lines_of(peer, text):
    """What a block says for one library: from the comment that begins with its name to the next such comment."""
    parts = COMMENT.split(text)
    return "".join(code for name, code in zip(parts[1::2], parts[2::2], strict=True) if name == peer)


def ours_of(language, text):
    if language == "{testcode}":
        return text
    return "".join(example.source for example in doctest.DocTestParser().get_examples(text))


def execute(code, names, where):
    exec(compile(code, where, "exec"), names)  # noqa: S102


@functools.cache
def with_ours(page):
    """What our lines leave behind, by section. The libraries' names are not among them."""
    names, found = {}, {}
    for heading, blocks in sections(page).items():
        torch.manual_seed(0)
        for language, text in blocks:
            if language != "python":
                execute(ours_of(language, text), names, page)
        found[heading] = dict(names)
    return found


def with_theirs(page, peer):
    """The same, with the library's lines in the place of ours: of our lines only those before the first of theirs."""
    names, found = {}, {}
    for heading, blocks in sections(page).items():
        torch.manual_seed(0)
        shared = heading == "" or any(language == "python" for language, _ in blocks)
        for language, text in blocks:
            if language == "python":
                execute(lines_of(peer, text), names, f"{page}, {peer}")
                shared = False
            elif shared:
                execute(ours_of(language, text), names, page)
        found[heading] = dict(names)
    return found


@functools.cache
def left_by(page, peer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they import and call what is deprecated
        return with_theirs(page, peer)


def needed(peer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(IMPORTED[peer], reason=f"{peer} is not installed; some peers are by make bench")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("page", "peer"), CASES)
def test_each_block_says_whose_lines_they_are(page, peer):
    blocks = [text for found in sections(page).values() for language, text in found if language == "python"]
    assert all(COMMENT.match(text) for text in blocks)
    assert {name for text in blocks for name in COMMENT.findall(text)} == set(PEERS[page])
    for text in blocks:
        compile(lines_of(peer, text), page, "exec")


@pytest.mark.parametrize(("page", "peer"), CASES)
def test_each_line_of_a_peer_runs_and_what_is_equal_is_equal(page, peer):
    needed(peer)
    ours, compared = with_ours(page), 0
    for heading, names in left_by(page, peer).items():
        said = "".join(lines_of(peer, text) for language, text in sections(page)[heading] if language == "python")
        for name in ("y", "gradient"):
            if page == "migrating.md" and heading != WEIGHTS and re.search(rf"\b{name},?\)? = ", said):
                what = f"{heading}: {name}"
                torch.testing.assert_close(names[name], ours[heading][name], rtol=1e-5, atol=1e-6, msg=what)
                compared += 1
    assert compared == {"MemCNN": 7, "RevTorch": 5, "revlib": 5, "torch": 3}.get(peer, 0)


@pytest.mark.parametrize("peer", ["MemCNN", "RevTorch", "revlib"])
def test_a_peers_weights_give_the_same_outputs_and_gradients(peer):
    needed(peer)
    page = "migrating.md"
    names = dict(left_by(page, peer)[WEIGHTS])
    execute(ours_of(*sections(page)[WEIGHTS][-1]), names, page)  # what stands after their lines
    y, x = names["y"], names["x"]
    assert not torch.allclose(names["ours"](x), y, atol=1e-3)  # other weights before
    found = names["loaded"](names["state"])
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    y.sum().backward()
    torch.testing.assert_close(gradient, x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("peer", PEERS["coming_from.md"])
def test_what_the_table_says_of_flows_is_so(peer):
    needed(peer)
    theirs = left_by("coming_from.md", peer)
    sampled = theirs["The log-density, and samples"]
    samples = sampled["samples"]
    assert samples.shape == {"zuko": (7, 16, 2), "nflows": (16, 7, 2), "FrEIA": (16, 2), "normflows": (16, 2)}[peer]
    assert samples.requires_grad == (peer != "zuko")
    if peer != "FrEIA":
        assert sampled["log_prob"].shape == (16,)
    assert theirs["Training"]["loss"].shape == ()
    names = theirs["Going back, and turning round"]
    torch.testing.assert_close(names["back"], names["x"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(names["z"], names["x"], atol=1e-2)
    if peer != "zuko":
        assert names["log_det"].shape == (16,)
        assert theirs["A step of Glow, and several scales"]["log_det"].shape == (4,)


@pytest.mark.parametrize(
    ("peer", "module", "name", "bound"),
    [
        ("zuko", "zuko.transforms", "MonotonicRQSTransform", 5),
        ("nflows", "nflows.transforms", "PiecewiseRationalQuadraticCouplingTransform", 1),
        ("normflows", "normflows.flows", "CoupledRationalQuadraticSpline", 3),
    ],
)
def test_splines_end_where_the_page_says(peer, module, name, bound):
    needed(peer)
    spline = getattr(importlib.import_module(module), name)
    defaults = inspect.signature(spline).parameters
    assert defaults["bound" if peer == "zuko" else "tail_bound"].default == bound
