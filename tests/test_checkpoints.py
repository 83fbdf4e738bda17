"""Checkpoints: whole or not there, whatever happens; damaged ones are passed over."""

import errno
import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import checkpoints
from zoo.checkpoints import Checkpoint, Keep, any_left, load, names, save, write
from zoo.errors import InputError


def checkpoint(step, *, average=True):
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(3, 4, generator=generator), "n": torch.tensor(step)}
    state = {
        "optimizer": {"state": {0: {"momentum": torch.randn(3, 4, generator=generator)}}},
        "best": 0.5,
        "none": None,
    }
    return Checkpoint(step, weights, {"a": weights["a"] * 2} if average else None, state)


def same(found, expected):
    assert found.step == expected.step
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[key], t) for key, t in expected.weights.items())
    assert (found.average is None) == (expected.average is None)
    assert expected.average is None or torch.equal(found.average["a"], expected.average["a"])
    momentum = [each.state["optimizer"]["state"][0]["momentum"] for each in (found, expected)]
    assert torch.equal(*momentum)
    assert (found.state["best"], found.state["none"]) == (0.5, None)


@pytest.mark.parametrize("average", [True, False])
def test_what_was_saved_comes_back(tmp_path, average):
    path = save(tmp_path, checkpoint(7, average=average))
    same(load(tmp_path), checkpoint(7, average=average))
    same(load(tmp_path, path.name), checkpoint(7, average=average))
    assert (tmp_path / "latest").read_text() == path.name == "step_000000007"
    assert torch.load(path / "state.pt", weights_only=True)["best"] == 0.5


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True).map(sorted),
    st.integers(1, 4),
    st.none() | st.integers(1, 10),
    st.data(),
)
def test_the_last_the_best_and_every_nth_stay(tmp_path_factory, steps, last, every, data):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    best = data.draw(st.none() | st.sampled_from(steps))
    for step in steps:
        save(folder, checkpoint(step, average=False), best=best, keep=Keep(last, every))
    expected = {*steps[-last:], *([] if best is None else [best])}
    expected |= {step for step in steps if every is not None and step % every == 0}
    assert names(folder) == [f"step_{step:09d}" for step in sorted(expected)]
    assert {path.name for path in folder.iterdir()} - set(names(folder)) == {"latest"} | (
        {"best"} if best is not None else set()
    )
    same(load(folder), checkpoint(steps[-1], average=False))


def snapshot(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def damage(path, kind):
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        position = 2 * len(content) // 3
        path.write_bytes(content[:position] + bytes([content[position] ^ 8]) + content[position + 1 :])
    elif kind == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "empty"])
