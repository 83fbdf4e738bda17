"""Images inside tar files: ImageNet's own, shards by folder and as WebDataset writes them; read in place."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_sample_images

from zoo.data import Samples, TarShards, batches_of, decode_image, evaluation_transform, loader, open_data, tars
from zoo.data.tars import validation_labels
from zoo.digits import write_digits
from zoo.errors import InputError
from zoo.recipes import RECIPES

PIXELS = load_sample_images().images


def jpeg(number):
    """A part of a real photograph, another one for each number."""
    file = io.BytesIO()
    Image.fromarray(PIXELS[number % 2][number : number + 64, number : number + 80]).save(file, "JPEG")
    return file.getvalue()


def tar_of(members, mode="w"):
    """A tar file of these contents by name; ``None`` is a folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return file.getvalue()


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet as it is downloaded, but small: a tar of tars, a flat tar, and the kit that says what is in that one."""
    classes = ["n02000001", "n01000002", "n01000003"]  # their numbers in the kit are 1, 2, 3: not the order of names
    inner = {
        f"{name}.tar": tar_of({f"{name}_{i}.JPEG": jpeg(10 * k + i) for i in range(3)})
        for k, name in enumerate(classes)
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    flat = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(50 + i) for i in (2, 1, 3, 4)}  # not in order
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(flat))
    synsets = np.zeros(4, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for i, name in enumerate([*classes, "n09999999"], 1):  # the kit has inner nodes of the hierarchy, too
        synsets[i - 1] = (i, name, "some words")
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    kit = {
        "ILSVRC2012_devkit_t12": None,
        "ILSVRC2012_devkit_t12/data/meta.mat": file.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n2\n",
    }
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(kit, "w:gz"))
    return tmp_path


def test_imagenets_own_tars_are_read_in_place(imagenet):
    before = {path.name for path in imagenet.iterdir()}
    data = open_data(imagenet)
    assert data.classes == ["n01000002", "n01000003", "n02000001"]
    assert data.training.labels.tolist() == [2, 2, 2, 0, 0, 0, 1, 1, 1]
    assert [data.training.read(i) for i in range(9)] == [jpeg(10 * k + i) for k in range(3) for i in range(3)]
    assert data.training.name(4) == f"{imagenet}/ILSVRC2012_img_train.tar:n01000002.tar:n01000002_1.JPEG"
    assert [data.validation.read(i) for i in range(4)] == [jpeg(50 + i) for i in (2, 1, 3, 4)]
    assert data.validation.labels.tolist() == [2, 1, 0, 0]  # 2 is a 1, n02000001; 1 is a 3; 3 and 4 are 2s
    written = {path.name for path in imagenet.iterdir()} - before
    assert written == {"ILSVRC2012_img_train.tar.index.npz", "ILSVRC2012_img_val.tar.index.npz"}
    assert validation_labels(imagenet / "ILSVRC2012_devkit_t12.tar.gz")["ILSVRC2012_val_00000001.JPEG"] == "n01000003"


def test_loaders_read_them_in_other_processes(imagenet):
    samples = Samples(open_data(imagenet).training, evaluation_transform(RECIPES["digits"]))
    both = [list(loader(samples, batches_of(range(9), 4), workers=workers)) for workers in (0, 2)]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    again = pickle.loads(pickle.dumps(samples.source))  # noqa: S301
    assert again.read(3) == samples.source.read(3)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["cat", "dog", "ünï"]), st.integers(0, 40)), min_size=1, max_size=12, unique=True
    ),
    st.integers(1, 3),
    st.booleans(),
)
def test_shards_of_any_form_give_the_files_back(tmp_path_factory, images, count, numbered):
    """By the folder in which an image is, or by the number in the file beside it; long names are no matter."""
    folder = tmp_path_factory.mktemp("shards")
    shards = [images[i::count] for i in range(count) if images[i::count]]
    names = sorted({name for name, _ in images})
    for k, shard in enumerate(shards):
        members = {}
        for name, number in shard:
            stem = f"{name}-{number}" if numbered else f"./{'x' * 90}/{name}/{number}"
            members[f"{stem}.jpg"] = jpeg(number)
            if numbered:
                members[f"{stem}.cls"] = f"{names.index(name)}\n".encode()
            members[f"{stem}.txt"] = b"a caption"
        (folder / f"train-{k:03d}.tar").write_bytes(tar_of(members))
    source = TarShards(sorted(folder.glob("*.tar")))
    order = [each for shard in shards for each in shard]
    assert [source.read(i) for i in range(len(source))] == [jpeg(number) for _, number in order]
    expected = [str(names.index(name)) if numbered else name for name, _ in order]
    assert [source.classes[label] for label in source.labels] == expected
    again = TarShards(sorted(folder.glob("*.tar")))  # from the index
    assert [again.name(i) for i in range(len(again))] == [source.name(i) for i in range(len(source))]
    assert again.labels.tolist() == source.labels.tolist()


def test_numbers_are_sorted_as_numbers(tmp_path):
    members = {f"{i:02d}.cls": str(i).encode() for i in range(12)} | {f"{i:02d}.jpg": jpeg(i) for i in range(12)}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert TarShards([tmp_path / "a.tar"]).labels.tolist() == list(range(12))


def test_webdatasets_numbers_go_before_its_folders(tmp_path):
    """Its names end at their first dot, and its folders are parts of the data: neither may decide the class."""
    members = {}
    for i in range(4):
        members |= {f"part{i // 2}/{i}.left.jpg": jpeg(i), f"part{i // 2}/{i}.cls": str(3 - i).encode()}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert TarShards([tmp_path / "a.tar"]).labels.tolist() == [3, 2, 1, 0]
    del members["part1/2.cls"]
    (tmp_path / "b.tar").write_bytes(tar_of(members))
    with pytest.raises(
        InputError, match=r"no class for .*b\.tar:part1/2\.left\.jpg: it has no \.cls file, and there are"
    ):
        TarShards([tmp_path / "b.tar"])


def test_what_was_added_under_the_same_name_counts(tmp_path):
    """As ``tar --append`` and ``--update`` leave it, and ``tar --extract`` reads it."""
    (tmp_path / "a.tar").write_bytes(tar_of({"cat/1.jpg": jpeg(1), "cat/2.jpg": jpeg(2), "dog/1.jpg": jpeg(3)}))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        member = tarfile.TarInfo("cat/1.jpg")
        member.size = len(jpeg(4))
        tar.addfile(member, io.BytesIO(jpeg(4)))
    source = TarShards([tmp_path / "a.tar"])
    found = {source.name(i).rpartition(":")[2]: source.read(i) for i in range(len(source))}
    assert found == {"cat/1.jpg": jpeg(4), "cat/2.jpg": jpeg(2), "dog/1.jpg": jpeg(3)}
    assert len(source) == 3


def test_what_was_added_is_known_by_its_path_and_a_tar_counts_as_a_whole(tmp_path):
    before = {"./cat/1.jpg": jpeg(1), "dog.tar": tar_of({"1.jpg": jpeg(2), "2.jpg": jpeg(3)})}
    (tmp_path / "a.tar").write_bytes(tar_of(before))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, content in (("cat/1.jpg", jpeg(4)), ("dog.tar", tar_of({"1.jpg": jpeg(5)}))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = TarShards([tmp_path / "a.tar"])
    assert [source.read(i) for i in range(len(source))] == [jpeg(4), jpeg(5)]


def test_the_index_is_made_anew_when_the_tar_changes(tmp_path, monkeypatch):
    path = tmp_path / "train-0.tar"
    path.write_bytes(tar_of({"cat/a.jpg": jpeg(0)}))
    walks = []
    real = tars._walk
    monkeypatch.setattr(tars, "_walk", lambda *arguments: walks.append(1) or real(*arguments))
    assert len(TarShards([path])) == len(TarShards([path])) == len(walks) == 1
    index = path.with_name("train-0.tar.index.npz")
    for damage in (b"", b"nothing", index.read_bytes()[:200]):
        index.write_bytes(damage)
        assert len(TarShards([path])) == 1
    path.write_bytes(tar_of({"cat/a.jpg": jpeg(0), "dog/b.jpg": jpeg(1)}))
    assert len(TarShards([path])) == 2
    index.unlink()
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(PermissionError("read only")))
    assert len(TarShards([path])) == 2  # a folder that is not ours
    assert {each.name for each in tmp_path.iterdir()} == {"train-0.tar"}


def test_folders_and_tars_may_be_mixed(tmp_path):
    digits = write_digits(tmp_path / "digits")
    paths = sorted((digits / "val").glob("*/*.png"))
    members = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}
    mixed = tmp_path / "mixed"
    (mixed / "val").mkdir(parents=True)
    (mixed / "train").symlink_to(digits / "train")
    (mixed / "val" / "all.tar").write_bytes(tar_of(members))
    data, plain = open_data(mixed), open_data(digits)
    assert data.classes == plain.classes
    assert [data.validation.read(i) for i in range(355)] == [plain.validation.read(i) for i in range(355)]
    assert data.validation.labels.tolist() == plain.validation.labels.tolist()


def test_what_is_wrong_is_said_in_one_line(imagenet, tmp_path):
    small = {"cat/a.jpg": jpeg(0)}
    contents = {
        "gz": tar_of(small, "w:gz"),
        "text": b"no tar at all" * 100,
        "none": tar_of({"readme.txt": b"x"}),
        "flat": tar_of({"a.jpg": jpeg(0)}),
        "good": tar_of(small),
    }
    paths = {name: tmp_path / f"{name}.tar" for name in (*contents, "absent")}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    for make, words in [
        (lambda: TarShards([paths["gz"]]), r"cannot read .*gz\.tar: .*; it must be a whole, uncompressed tar file"),
        (lambda: TarShards([paths["text"]]), r"cannot read .*text\.tar: .*; it must be a whole, uncompressed tar file"),
        (lambda: TarShards([paths["absent"]]), r"cannot read .*absent\.tar: No such file or directory"),
        (lambda: TarShards([paths["none"]]), r"no images in .*none\.tar"),
        (
            lambda: TarShards([paths["flat"]]),
            r"no class for .*flat\.tar:a\.jpg: it is in no folder and has no \.cls file",
        ),
        (lambda: TarShards([paths["good"]], classes=["dog"]), "unknown class folder .*cat: the training data has no"),
        (lambda: TarShards([paths["good"]], labels={}), "no class for .*a.jpg in the ground truth"),
        (lambda: validation_labels(tmp_path / "kit"), "no such file: .*kit; it says which class"),
        (lambda: validation_labels(paths["good"]), r"cannot read .*good\.tar: "),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)
    (imagenet / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(InputError, match="it says which class the validation images have"):
        open_data(imagenet)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "at a header", "in a header", "two", "link", "symlink"])
def test_no_image_of_a_damaged_tar_is_lost_without_a_word(tmp_path, damage, nested):
    whole = tar_of({f"cat/{i}.jpg": b"x" * 600 for i in range(4)})  # 512 bytes of header, two blocks of 512
    content = {
        "flipped": whole[:1546] + bytes([whole[1546] ^ 1]) + whole[1547:],
        "at a header": whole[: 2 * 1536],
        "in a header": whole[: 2 * 1536 + 100],
        "two": whole + whole,
    }.get(damage)
    if content is None:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            member = tarfile.TarInfo("cat/a.jpg")
            member.type, member.linkname = (tarfile.LNKTYPE if damage == "link" else tarfile.SYMTYPE), "cat/b.jpg"
            tar.addfile(member)
        content = file.getvalue()
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of({"n01.tar": content}) if nested else content)
    with pytest.raises(InputError, match=r"cannot read .*train\.tar: .*; it must be a whole, uncompressed tar file"):
        TarShards([path])
    assert not list(tmp_path.glob("*.npz"))


def test_folders_beside_tars_are_not_overlooked(tmp_path):
    digits = write_digits(tmp_path / "digits")
    (digits / "train_old.tar").write_bytes(tar_of({"0/a.jpg": jpeg(0)}))
    assert len(open_data(digits).training) == 1442
    (digits / "train" / "part.tar").write_bytes(tar_of({"0/a.jpg": jpeg(0)}))
    with pytest.raises(InputError, match=r"holds class folders and tar files \(part\.tar\); keep one of both"):
        open_data(digits)


def test_a_tar_that_is_cut_off_while_it_is_read(tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of({"cat/a.jpg": jpeg(0)}))
    source = TarShards([path])
    assert decode_image(source.read(0), source.name(0)).shape == (3, 64, 80)
    os.truncate(path, 700)
    with pytest.raises(InputError, match=r"cannot read the image .*train\.tar:cat/a\.jpg: the tar ends before it does"):
        source.read(0)
    other = pickle.loads(pickle.dumps(source))  # noqa: S301
    path.unlink()
    with pytest.raises(InputError, match="No such file or directory"):
        other.read(0)
