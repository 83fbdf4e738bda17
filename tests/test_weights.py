"""Weights: a download that is whole, verified and kept, or an error and nothing left; and what fits a network."""

import copy
import dataclasses
import gc
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zoo
from zoo import weights as module
from zoo.errors import InputError, WeightsError
from zoo.weights import WEIGHTS, Transforms, Weights, fetch, load_weights, save_weights

ROOT = Path(__file__).parents[1]
LOOKS = Transforms(resize=36, crop=32)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as ``behaviour`` says: with all of ``content``, a part, other bytes, an error, or not at all."""

    content, behaviour, requests, release = b"", "good", 0, threading.Event()

    def do_GET(self):
        kind = type(self)
        kind.requests += 1
        if kind.behaviour == "error":
            self.send_error(503, "Out of Order")
            return
        if kind.behaviour in {"loop", "astray"}:
            self.send_response(302)
            self.send_header("Location", self.path if kind.behaviour == "loop" else "http://[::1/x")
            self.end_headers()
            return
        if kind.behaviour == "gone":
            self.close_connection = True
            return
        self.send_response(200)
        if kind.behaviour != "no length":
            self.send_header("Content-Length", "²" if kind.behaviour == "odd length" else str(len(kind.content)))
        self.end_headers()
        if kind.behaviour == "silent":
            self.wfile.write(kind.content[:1000])
            self.wfile.flush()
            kind.release.wait(20)
            return
        end = len(kind.content) // 2 if kind.behaviour == "truncated" else None
        body = kind.content[:end]
        self.wfile.write(bytes(len(body)) if kind.behaviour == "other" else body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Server.release.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights as they are published: of a network of 5 classes."""
    net = zoo.create("irevnet_small", num_classes=5, blocks=(1, 1, 1))
    path = tmp_path_factory.mktemp("published") / "model.safetensors"
    save_weights(net, path)
    return net, path.read_bytes()


@pytest.fixture
def entry(address, trained, monkeypatch, tmp_path):
    """In the table, with a cache of its own."""
    content = trained[1]
    monkeypatch.setattr(Server, "content", content)
    monkeypatch.setattr(Server, "behaviour", "good")
    monkeypatch.setattr(Server, "requests", 0)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    found = Weights(
        model="irevnet_small",
        tag="tiny",
        url=f"{address}/model.safetensors",
        sha256=hashlib.sha256(content).hexdigest(),
        transforms=LOOKS,
        options={"num_classes": 5, "blocks": (1, 1, 1)},
    )
    monkeypatch.setitem(WEIGHTS, found.name, found)
    return found


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# The download


def test_weights_are_downloaded_once_and_loaded(entry, trained, tmp_path):
    net = zoo.create("irevnet_small", weights="tiny")
    for key, t in trained[0].state_dict().items():
        assert torch.equal(net.state_dict()[key], t), key
    path = tmp_path / "hub" / "checkpoints" / f"irevnet_small.tiny-{entry.sha256[:16]}.safetensors"
    assert path.read_bytes() == trained[1]
    zoo.create("irevnet_small", weights="tiny")
    assert Server.requests == 1
    assert files(tmp_path) == [path.name]
    assert fetch(entry, tmp_path / "mine").parent == tmp_path / "mine"


def test_other_classes_get_a_new_classifier(entry, trained):
    whole, net = trained[0], zoo.create("irevnet_small", weights=entry, num_classes=2).eval()
    assert net.head[-1].out_features == zoo.config_of(net).options["num_classes"] == 2
    x = torch.rand(2, 3, 32, 32)
    whole = whole.eval()
    torch.testing.assert_close(net.features(x), whole.features(x), rtol=0, atol=0)
    features = zoo.create("irevnet_small", weights="tiny", num_classes=0).eval()(x)
    torch.testing.assert_close(whole.head[-1](features), whole(x))


@pytest.mark.parametrize("behaviour", ["no length", "odd length"])
def test_a_length_is_not_needed(entry, monkeypatch, behaviour):
    monkeypatch.setattr(Server, "behaviour", behaviour)
    assert fetch(entry).exists()