@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "state.pt", "meta.json"])
def test_a_damaged_one_is_passed_over_with_a_word(tmp_path, file, kind):
    for step in (1, 2, 3):
        save(tmp_path, checkpoint(step))
    damage(tmp_path / "step_000000003" / file, kind)
    before = snapshot(tmp_path)
    said = []
    same(load(tmp_path, say=said.append), checkpoint(2))
    assert snapshot(tmp_path) == before  # a run that is alive may be at work there
    same(load(tmp_path, owner=True, say=said.append), checkpoint(2))
    assert said.pop() == said[0]
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'step_000000003'} is damaged and passed over: ")
    with pytest.raises(InputError, match=r"cannot read .*damaged-step_000000003: "):
        load(tmp_path, "damaged-step_000000003")
    for step in (1, 2):
        damage(tmp_path / f"step_{step:09d}" / "state.pt", "empty")
    for _ in range(2):  # put aside, they still count: a restart must not begin anew without a word
        assert any_left(tmp_path)
        with pytest.raises(InputError, match=r"no checkpoint in .*: all are damaged"):
            load(tmp_path, owner=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_bit_of_what_describes_it_can_flip_unnoticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    save(folder, checkpoint(1))
    path = save(folder, checkpoint(2)) / "meta.json"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    meaning = json.loads(path.read_bytes())
    path.write_bytes(content)
    try:
        harmless = json.loads(content) == meaning  # white space
    except ValueError:
        harmless = False
    same(load(folder), checkpoint(2 if harmless else 1))


def test_other_folders_are_no_checkpoints(tmp_path):
    save(tmp_path, checkpoint(1))
    shutil.copytree(tmp_path / "step_000000001", tmp_path / "step_000000001.bak")
    save(tmp_path, checkpoint(2), keep=Keep(last=1, every=2))
    assert names(tmp_path) == ["step_000000002"]
    assert (tmp_path / "step_000000001.bak").is_dir()


def test_a_run_that_went_back_counts_no_damaged_one(tmp_path):
    save(tmp_path, checkpoint(1), best=1)
    save(tmp_path, checkpoint(30))
    damage(tmp_path / "step_000000030" / "state.pt", "truncated")
    same(load(tmp_path, owner=True), checkpoint(1))
    save(tmp_path, checkpoint(2), keep=Keep(last=1))
    same(load(tmp_path), checkpoint(2))
    assert names(tmp_path) == ["step_000000001", "step_000000002"]
    assert (tmp_path / "damaged-step_000000030").is_dir()


def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    save(tmp_path, checkpoint(1))
    save(tmp_path, checkpoint(2))

    def failing(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints, "_sums", failing)
    with pytest.raises(InputError, match=r"cannot read .*step_000000002: Input/output error"):
        load(tmp_path)
    monkeypatch.undo()
    same(load(tmp_path), checkpoint(2))


class Killed(BaseException):
    """Stands for a kill: nobody catches it."""


@pytest.mark.parametrize("start", [1, 2])
def test_a_kill_at_any_moment_of_a_save_leaves_the_one_before(tmp_path, monkeypatch, start):
    """Killed before each call that changes a file, until a save gets through; of another step, and of the same."""
    save(tmp_path / "start", checkpoint(start), best=start)
    calls = [(os, "fsync"), (checkpoints, "save_file"), (torch, "save"), (checkpoints.Path, "rename")]
    calls += [(checkpoints.Path, "replace"), (checkpoints.Path, "mkdir"), (shutil, "rmtree")]
    for moment in range(200):
        folder = tmp_path / f"{moment}"
        shutil.copytree(tmp_path / "start", folder)
        left = [moment]

        def dying(real, left=left):
            def call(*arguments, **options):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in calls:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save(folder, checkpoint(2), keep=Keep(last=1))
                done = True
            except Killed:
                done = False
        before = snapshot(folder)
        found = load(folder)
        same(found, checkpoint(found.step))
        assert snapshot(folder) == before
        same(load(folder, owner=True), checkpoint(found.step))
        save(folder, checkpoint(3), keep=Keep(last=1))  # and the next one gets through
        same(load(folder), checkpoint(3))
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        if done:
            assert found.step == 2
            break
    assert moment > 10


@pytest.mark.parametrize("call", ["save_file", "torch.save", "fsync"])
def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, monkeypatch, call):
    save(tmp_path, checkpoint(1))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"save_file": checkpoints, "torch.save": torch, "fsync": os}[call]
    monkeypatch.setattr(owner, call.rpartition(".")[2], full)
    words = (
        "cannot write the checkpoint .*step_000000002: No space left on device; the last good one is .*step_000000001"
    )
    with pytest.raises(InputError, match=words):
        save(tmp_path, checkpoint(2))
    monkeypatch.undo()
    assert names(tmp_path) == ["step_000000001"]
    assert not list(tmp_path.glob(".partial*"))
    same(load(tmp_path), checkpoint(1))


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in "):
        load(tmp_path / "nothing")
    assert names(tmp_path / "nothing") == []
    write(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*; there is none before it"):
        save(tmp_path / "file" / "inside", checkpoint(1))
