"""Checkpoints whose pickles are small and need much, or whose objects are not what they seem."""

import io
import warnings
import zipfile

import pytest
import torch
from torch import nn

from tests.released import oracle, refused, run, same
from zoo import unpickling
from zoo.convert import load_converted, to_released


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["numel", "untyped_storage", "element_size", "detach", "clone", "is_floating_point"])
def test_attributes_of_a_parameter_do_no_harm(folder, capsys, name):
    weight = nn.Parameter(oracle().bn1.weight.detach())
    setattr(weight, name, "x")
    torch.save(oracle().state_dict() | {"bn1.weight": weight}, folder / "in" / "net.pth")
    assert run(capsys, "released", folder / "in" / "net.pth", folder / "out" / "net")[0] == 0
    same(to_released(load_converted(folder / "out" / "net").state_dict()), oracle().state_dict())


def pickled(operations, compression=zipfile.ZIP_STORED):
    """A checkpoint whose pickle has these operations."""
    file = io.BytesIO()
    torch.save({}, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            body = b"\x80\x02" + operations + b"." if name.endswith("data.pkl") else content
            archive.writestr(name, body)
    return file.getvalue()


DEEP = b"}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u"
BOMBS = {
    "its records are compressed, and PyTorch writes none that are": pickled(b"}", zipfile.ZIP_DEFLATED),
    "it makes a bytearray, which may be as large as memory": pickled(b"c__builtin__\nbytearray\nK\x09\x85R"),
    "it has tuples that are nested too deep": pickled(DEEP),  # which crashes Python when it is hashed
    "it has tuples that are nested too deep ": pickled(b"}()" + b"q\x00h\x00\x86" * 20 + b"K\x01u"),
    "it has tuples that are nested too deep  ": b"\x80\x02K\x01.\x80\x02" + DEEP + b".",  # not a zip file
    "its pickle has more than 1,000 operations": pickled(b"]" * 1001),
    "its records are larger than the file": pickled(b"}"),
}


@pytest.mark.parametrize("message", BOMBS)
def test_small_files_that_need_much_are_refused(folder, capsys, monkeypatch, message):
    checkpoint, content = folder / "in" / "net", bytearray(BOMBS[message])
    if "larger" in message:
        entry = content.index(b"PK\x01\x02")
        content[entry + 20 : entry + 28] = 2 * (10**9).to_bytes(4, "little")  # its sizes in the directory
    if "operations" in message:
        monkeypatch.setattr(unpickling, "_MOST_OPERATIONS", 1000)
    checkpoint.write_bytes(content)
    err = refused(capsys, folder, "released", checkpoint, folder / "out" / "net")
    assert err == f"error: cannot read {checkpoint}: {message.strip()}\n"


def test_an_ordered_dictionary_with_other_methods_is_read_as_it_is(tmp_path):
    (tmp_path / "net").write_bytes(pickled(b"ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsX\x01\0\0\0xsb"))
    assert unpickling.read_tensors(tmp_path / "net") == {}


def test_nested_tensors_are_refused(folder, capsys):
    checkpoint = folder / "in" / "net"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    torch.save(oracle().state_dict() | {"bn1.weight": nested}, checkpoint)
    err = refused(capsys, folder, "released", checkpoint, folder / "out" / "net")
    assert err == f"error: no state dict in {checkpoint}: its entry 'bn1.weight' is not a dense tensor\n"