def test_a_damaged_file_is_downloaded_again(entry, trained):
    path = fetch(entry)
    path.write_bytes(trained[1][:-1] + b"?")
    assert fetch(entry).read_bytes() == trained[1]
    assert Server.requests == 2


FAILURES = {
    "truncated": r"it ended after [\d,]+ of [\d,]+ bytes\.",
    "other": r"what came has another SHA-256: [0-9a-f]{64}\.",
    "error": r"the server says 503 Out of Order\.",
    "gone": r"no answer, Remote end closed connection without response\.",
    "silent": r"the connection broke, timed out\.",
    "loop": r"the server says 302 The HTTP server returned a redirect error that would lead to an infinite loop\. ",
    "astray": r"no address of the web, Invalid IPv6 URL\.",
}


@pytest.fixture
def collected():
    """A connection that is still open warns when it is collected: in this test, not in another."""
    yield
    gc.collect()


@pytest.mark.parametrize("behaviour", FAILURES)
def test_what_goes_wrong_leaves_nothing(behaviour, entry, monkeypatch, tmp_path, collected):
    monkeypatch.setattr(Server, "behaviour", behaviour)
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    with pytest.raises(WeightsError, match=FAILURES[behaviour]) as raised:
        zoo.create("irevnet_small", weights="tiny")
    assert files(tmp_path) == []
    message = str(raised.value)
    assert message.startswith(f"zoo.fetch: cannot download {entry.url} for irevnet_small.tiny: ")
    by_hand = tmp_path / "hub" / "checkpoints" / entry.file_name
    assert message.endswith(f"Without a network, put that file at {by_hand}; its SHA-256 is {entry.sha256}.")
    assert "\n" not in message


def test_addresses_that_are_none(entry, address):
    for url in (f"{address}/ä", "http://[::1", "http://.."):
        with pytest.raises(WeightsError, match=r"zoo\.fetch: cannot download .*: no address of the web, "):
            fetch(dataclasses.replace(entry, url=url))
    with pytest.raises(WeightsError, match=r"cannot use .*: File name too long\."):
        fetch(dataclasses.replace(entry, tag="t" * 240))


def test_a_bad_download_leaves_the_file_of_somebody_else(entry, monkeypatch, tmp_path):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "other.pth").write_bytes(b"theirs")
    monkeypatch.setattr(Server, "behaviour", "truncated")
    with pytest.raises(WeightsError):
        fetch(entry)
    assert files(tmp_path) == ["other.pth"]


def test_without_a_network_the_message_is_followed(entry, trained, tmp_path):
    away = Weights("irevnet_small", "away", "http://127.0.0.1:1/model.safetensors", entry.sha256, LOOKS, entry.options)
    with pytest.raises(WeightsError, match="no connection, Connection refused") as raised:
        zoo.create("irevnet_small", weights=away)
    path = Path(re.search(r"put that file at (\S+);", str(raised.value))[1])
    path.write_bytes(trained[1])
    assert zoo.create("irevnet_small", weights=away).num_classes == 5


