"""Checkpoints that are hostile, damaged or of another network are refused: nothing executed, nothing left behind."""

import errno
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import types
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import zoo
from tests.released import FLAG, Block, Oracle, oracle, refused, run, same
from zoo import convert
from zoo.convert import from_released, load_converted, to_released
from zoo.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


# Code


class Hostile:
    """Makes a file or a folder when it is unpickled."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


ATTACKS = {
    "mkdir": lambda path: Hostile(os.mkdir, str(path)),
    "open": lambda path: Hostile(open, str(path), "w"),
    "eval": lambda path: Hostile(eval, f"open({str(path)!r}, 'w')"),
}


def as_tar(content, path):
    """The format of PyTorch before 0.1.2."""
    with tarfile.open(path, "w") as tar:
        for name in ("pickle", "tensors", "storages"):
            body = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))


WRITERS = {
    "zip": torch.save,
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "pickle of protocol 2": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    "tar": as_tar,
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_hostile_checkpoint_is_refused_and_nothing_executed(folder, capsys, attack, writer):
    victim, checkpoint = folder / "out" / "victim", folder / "in" / "net.pth"
    WRITERS[writer]({"state_dict": oracle().state_dict(), "epoch": ATTACKS[attack](victim)}, checkpoint)
    err = refused(capsys, folder, "released", checkpoint, folder / "out" / "net.safetensors")
    assert err.startswith(f"error: cannot read {checkpoint}: ")
    assert not victim.exists()
    if writer in {"zip", "legacy"}:
        assert re.search(rf"reading it would execute code \((\w+\.)?{attack}\), which may do anything; ", err), err
        assert err.endswith(f"if you trust whoever made it, add {FLAG}\n")


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_checkpoint_executes_what_the_flag_allows(folder, capsys, attack):
    """So the test above would see it."""
    victim, checkpoint = folder / "in" / "victim", folder / "in" / "net.pth"
    torch.save({"state_dict": oracle().state_dict(), "epoch": ATTACKS[attack](victim)}, checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # nobody closes the file
        assert run(capsys, "released", FLAG, checkpoint, folder / "out" / "net.safetensors")[0] == 0
    assert victim.exists()


@pytest.fixture
def released_code(monkeypatch):
    """The classes in the module that the released code has for them."""
    module = types.ModuleType("models.iRevNet")
    for kind in (Oracle, Block):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.iRevNet", module)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"model": nn.DataParallel(net), "acc": 1, "epoch": 2}])
def test_a_pickled_module_needs_the_flag(folder, capsys, released_code, wrap, zipped):
    theirs, checkpoint, out = oracle(), folder / "in" / "net.t7", folder / "out" / "net.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the source of the classes is not found
        torch.save(wrap(theirs), checkpoint, _use_new_zipfile_serialization=zipped)
    err = refused(capsys, folder, "released", checkpoint, out)
    assert re.search(r"would execute code \((models.iRevNet.Oracle|torch.nn.parallel.\w+.DataParallel)\), which", err)
    assert err.endswith(f"if you trust whoever made it, add {FLAG}\n")
    code, _, err = run(capsys, "released", FLAG, checkpoint, out)
    assert (code, err) == (0, "")
    same(to_released(load_converted(out).state_dict()), theirs.state_dict())


def test_a_pickled_module_without_its_code(folder, capsys, released_code, monkeypatch):
    torch.save(oracle(), folder / "in" / "net.t7")
    monkeypatch.delitem(sys.modules, "models.iRevNet")
    err = refused(capsys, folder, "released", FLAG, folder / "in" / "net.t7", folder / "out" / "net.safetensors")
    assert "cannot read" in err
    assert "the folder of the code that it needs must be on PYTHONPATH" in err


def test_torchscript_is_code(folder, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), folder / "in" / "net.pt")
    err = refused(capsys, folder, "released", folder / "in" / "net.pt", folder / "out" / "net.safetensors")
    assert "reading it would execute code, which may do anything" in err


@pytest.mark.slow
def test_the_command_as_a_person_uses_it(folder):
    """With the released code beside it: only the flag imports that."""
    code = "import torch\nclass iRevNet(torch.nn.Module):\n    pass\nopen('imported', 'w').close()\n"
    (folder / "models").mkdir()
    (folder / "models" / "iRevNet.py").write_text(code)
    make = "import torch; from models.iRevNet import iRevNet; torch.save({'model': iRevNet()}, 'in/net.t7')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}

    def python(*arguments):
        command = [sys.executable, "-W", "error", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    assert python("-c", make).returncode == 0
    (folder / "imported").unlink()
    arguments = ("-m", "zoo.convert", "released", "in/net.t7", "out/net.safetensors")
    result = python(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    trust = f"which may do anything; if you trust whoever made it, add {FLAG}"
    assert result.stderr == (
        f"error: cannot read in/net.t7: reading it would execute code (models.iRevNet.iRevNet), {trust}\n"
    )
    assert not (folder / "imported").exists()
    result = python(*arguments, FLAG)
    missing = "the key 'stack.0.bottleneck_block.0.weight' is missing"
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        "",
        f"error: cannot convert in/net.t7: {missing}\n",
    )
    assert (folder / "imported").exists()
    assert not list((folder / "out").iterdir())


# Refusals of damaged files and of other networks


def changed(entries, prefix=""):
    """The state of a thin network with some entries replaced; None removes one."""
    state = oracle().state_dict() | {prefix + key: t for key, t in entries.items()}
    return {key: t for key, t in state.items() if t is not None}


itself = {}
itself["model"] = itself
FIRST, SECOND = "stack.0.bottleneck_block.", "stack.1.bottleneck_block."
CONTENTS = {
    "no state dict in PATH: it holds an object of type list": [1, 2],
    "no state dict in PATH: its entry 'model' is of type dict, not a tensor with a name": itself,
    "no state dict in PATH: its entry 3 is of type Tensor, not a tensor with a name": {3: torch.zeros(2)},
    "no state dict in PATH: its entry 'epoch' is of type int, not a tensor with a name": {"epoch": 3},
    "no state dict in PATH: its entry 'a' is not a dense tensor": {"a": torch.eye(3).to_sparse()},
    "no state dict in PATH: its entry 'b' is not a dense tensor": {"b": torch.zeros(3, device="meta")},
    "no state dict in PATH: its entry 'linear.weight' has more elements than the file has values for it": changed(
        {"linear.weight": torch.zeros(1).expand(10**9, 192)}
    ),
    f"the key '{FIRST}0.weight' is missing": {},
    f"the key '{FIRST}7.weight' is missing": changed({"7.weight": None}, FIRST),
    f"the key '{SECOND}0.weight' is missing": changed({"0.weight": None}, SECOND),
    "the key 'bn1.running_var' is missing": changed({"bn1.running_var": None}),
    "the key 'linear.weight' is missing": changed({"linear.weight": None}),
    "the released layout has no key 'linear.scale'": changed({"linear.scale": torch.zeros(2)}),
    "the released layout has no key 'stack.9.bottleneck_block.2.weight'": changed(
        {"stack.9.bottleneck_block.2.weight": torch.zeros(2)}
    ),
    f"the released layout has no key '{SECOND}6.weight'": changed({"6.weight": torch.zeros(2)}, SECOND),
    "linear.bias must have the shape (5,), got (4,)": changed({"linear.bias": torch.zeros(4)}),
    "linear.weight must have 2 dimensions, got the shape (960,)": changed({"linear.weight": torch.zeros(960)}),
    "linear.weight must have the shape (5, 192), got (5, 191)": changed({"linear.weight": torch.zeros(5, 191)}),
    "linear.weight must not be empty, got the shape (0, 192)": changed({"linear.weight": torch.zeros(0, 192)}),
    "bn1.weight must have float16, bfloat16, float32 or float64, got torch.int64": changed(
        {"bn1.weight": torch.zeros(192).long()}
    ),
    "bn1.bias must have float16, bfloat16, float32 or float64, got torch.float8_e4m3fn": changed(
        {"bn1.bias": torch.zeros(192).to(torch.float8_e4m3fn)}
    ),
    "linear.weight must not be empty, got the shape (100000000000000000, 0)": changed(
        {"linear.weight": torch.zeros(10**17, 0)}
    ),
    "bn1.num_batches_tracked must have torch.int64, got torch.float32": changed(
        {"bn1.num_batches_tracked": torch.zeros(())}
    ),
    f"{FIRST}0.weight must have 4 dimensions, got the shape (6, 6)": changed({"0.weight": torch.zeros(6, 6)}, FIRST),
    f"{FIRST}0.weight must have the shape (6, 6, 3, 3), got (6, 6, 1, 1)": changed(
        {"0.weight": torch.zeros(6, 6, 1, 1)}, FIRST
    ),
    "block 0 must read 6 channels, got 16; networks that pad can't be converted": changed(
        {"0.weight": torch.zeros(4, 16, 3, 3), "7.weight": torch.zeros(16, 4, 3, 3)}, FIRST
    ),
    "the first block must have stride 2 and give 24 channels, got 6": changed(
        {"7.weight": torch.zeros(6, 6, 3, 3)}, FIRST
    ),
    "block 1 must read 24 channels, got 48; networks that pad can't be converted": changed(
        {"2.weight": torch.zeros(6, 48, 3, 3)}, SECOND
    ),
    "block 1 must give 24 channels, or 96 with stride 2, got 48": changed(
        {"9.weight": torch.zeros(48, 6, 3, 3)}, SECOND
    ),
}


@pytest.mark.parametrize("message", CONTENTS)
def test_other_contents_are_refused(folder, capsys, message):
    checkpoint = folder / "in" / "net.pth"
    torch.save(CONTENTS[message], checkpoint)
    err = refused(capsys, folder, "released", checkpoint, folder / "out" / "net.safetensors")
    message = message if "PATH" in message else f"cannot convert PATH: {message}"
    assert err == f"error: {message.replace('PATH', str(checkpoint))}\n"


def test_another_network_is_refused_on_the_way_back(folder, capsys):
    weights = folder / "in" / "net.safetensors"
    save_file(zoo.create("irevnet_small", num_classes=3).state_dict(), weights)
    err = refused(capsys, folder, "to-released", weights, folder / "out" / "net.pth")
    rule = "body.2.function.0.weight must have the shape (6, 6, 3, 3), got (6, 6, 1, 1)"
    assert err == f"error: cannot convert {weights}: {rule}\n"
    with pytest.raises(InputError, match=re.escape(f"cannot convert {weights}: {rule}")):
        load_converted(weights)
    with pytest.raises(InputError, match=r"the key 'body.2.function.0.weight' is missing"):
        to_released({})


def test_sizes_that_no_file_has():
    state, width = {"linear.weight": torch.zeros(1, 1)}, 6
    for i in range(16):
        place = f"stack.{i}.bottleneck_block."
        state[f"{place}{2 if i else 0}.weight"] = torch.zeros(1).expand(1, width, 1, 1)
        width *= 4
        state[f"{place}{9 if i else 7}.weight"] = torch.zeros(1).expand(width, 1, 1, 1)
    with pytest.raises(InputError, match=r"the shapes are of no network that can be built \(Storage size"):
        from_released(state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of good files, by their format."""
    path, state = tmp_path_factory.mktemp("whole") / "net", oracle(blocks=(1,), classes=2).state_dict()
    found = {}
    for name, write in (("zip", torch.save), ("legacy", WRITERS["legacy"]), ("safetensors", save_file)):
        write(state, path)
        found[name] = path.read_bytes()
    return found


