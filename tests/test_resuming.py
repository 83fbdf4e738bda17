"""A spectrum that was cut off goes on to the same bits; what is damaged, or of another computation, is not believed."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import zoo
from tests.test_spectrum import linear, network
from zoo.analysis import Jacobian, jacobian, largest_singular_values, singular_values
from zoo.analysis.__main__ import main
from zoo.analysis.parts import Parts, key_of
from zoo.errors import InputError
from zoo.plots import new_figure
from zoo.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("digits_once")

ROOT = Path(__file__).parents[1]
COMPUTED = []


@pytest.fixture(autouse=True)
def _counted(monkeypatch):
    """Products with blocks of vectors are counted."""
    COMPUTED.clear()
    times = Jacobian.times
    monkeypatch.setattr(Jacobian, "times", lambda self, v: COMPUTED.append(len(v)) or times(self, v))


def stop_at(block, kind=KeyboardInterrupt):
    """What raises when so many blocks are done."""
    done = []

    def progress(*_):
        done.append(1)
        if len(done) == block:
            raise kind

    return progress


OPTIONS = {"k": 40, "smallest": 8}


@pytest.fixture(scope="module")
def whole():
    """A network, an image, and the spectrum without interruption."""
    torch.manual_seed(1)
    net, x = network(16, (1, 1)), torch.rand(1, 3, 16, 16)
    return net, x, singular_values(net, x, **OPTIONS)


@pytest.mark.parametrize("blocks", [(2, 2, 1), (8,), (8, 4)])
def test_it_goes_on_to_the_same_bits(tmp_path, whole, blocks):
    """Eight blocks are of the largest values, eight of the smallest; for each, one more estimates the energy."""
    net, x, expected = whole
    for block in blocks:
        with pytest.raises(KeyboardInterrupt):
            singular_values(net, x, **OPTIONS, folder=tmp_path, progress=stop_at(block))
    COMPUTED.clear()
    assert singular_values(net, x, **OPTIONS, folder=tmp_path) == expected
    assert COMPUTED.count(32) == 16 - sum(blocks) + (1 if sum(blocks) > 8 else 2)


def test_it_is_kept_from_time_to_time_and_goes_on_when_the_process_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(jacobian, "SAVE_EVERY", 0.0)
    matrix = linear(torch.linspace(3, -3, 100).exp().tolist())
    whole = largest_singular_values(matrix, 30)
    parts = Parts(tmp_path, key_of())
    monkeypatch.setattr(jacobian._Basis, "save", _save_but_not_in_the_end(jacobian._Basis.save))
    with pytest.raises(SystemExit):
        largest_singular_values(matrix, 30, parts=parts, progress=stop_at(6, SystemExit))
    assert len(list(tmp_path.iterdir())) == 6
    COMPUTED.clear()
    found = largest_singular_values(matrix, 30, parts=parts)
    assert torch.equal(found.values, whole.values)
    assert torch.equal(found.residuals, whole.residuals)
    assert (found.energy, found.energy_error) == (whole.energy, whole.energy_error)
    assert len(COMPUTED) == 12 - 6 + 1
    assert [path.name[17:] for path in tmp_path.iterdir()] == ["values-basis.safetensors"]


def _save_but_not_in_the_end(save):
    """As if the process had been killed: what comes after the last part is lost."""

    def saved(self, parts, name, start):
        if sys.exc_info()[0] is not SystemExit:
            save(self, parts, name, start)

    return saved


@pytest.mark.parametrize(("harm", "which"), [("cut", 1), ("flip", 0), ("other", 1)])
def test_damaged_parts_are_computed_again(tmp_path, whole, harm, which):
    net, x, expected = whole
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            singular_values(net, x, **OPTIONS, folder=tmp_path, progress=stop_at(3))
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 2
    content = bytearray(paths[which].read_bytes())
    if harm == "flip":
        content[-5] ^= 1
    harmed = {"cut": content[:-9], "empty": b"", "zeros": bytes(len(content)), "other": paths[which - 1].read_bytes()}
    paths[which].write_bytes(harmed.get(harm, content))
    COMPUTED.clear()
    assert singular_values(net, x, **OPTIONS, folder=tmp_path) == expected
    assert COMPUTED.count(32) == 16 + 2 - 3 * which


def test_a_part_that_does_not_go_on_where_the_one_before_ends_is_not_used(tmp_path):
    """As if another process had written it."""
    matrix = linear(torch.linspace(3, -3, 100).exp().tolist())
    whole = largest_singular_values(matrix, 30)
    for folder, blocks in (("one", (3, 1)), ("other", (2,))):
        for block in blocks:
            parts = Parts(tmp_path / folder, key_of())
            with pytest.raises(KeyboardInterrupt):
                largest_singular_values(matrix, 30, parts=parts, progress=stop_at(block))
    [part] = (tmp_path / "other").iterdir()
    part.replace(tmp_path / "one" / part.name)
    COMPUTED.clear()
    assert torch.equal(
        largest_singular_values(matrix, 30, parts=Parts(tmp_path / "one", key_of())).values, whole.values
    )
    assert len(COMPUTED) == 12 - 2 + 1


def test_a_finished_image_is_not_computed_again_and_damaged_it_is(tmp_path):
    net, x = network(), torch.rand(1, 3, 8, 8)
    first = singular_values(net, x, folder=tmp_path)
    COMPUTED.clear()
    assert singular_values(net, x, folder=tmp_path) == first
    assert not COMPUTED
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    path.write_bytes(path.read_bytes().replace(b'\\"dimension\\": 192', b'\\"dimension\\": 193'))
    assert singular_values(net, x, folder=tmp_path) == first
    assert COMPUTED


def test_every_other_computation_has_another_key(monkeypatch):
    net, x = network(), torch.rand(1, 3, 8, 8)
    others = [key_of(net=net, image=x, k=1)]
    assert key_of(net=copy.deepcopy(net), image=x.clone(), k=1) == others[0]
    others += [
        key_of(net=net, image=x, k=2),
        key_of(net=net, image=x + 1e-7, k=1),
        key_of(net=net, image=x.double(), k=1),
    ]
    with torch.no_grad():
        net.body[-2].function[-1].weight.view(-1)[0] += 1e-6
    others.append(key_of(net=net, image=x, k=1))
    net.features(torch.rand(16, 3, 8, 8))
    next(b for b in net.buffers() if b.is_floating_point()).add_(1e-6)
    others.append(key_of(net=net, image=x, k=1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    others.append(key_of(net=net, image=x, k=1))
    assert len(set(others)) == len(others)


def test_what_can_not_be_kept_ends_the_computation():
    with pytest.raises(InputError, match="cannot write to /proc/parts: "):
        singular_values(network(), torch.rand(1, 3, 8, 8), folder=Path("/proc/parts"))


def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_pretrained(network(blocks=(1, 1)), tmp_path / "net")
    return ["spectrum", "--checkpoint", str(checkpoint), "--output", "out", "--size", "8", "--images", "2"]


def test_the_command_goes_on_with_the_images_that_are_missing(tmp_path, capsys, monkeypatch):
    """Ctrl-C at the second image."""
    monkeypatch.setattr("zoo.analysis.spectrum.draw_spectra", lambda _: new_figure(1, 1))  # drawing takes longest
    given = options(tmp_path, monkeypatch)
    assert main(given) == 0
    assert {path.name for path in Path("out").iterdir()} == {f"spectrum.{e}" for e in ("json", "png", "svg")}
    whole = json.loads(Path("out/spectrum.json").read_text())["spectra"]
    Path("out/spectrum.json").unlink()
    dense, seen = Jacobian.dense, []

    def interrupted(self, progress):
        seen.append(self)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return dense(self, progress)

    monkeypatch.setattr(Jacobian, "dense", interrupted)
    capsys.readouterr()
    assert main(given) == 130
    where = "stopped; what is finished is kept in out/spectrum.parts, and the same command goes on with it\n"
    assert capsys.readouterr().err == where
    assert not Path("out/spectrum.json").exists()
    assert main([*given, "--seed", "1"]) == 0  # another computation takes nothing of it, and leaves it
    assert len(seen) == 4
    assert main(given) == 0
    assert len(seen) == 5
    assert "1 of 2 images are finished already, in out/spectrum.parts" in capsys.readouterr().out
    assert json.loads(Path("out/spectrum.json").read_text())["spectra"] == whole
    assert not Path("out/spectrum.parts").exists()


def test_nothing_is_said_to_be_kept_where_nothing_is(tmp_path, capsys, monkeypatch):
    given = options(tmp_path, monkeypatch)
    monkeypatch.setattr(Jacobian, "dense", stop_at(1))
    assert main(given) == 130
    assert capsys.readouterr().err == "stopped; no figure was written\n"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_what_is_done(tmp_path, kind, code):
    save_pretrained(zoo.create("irevnet_small", num_classes=2), tmp_path / "net")
    # A shell's background jobs, such as a whole test run, ignore SIGINT, and what they start does, too.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from pathlib import Path; from zoo.analysis.jacobian import _Basis; extend = _Basis.extend\n"
    program += "_Basis.extend = lambda self: (extend(self), Path('begun').touch())\n"
    program += "from zoo.analysis.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "spectrum", "--checkpoint", "net", "--output", "out", "--k", "400"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--images", "1", "--size", "32"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert "about" in process.stdout.readline()
        while not (tmp_path / "begun").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(kind)
        _, err = process.communicate(timeout=60)
    assert err == "stopped; what is finished is kept in out/spectrum.parts, and the same command goes on with it\n"
    assert process.returncode == code
    assert list((tmp_path / "out" / "spectrum.parts").glob("*-largest-0.safetensors"))
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "out" / "spectrum.parts").exists()