def test_an_interrupted_download_leaves_nothing(entry, monkeypatch, tmp_path):
    def interrupted(response):
        yield response.read(1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(entry)
    assert files(tmp_path) == []


FULL = """
import resource, sys
from zoo.errors import WeightsError
from zoo.weights import Transforms, Weights, fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    fetch(Weights("irevnet_small", "tiny", sys.argv[1], sys.argv[2], Transforms(36, 32)), sys.argv[3])
except WeightsError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing(entry, tmp_path):
    """A limit of the file's size stands for it: the system refuses in the middle of a write."""
    assert len(Server.content) > 200_000
    command = [sys.executable, "-W", "error", "-c", FULL, entry.url, entry.sha256, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert f"cannot write {tmp_path}/irevnet_small.tiny-" in result.stdout
    assert "File too large" in result.stdout
    assert files(tmp_path) == []


def test_a_folder_that_is_a_file(entry, tmp_path):
    (tmp_path / "hub").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"zoo\.fetch: cannot use .*: Not a directory\."):
        fetch(entry)


def test_entries_have_a_hash_and_an_address(entry):
    for sha256 in ("", "abc", "G" * 64, "A" * 63):
        with pytest.raises(ValueError, match=r"Weights: sha256 must be 64 hexadecimal digits, got"):
            Weights("irevnet_small", "x", "https://example.org/x", sha256, LOOKS)
    upper = Weights("irevnet_small", "x", "https://example.org/x", "A" * 64, LOOKS, {"blocks": [1, 1]})
    assert upper.sha256 == "a" * 64
    assert upper.options == {"blocks": (1, 1)}
    assert len({upper, copy.deepcopy(upper)}) == 1
    for tag in ("../x", "a/b", "a\\b", "", "x\n"):
        with pytest.raises(ValueError, match=r"Weights: model and tag must be of letters, digits and \. _ \+ -, got"):
            Weights("irevnet_small", tag, "https://example.org/x", "0" * 64, LOOKS)
    with pytest.raises(
        ValueError, match=r"Weights: url must begin with https:// or http://, got 'file:///etc/passwd'\."
    ):
        Weights("irevnet_small", "x", "file:///etc/passwd", "0" * 64, LOOKS)
    for name, each in WEIGHTS.items():
        assert name == each.name == f"{each.model}.{each.tag}"
        assert each.model in zoo.names()


def test_an_entry_under_another_key_is_found(entry, monkeypatch):
    monkeypatch.delitem(WEIGHTS, entry.name)
    monkeypatch.setitem(WEIGHTS, "mine", entry)
    assert zoo.create("irevnet_small", weights="tiny").num_classes == 5


def test_unknown_tags_and_other_models_weights(entry):
    with pytest.raises(WeightsError, match=r"zoo\.create: irevnet_small has no weights 'large'; it has tiny\."):
        zoo.create("irevnet_small", weights="large")
    with pytest.raises(WeightsError, match=r"zoo\.create: irevnet_b has no weights 'tiny'; it has none\."):
        zoo.create("irevnet_b", weights="tiny")
    with pytest.raises(WeightsError, match=r"zoo\.create: expected weights of irevnet_b, got irevnet_small\.tiny\."):
        zoo.create("irevnet_b", weights=entry)
    assert Server.requests == 0
    assert issubclass(WeightsError, InputError)


def test_transforms():
    looks = Transforms(resize=36, crop=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.25))
    x = looks(torch.full((2, 3, 72, 90), 255, dtype=torch.uint8))
    assert (x.shape, x.dtype) == ((2, 3, 32, 32), torch.float32)
    torch.testing.assert_close(x[0, :, 5, 5], torch.tensor([1.0, 1.0, 2.0]))
    grey = Transforms(36, 32, (0.5,), (0.5,))(torch.zeros(1, 40, 40, dtype=torch.uint8))
    assert torch.equal(grey, torch.full((1, 32, 32), -1.0))


def test_images_that_transforms_refuses():
    for channels in (1, 4):
        rule = "Transforms: expected images of shape (..., 3, height, width), got a tensor of shape"
        with pytest.raises(ValueError, match=re.escape(f"{rule} ({channels}, 40, 40).")):
            LOOKS(torch.zeros(channels, 40, 40, dtype=torch.uint8))
    for images, got in ((255 * torch.rand(3, 40, 40), "dtype torch.float32"), ([1], "an object of type list")):
        with pytest.raises(
            TypeError, match=f"Transforms: expected a tensor of uint8 images, from 0 to 255, got {got}."
        ):
            LOOKS(images)
    with pytest.raises(
        ValueError, match=r"Transforms: mean and std must have one value for each channel, got 1 and 3\."
    ):
        Transforms(36, 32, mean=(0.5,))


# What fits a network