@settings(max_examples=40)
@given(st.sampled_from(["zip", "legacy", "safetensors"]), st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(tmp_path_factory, whole, form, share):
    folder = tmp_path_factory.mktemp("truncated")
    (folder / "net").write_bytes(whole[form][: int(share * len(whole[form]))])
    command = convert.convert_to_released if form == "safetensors" else convert.convert_released
    with pytest.raises(InputError) as caught:
        command(folder / "net", folder / "out")
    problem = "not a safetensors file (" if form == "safetensors" else "damaged, or not a checkpoint of PyTorch"
    assert str(caught.value).startswith(f"cannot read {folder / 'net'}: {problem}")
    assert "\n" not in str(caught.value)
    assert [each.name for each in folder.iterdir()] == ["net"]


@settings(max_examples=60)
@given(st.sampled_from(["zip", "legacy", "safetensors"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_changed_bytes_are_refused_or_read(tmp_path_factory, whole, form, share, change):
    """A weight can't be told from another, and what no error says in one line would end in a traceback."""
    folder = tmp_path_factory.mktemp("changed")
    content = bytearray(whole[form])
    content[int(share**2 * len(content))] ^= change  # more often near the start, where the structure is
    (folder / "net").write_bytes(content)
    command = convert.convert_to_released if form == "safetensors" else convert.convert_released
    try:
        command(folder / "net", folder / "out")
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["released", "to-released"])
def test_paths_are_refused(folder, capsys, command):
    inside, outside = folder / "in" / "net", folder / "out" / "net"
    err = refused(capsys, folder, command, inside, outside)
    assert err == f"error: cannot read {inside}: No such file or directory\n"
    err = refused(capsys, folder, command, folder, outside)
    assert err.startswith(f"error: cannot read {folder}: ")
    err = refused(capsys, folder, command, inside, folder / "none" / "net")
    assert err == f"error: no such folder: {folder / 'none'}\n"
    outside.write_text("mine")
    err = refused(capsys, folder, command, inside, outside)
    assert err == f"error: {outside} is there already; remove it, or take another name\n"
    assert outside.read_text() == "mine"
    outside.unlink()
    outside.symlink_to(folder / "elsewhere")  # where there is nothing
    assert "is there already" in refused(capsys, folder, command, inside, outside)
    err = refused(capsys, folder, command, inside, folder / "out" / ("n" * 300))
    assert err.endswith("n: File name too long\n")


def test_a_file_made_meanwhile_is_kept(folder, monkeypatch):
    out, save = folder / "out" / ("n" * 240), convert.save_file
    monkeypatch.setattr(convert, "save_file", lambda *given: (out.write_text("mine"), save(*given)))
    torch.save(oracle().state_dict(), folder / "in" / "net")
    with pytest.raises(InputError, match=f"cannot write {out}: File exists"):
        convert.convert_released(folder / "in" / "net", out)
    assert out.read_text() == "mine"
    assert list(out.parent.iterdir()) == [out]


def test_file_systems_without_hard_links(folder, monkeypatch):
    def refuse(new, old):
        if new.name == "taken":
            new.symlink_to(folder / "elsewhere")
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    torch.save(oracle().state_dict(), folder / "in" / "net")
    convert.convert_released(folder / "in" / "net", folder / "out" / "net")
    same(to_released(load_converted(folder / "out" / "net").state_dict()), oracle().state_dict())
    with pytest.raises(InputError, match=r"cannot write .*: File exists"):
        convert.convert_released(folder / "in" / "net", folder / "out" / "taken")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["net", "taken"]


@pytest.mark.parametrize("command", ["released", "to-released"])
@pytest.mark.parametrize("at", ["write", "rename", "Ctrl-C"])
def test_what_can_not_be_written_leaves_nothing(folder, capsys, monkeypatch, command, at):
    theirs, out = oracle().state_dict(), folder / "out" / "net"
    if command == "released":
        torch.save(theirs, folder / "in" / "net")
    else:
        save_file(from_released(theirs)[1], folder / "in" / "net")

    def fail(*arguments):
        if at == "write":  # after half of the file
            next(each for each in arguments if isinstance(each, Path)).write_bytes(b"half")
        raise KeyboardInterrupt if at == "Ctrl-C" else OSError(errno.ENOSPC, "No space left on device")

    if at == "write":
        monkeypatch.setattr(convert, "save_file", lambda _, path, metadata: fail(path))
        monkeypatch.setattr(torch, "save", lambda _, file: fail(Path(file.name)))
    else:
        monkeypatch.setattr(Path, "hardlink_to", fail)
    if at == "Ctrl-C":
        before = sorted(folder.rglob("*"))
        assert run(capsys, command, folder / "in" / "net", out) == (130, "", "stopped; nothing written\n")
        assert sorted(folder.rglob("*")) == before
    else:
        err = refused(capsys, folder, command, folder / "in" / "net", out)
        assert err == f"error: cannot write {out}: No space left on device\n"
