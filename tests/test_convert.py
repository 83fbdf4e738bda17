"""The weights released in 2018: their network against its definition written out, and the way there and back."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import zoo
from tests.released import B, Oracle, oracle, run, same
from zoo import convert
from zoo.convert import build, from_released, load_converted, to_released


def converted(net):
    options, state = from_released(net.state_dict())
    ours = build(**options).to(next(net.parameters()).dtype)
    ours.load_state_dict(state)
    return ours.train(net.training)


TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-3, "atol": 1e-3}}
sizes = st.fixed_dictionaries(
    {"blocks": st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), "classes": st.integers(1, 7)}
)


@settings(max_examples=15)
@given(sizes, st.sampled_from(list(TOLERANCES)), st.booleans(), st.integers(0, 99))
def test_logits_features_and_inverse_are_those_of_the_definition(sizes, dtype, train, seed):
    theirs = oracle(seed, dtype, **sizes).train(train)
    ours = converted(theirs)
    image = torch.rand(2, 3, 32, 48, dtype=dtype)
    with torch.no_grad():
        back = {}
        for name, net in (("ours", ours), ("theirs", theirs.eval())):  # statistics don't move meanwhile
            back[name] = net.eval().inverse(theirs(image)[1])
        torch.testing.assert_close(back["ours"], back["theirs"], **TOLERANCES[dtype])
        torch.testing.assert_close(back["ours"], image, **TOLERANCES[dtype])
        ours.train(train)
        theirs.train(train)
        logits, features = theirs(image)
        torch.testing.assert_close(ours(image), logits, **TOLERANCES[dtype])
        for key, moved in from_released(theirs.state_dict())[1].items():  # in training, by the same momenta
            torch.testing.assert_close(ours.state_dict()[key], moved, **TOLERANCES[dtype])
        torch.testing.assert_close(ours.features(image), features, **TOLERANCES[dtype])


@pytest.mark.slow
def test_the_full_size_network_is_that_of_the_definition():
    theirs = oracle(**B).eval()
    ours = converted(theirs)
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        logits, features = theirs(image)
        scale = features.std()
        torch.testing.assert_close(ours.features(image) / scale, features / scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(image), logits, rtol=1e-3, atol=1e-3 * logits.std().item())
        torch.testing.assert_close(ours.inverse(features), theirs.inverse(features))


def test_the_full_size_network_has_the_keys_and_shapes_of_b():
    with torch.device("meta"):
        options, state = from_released(Oracle(**B).state_dict())
        expected = zoo.create("irevnet_b", kernel_sizes=(3, 3, 3)).state_dict()
        built = build(**options).state_dict()
    assert options == {
        "blocks": (6, 16, 72, 6),
        "channels": (24, 96, 384, 1536),
        "strides": (2, 2, 2, 2),
        "num_classes": 1000,
    }
    for found in (state, built):
        assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in expected.items()}


@given(sizes, st.sampled_from([torch.float16, torch.bfloat16, *TOLERANCES]), st.booleans(), st.integers(0, 99))
def test_there_and_back_is_the_identity(sizes, dtype, wrapped, seed):
    state = oracle(seed, dtype, **sizes).state_dict()
    given = {f"module.{key}": t for key, t in state.items()} if wrapped else state
    _, ours = from_released(given)
    same(to_released(ours), state)
    same(from_released(to_released(ours))[1], ours)
    assert all(t.data_ptr() == ours[key].data_ptr() for key, t in from_released(to_released(ours))[1].items())


def test_counts_that_old_versions_did_not_keep_are_zero():
    state = oracle().state_dict()
    old = {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}
    back = to_released(from_released(old)[1])
    assert list(back) == list(state)
    same({key: back[key] for key in old}, old)
    assert all(torch.equal(back[key], torch.tensor(0)) for key in back.keys() - old.keys())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


def wraps(state):
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "alone": state,
        "ILSVRC": {
            "epoch": 90,
            "arch": "i-revnet",
            "state_dict": {f"module.{key}": t for key, t in state.items()},
            "best_prec1": torch.tensor(74.0),
            "optimizer": optimizer,
        },
        "CIFAR": {"model": state, "acc": 94.5, "epoch": 200},
        "parameters": {key: nn.Parameter(t, requires_grad=t.is_floating_point()) for key, t in state.items()},
    }


@pytest.mark.parametrize("zipped", [True, False])  # False: as PyTorch of 2018 wrote
@pytest.mark.parametrize("form", wraps({}))
def test_the_command_there_and_back(folder, capsys, form, zipped):
    theirs = oracle(dtype=torch.float64).eval()
    checkpoint, out, back = folder / "in" / "net.pth.tar", folder / "out" / "net.safetensors", folder / "out" / "b.pth"
    torch.save(wraps(theirs.state_dict())[form], checkpoint, _use_new_zipfile_serialization=zipped)
    code, said, err = run(capsys, "released", checkpoint, out)
    assert (code, err) == (0, "")
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert said == f"{out} written, sha256 {digest}\n"
    assert list(out.parent.iterdir()) == [out]
    assert out.stat().st_mode == checkpoint.stat().st_mode

    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    source = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert metadata == {
        "format": "pt",
        "model": "irevnet",
        "options": json.dumps({"blocks": [2, 1], "channels": [24, 96], "strides": [2, 2], "num_classes": 5}),
        "source": f"https://github.com/jhjacobsen/pytorch-i-revnet, a checkpoint with the SHA-256 {source}",
    }
    ours = load_converted(out).eval()
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image)[0])
    rebuilt = build(**json.loads(metadata["options"])).double()
    rebuilt.load_state_dict(load_file(out))
    same(dict(rebuilt.state_dict()), dict(ours.state_dict()))
    ours.train()(image).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())

    code, said, err = run(capsys, "to-released", out, back)
    assert (code, err) == (0, "")
    assert said == f"{back} written, sha256 {hashlib.sha256(back.read_bytes()).hexdigest()}\n"
    same(torch.load(back, weights_only=True), theirs.state_dict())


def test_the_sizes_of_b_are_written_as_its_name(folder, monkeypatch):
    monkeypatch.setattr(convert, "_B", {"blocks": (2, 1), "channels": (24, 96), "strides": (2, 2)})
    torch.save(oracle().state_dict(), folder / "in" / "net.pth")
    convert.convert_released(folder / "in" / "net.pth", folder / "out" / "net.safetensors")
    with safe_open(folder / "out" / "net.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "irevnet_b"
    with torch.device("meta"):
        options = json.loads(metadata["options"])
        assert zoo.create(metadata["model"], **options).num_classes == options["num_classes"] == 5


def test_the_same_checkpoint_gives_the_same_bytes(folder):
    torch.save(oracle().state_dict(), folder / "in" / "net.pth")
    digests = {convert.convert_released(folder / "in" / "net.pth", folder / "out" / f"{i}") for i in range(6)}
    assert len(digests) == 1  # the order of the metadata is another one every second time, if nobody sorts it
    back = {convert.convert_to_released(folder / "out" / "0", folder / "out" / f"back{i}") for i in range(2)}
    assert len(back) == 1