def state(net):
    return {key: t.clone() for key, t in net.state_dict().items()}


def small(**options):
    return zoo.create("irevnet_small", blocks=(1, 1, 1), num_classes=2, **options)


def test_saved_weights_come_back(tmp_path):
    net = small()
    net(torch.rand(4, 3, 32, 32))  # moves the statistics
    save_weights(net, tmp_path / "x.safetensors")
    again = small().double()
    load_weights(again, str(tmp_path / "x.safetensors"))
    for key, t in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], t.to(again.state_dict()[key].dtype)), key
    umask = os.umask(0o027)
    save_weights(small(), str(tmp_path / "x.safetensors"))  # in its place
    os.umask(umask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    assert files(tmp_path) == ["x.safetensors"]


def test_weights_that_do_not_fit_load_nothing(tmp_path):
    net = small()
    path = tmp_path / "x.safetensors"

    def refused(tensors, words):
        save_file(tensors, path)
        before = state(net)
        with pytest.raises(
            WeightsError, match=re.escape(f"zoo.load_weights: {path} does not fit this IRevNet: {words}")
        ):
            load_weights(net, path)
        assert all(torch.equal(before[key], t) for key, t in net.state_dict().items())

    good = state(small())
    other = state(zoo.create("irevnet_small", blocks=(1, 1, 1), num_classes=3))
    refused(other, "2 of 56 tensors differ, first head.4.weight: expected (2, 768), got (3, 768).")
    refused({**good, "more": torch.zeros(2)}, "1 of 57 tensors differ, first more: expected no such tensor, got (2,).")
    refused({}, "56 of 56 tensors differ, first body.2.function.0.weight: expected (6, 6, 1, 1), got no such tensor.")
    for dtype, name in ((torch.int64, "I64"), (torch.bool, "BOOL"), (torch.complex64, "C64")):
        words = f"1 of 56 tensors differ, first head.4.bias: expected floating-point values, got {name}."
        refused({**good, "head.4.bias": good["head.4.bias"].to(dtype)}, words)
    count = "head.0.num_batches_tracked"
    words = f"1 of 56 tensors differ, first {count}: expected integer values, got F32."
    refused({**good, count: torch.tensor(1.5)}, words)
    del good["head.4.bias"]
    refused(good, "1 of 56 tensors differ, first head.4.bias: expected (2,), got no such tensor.")


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "x.safetensors"
    torch.save(small().state_dict(), path)
    for damage in (path.read_bytes(), b"", bytes(7), b"\xff" * 100):
        path.write_bytes(damage)
        with pytest.raises(WeightsError, match=re.escape(f"zoo.load_weights: {path} is not a whole safetensors file")):
            load_weights(small(), path)
    save_weights(small(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        load_weights(small(), path)
    with pytest.raises(WeightsError, match=re.escape(f"zoo.load_weights: cannot read {tmp_path}: Is a directory.")):
        load_weights(small(), tmp_path)
    with pytest.raises(WeightsError, match=r"zoo\.save_weights: cannot write /nowhere/x: "):
        save_weights(small(), Path("/nowhere/x"))
    with pytest.raises(WeightsError, match=r"zoo\.save_weights: cannot write .*: Not a directory\."):
        save_weights(small(), path / "x")
    save_weights(small(), tmp_path / ("n" * 240))


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for version in ("2", "new", "²", "٣", "-1", "9" * 37):
        save_file(state(small()), path, {"zoo_format": version})
        words = f"zoo.load_weights: {path} has format {version!r}, and this version reads up to 1."
        with pytest.raises(WeightsError, match=re.escape(words)):
            load_weights(small(), path)
    save_file({}, path, {"zoo_format": "9" * 5000})
    with pytest.raises(WeightsError, match=r"has format '9{39}, and this"):
        load_weights(nn.Identity(), path)


def test_weights_of_torchvisions_networks_are_saved(tmp_path):
    """Any module has a state_dict; parameters in another memory format, too."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    save_weights(net, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["0.weight"], net[0].weight)
