"""Folders with a network in them, the hub of Hugging Face, and ``torch.hub``."""

import copy
import importlib.util
import json
import os
import pickle
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo import registry
from zoo.errors import WeightsError
from zoo.pretrained import from_pretrained, push_to_hub, save_pretrained

ROOT = Path(__file__).parents[1]
OPTIONS = {"num_classes": 3, "in_channels": 2, "blocks": (1, 2, 1), "kernel_sizes": (3, 3, 3)}


@pytest.fixture(scope="module")
def net():
    """With statistics that are not those of initialisation."""
    made = zoo.create("irevnet_small", **OPTIONS)
    made(torch.rand(4, 2, 32, 32))
    return made


def assert_same(a, b):
    assert zoo.config_of(a) == zoo.config_of(b)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(t, b.state_dict()[key]) for key, t in a.state_dict().items())


def test_a_network_comes_back_from_its_folder(net, tmp_path):
    assert save_pretrained(net, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    again = from_pretrained(str(tmp_path / "a" / "b"))
    assert_same(net, again)
    assert again.training
    assert [layer.function[0].kernel_size for layer in again.body[2:3]] == [(3, 3)]
    fields = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert fields["model"] == "irevnet_small"
    assert fields["options"] == {**OPTIONS, "blocks": [1, 2, 1], "kernel_sizes": [3, 3, 3], "dimensions": 2}
    assert fields["versions"].keys() == {"invertible", "torch"}
    save_pretrained(again, tmp_path / "c")
    for name in ("config.json", "model.safetensors"):  # the same bytes again
        assert (tmp_path / "a" / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_a_new_classifier_is_saved_as_such(tmp_path):
    made = zoo.replace_head(zoo.irevnet_small(num_classes=3, blocks=(1, 1, 1)), 2)
    made.grid = "exact"
    assert_same(made, from_pretrained(save_pretrained(made, tmp_path)))
    headless = zoo.replace_head(made, 0)
    assert_same(headless, from_pretrained(save_pretrained(headless, tmp_path)))


@pytest.mark.parametrize("labels", [np.array([0, 2, 1]), torch.tensor([0, 2, 1])])
def test_numbers_counted_from_labels_are_saved_as_numbers(tmp_path, labels):
    made = zoo.create("irevnet_small", num_classes=labels.max() + 1, blocks=(np.int64(1),))
    assert repr(zoo.config_of(made).options["num_classes"]) == "3"
    assert_same(made, from_pretrained(save_pretrained(made, tmp_path)))
    assert_same(zoo.replace_head(made, labels.max()), from_pretrained(save_pretrained(made, tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_file(tmp_path, dtype):
    made = zoo.irevnet_small(num_classes=3, blocks=(1,)).to(dtype)
    made.head.float()
    again = from_pretrained(save_pretrained(made, tmp_path))
    assert_same(made, again)
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in made.parameters()]
    assert {t.dtype for t in again.buffers()} == {dtype, torch.float32, torch.int64}
    assert all(p.requires_grad for p in again.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"")  # what was read is not this file's memory
    assert_same(made, again)


def test_options_are_read_only(tmp_path):
    blocks = [1, 1]
    made = zoo.create("irevnet_small", num_classes=3, blocks=blocks)
    options = zoo.config_of(made).options
    blocks.append(1)
    assert options["blocks"] == (1, 1)
    assert_same(made, from_pretrained(save_pretrained(made, tmp_path)))
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301
        assert zoo.config_of(again) == zoo.config_of(made)
    assert hash(zoo.config_of(made)) == hash(zoo.config_of(copy.deepcopy(made)))
    card = zoo.card("irevnet_b")
    assert hash(card) == hash(copy.deepcopy(card))
    for each in (options, card.activations, card.step):
        with pytest.raises(TypeError, match="does not support item assignment"):
            each["store"] = 1
    assert repr(options) == repr(dict(options))


def test_modes_are_those_of_other_files(net, tmp_path):
    for name in ("config.json", "model.safetensors"):
        assert (save_pretrained(net, tmp_path) / name).stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    found = os.umask(0)
    os.umask(found)
    return found


def test_saving_draws_no_random_numbers(net, tmp_path):
    before = torch.get_rng_state()
    save_pretrained(net, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_was_changed_is_not_saved(tmp_path):
    made = zoo.irevnet_small(num_classes=3, blocks=(1,))
    made.head[4] = torch.nn.Linear(48, 9)
    words = "got head.4.weight: (9, 48) in place of (3, 48). A classifier is replaced by zoo.replace_head."
    with pytest.raises(ValueError, match=re.escape(words)):
        save_pretrained(made, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_hostile_configuration_allocates_nothing(net, tmp_path):
    save_pretrained(net, tmp_path)
    good, path = json.loads((tmp_path / "config.json").read_text()), tmp_path / "config.json"
    cannot = f"zoo.from_pretrained: cannot build what {path} describes: "
    wanted = "it has more parameters than there are tensors in the file of weights."
    for blocks, words in (
        ([1] * 6, "does not fit this IRevNet: "),
        ([1] * 40, cannot),
        ([10**9], cannot + wanted),
        ({"a": 1}, cannot),
    ):
        path.write_text(json.dumps({**good, "options": {**good["options"], "blocks": blocks}}))
        with pytest.raises(WeightsError, match=re.escape(words)) as raised:
            from_pretrained(tmp_path)
        assert "\n" not in str(raised.value)
    assert torch.nn.Linear(1, 1).weight.shape == (1, 1)  # nothing is counted any more
    deep = f'{{"zoo_format": 1, "model": "x", "options": {{"a": {"[" * 600 + "]" * 600}}}}}'
    for content, words in (("[" * 200_000, f"{path} is not JSON"), (deep, f"cannot use {path}")):
        path.write_text(content)
        with pytest.raises(WeightsError, match=f"zoo.from_pretrained: {re.escape(words)}: maximum recursion depth"):
            from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"zoo\.from_pretrained: cannot read 'x{79}: File name too long\."):
        from_pretrained("x" * 5000)


def test_what_is_wrong_with_a_folder(net, tmp_path):
    save_pretrained(net, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(words, content=None):
        if content is not None:
            (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(WeightsError, match=re.escape(words)):
            from_pretrained(tmp_path)

    path = tmp_path / "config.json"
    for content in ("[]", "{}", {**config, "options": []}, {**config, "model": 1}, {**config, "zoo_format": None}):
        refused(f"zoo.from_pretrained: {path} is not a file of zoo.save_pretrained.", content)
    refused(f"zoo.from_pretrained: {path} is not JSON: ", "{")
    refused(f"{path} has format 2, and this version reads up to 1.", {**config, "zoo_format": 2})
    cannot = f"zoo.from_pretrained: cannot build what {path} describes: "
    refused(f"{cannot}zoo.create: unknown model 'resnet_1001'; there are ", {**config, "model": "resnet_1001"})
    refused(f"{cannot}zoo.create: irevnet_small has no option 'x'", {**config, "options": {"x": 1}})
    for value in ("many", 10**30, -1):
        refused(cannot, {**config, "options": {"num_classes": value}})
    refused("does not fit this IRevNet: ", {**config, "options": {"num_classes": 10**15}})  # nothing is allocated
    refused("does not fit this IRevNet: 2 of ", {**config, "options": {**config["options"], "num_classes": 2}})
    (tmp_path / "model.safetensors").unlink()
    refused(f"zoo.load_weights: cannot read {tmp_path / 'model.safetensors'}: No such file or directory.", config)
    path.unlink()
    refused(f"zoo.from_pretrained: cannot read {path}: No such file or directory.")


def test_weights_and_options_of_a_configuration_are_no_way_in(tmp_path, net):
    """A configuration names options of builders; ``weights`` is none, and nothing is downloaded for it."""
    save_pretrained(net, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"]["weights"] = "tiny"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="got multiple values for keyword argument 'weights'"):
        from_pretrained(tmp_path)


def test_what_cannot_be_saved(net, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"zoo\.config_of: expected a network built by zoo\.create"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"zoo\.save_pretrained: cannot write .*: File exists\."):
        save_pretrained(net, tmp_path / "file")

    def odd(*, size: object = None):
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(registry, "_builders", {})
    for value in (torch.float16, {1: 2}, {1}):
        made = zoo.register(odd)(size=value)
        registry._builders.clear()
        words = f"zoo.save_pretrained: options must be numbers, strings, lists and dictionaries, got size={value!r}."
        with pytest.raises(ValueError, match=re.escape(words)):
            save_pretrained(made, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


# The hub of Hugging Face


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A client whose hub is a folder; what was asked of it is kept."""
    client, asked = types.ModuleType("huggingface_hub"), []

    class HfApi:
        def __init__(self, token=None):
            asked.append(("login", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            asked.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append(("download", repo_id, revision, allow_patterns))
        if not (tmp_path / "hub" / repo_id).exists():
            raise OSError(f"404 Client Error for {repo_id}\nmore")
        return str(tmp_path / "hub" / repo_id)

    client.HfApi, client.snapshot_download = HfApi, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    return asked


def test_a_network_goes_over_the_hub(net, hub):
    assert push_to_hub(net, "me/mine", private=True, token="t") == "https://hub/me/mine/commit/1"  # noqa: S106
    assert_same(net, from_pretrained("me/mine", revision="main"))
    files = ["config.json", "model.safetensors"]
    assert hub == [("login", "t"), ("create", "me/mine", True, True), ("download", "me/mine", "main", files)]
    with pytest.raises(WeightsError, match=r"cannot download me/theirs: 404 Client Error for me/theirs\.$"):
        from_pretrained("me/theirs")
    for name in ("nowhere", "./me/mine", "a/b/c", "/nowhere/at", "~/mine", "me/"):
        with pytest.raises(WeightsError, match=re.escape(f"zoo.from_pretrained: no such folder: {name}.")):
            from_pretrained(name)
    assert len(hub) == 4


def test_without_the_hubs_client(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as Python marks what can't be imported
    missing = "the hub's client is not installed; pip install huggingface_hub."
    words = f"zoo.from_pretrained: there is no folder me/mine, and it cannot be downloaded: {missing}"
    with pytest.raises(WeightsError, match=re.escape(words)):
        from_pretrained("me/mine")
    with pytest.raises(WeightsError, match=re.escape(f"zoo.push_to_hub: cannot upload: {missing}")):
        push_to_hub(net, "me/mine")


# torch.hub


def test_torch_hub_finds_every_model():
    made = torch.hub.load(str(ROOT), "irevnet_small", source="local", num_classes=10)
    assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert zoo.config_of(made).model == "irevnet_small"
    with pytest.raises(ValueError, match="irevnet_b has no option 'depth'"):
        torch.hub.load(str(ROOT), "irevnet_b", source="local", depth=3)
    with pytest.raises(WeightsError, match="irevnet_b has no weights 'x'; it has none"):
        torch.hub.load(str(ROOT), "irevnet_b", source="local", weights="x")


def test_hubconf_has_every_model_and_nothing_else():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    entries = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert sorted(entries) == zoo.names()  # as torch.hub.list lists them
    assert hubconf.irevnet_a.__doc__ == zoo.irevnet_a.__doc__
    assert all(importlib.util.find_spec(package) for package in hubconf.dependencies)
