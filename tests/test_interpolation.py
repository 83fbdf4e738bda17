"""Figure 5: images between two images, whose ends are these two."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from tests.zoo_networks import randomize
from zoo.analysis import Interpolation, draw_interpolations, equal_steps, interpolate, write_animation
from zoo.analysis.__main__ import main
from zoo.analysis.interpolation import _numbers, chosen_pairs
from zoo.errors import InputError
from zoo.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("digits_once")


def network(grid="exact"):
    """In train, with statistics and weights that are not those of initialisation."""
    net = randomize(zoo.create("irevnet_small", num_classes=2, blocks=(2, 2)), 0.3)
    net.features(torch.rand(16, 3, 8, 8))
    net.grid = grid
    return net.requires_grad_(False)


def pair():
    return (torch.randint(0, 256, (2, 3, 8, 8)) / 255).unbind()


@pytest.mark.parametrize("steps", [[0, 1], [1, 0.5, 0, -0.5], [0.25, 1.0], [0, *torch.rand(14).tolist(), 1]])
def test_the_ends_are_the_images_bit_for_bit_on_the_exact_grid(steps):
    net, (x0, x1) = network(), pair()
    found = interpolate(net, x0, x1, steps)
    for t, image, mixed in zip(steps, found.images, found.pixels, strict=True):
        if t in {0, 1}:
            assert torch.equal(image, (x1, x0)[int(t)].double())
            assert torch.equal(mixed, (x1, x0)[int(t)])
    assert net.training
    loose = interpolate(network(None), x0, x1, [0, 1])
    assert torch.allclose(loose.images, torch.stack([x1, x0]), atol=1e-4)


def test_the_images_have_the_mixed_features():
    net, (x0, x1) = network(None).double().eval(), [x.double() for x in pair()]
    found = interpolate(net, x0, x1, [0.3])
    features = net.features(torch.stack([x0, x1]))
    assert torch.allclose(net.features(found.images)[0], 0.3 * features[0] + 0.7 * features[1], atol=1e-10)
    assert torch.allclose(found.pixels[0], 0.3 * x0 + 0.7 * x1)
    assert not torch.allclose(found.images, found.pixels, atol=1e-3)


def test_equal_steps_are_equally_far_apart():
    net, (x0, x1) = network(), pair()
    even = interpolate(net, x0, x1, torch.linspace(0, 1, 6).tolist()).distances
    steps = equal_steps(net, x0, x1, 6)
    found = interpolate(net, x0, x1, steps).distances
    assert (steps[0], steps[-1], len(steps)) == (1, 0, 6)
    assert steps == sorted(steps, reverse=True)
    assert max(found) / min(found) < min(max(even) / min(even), 1.1)
    assert equal_steps(net, x0, x0, 3) == [1, 0.5, 0]


def test_wrong_pairs_are_refused():
    net, (x0, x1) = network(), pair()
    with pytest.raises(InputError, match=r"the images must have one shape, got \(3, 8, 8\) and \(3, 8, 4\)"):
        interpolate(net, x0, x1[..., :4], [0])
    with pytest.raises(InputError, match="an interpolation needs one step at least"):
        interpolate(net, x0, x1, [])
    with pytest.raises(InputError, match="from one image to another there are at least 2 steps, got 1"):
        equal_steps(net, x0, x1, 1)
    with pytest.raises(InputError, match=r"the activations reach .* in the interpolation, and the grid ends at 8192"):
        interpolate(net, x0, x1, [1e9])


def test_pairs_are_of_two_images():
    data = type("Data", (), {"labels": [0, 0, 1], "__len__": lambda self: len(self.labels)})()
    assert chosen_pairs(data, None, 2) == [(0, 2), (2, 0)]
    assert chosen_pairs(data, [[2, 1]], 4) == [(2, 1)]
    with pytest.raises(InputError, match="a pair needs two images, got 1 twice"):
        chosen_pairs(data, [[0, 1], [1, 1]], 4)
    with pytest.raises(InputError, match=r"the validation images have the numbers 0 ... 2, got 3"):
        chosen_pairs(data, [[0, 3]], 4)
    data.labels = [1, 1, 1]
    assert chosen_pairs(data, None, 9) == [(0, 1), (1, 2), (2, 0)]
    data.labels = [1]
    with pytest.raises(InputError, match="a pair needs two images, and there is one"):
        chosen_pairs(data, None, 1)


def test_of_many_steps_some_are_drawn_with_both_ends():
    net, (x0, x1) = network(), pair()
    found = interpolate(net, x0, x1, torch.linspace(1, 0, 101).tolist())
    axes = draw_interpolations([found]).axes
    assert len(axes) == 2 * 25
    assert (axes[0].get_title(), axes[24].get_title()) == ("t = 1.00", "t = 0.00")


def test_what_is_beyond_is_counted_on_both_sides():
    images = torch.tensor([-0.1, 0.0, 1.0, 1.1]).view(1, 1, 2, 2)
    found = Interpolation((0.5,), images, images)
    assert _numbers(found, found, (images[0], images[0]), ["a", "b"])["beyond"] == 0.5


def half_saved(image, path, *_, **__):
    """As if Ctrl-C came in the middle."""
    Path(path).write_bytes(b"GIF89a")
    raise KeyboardInterrupt


def test_pictures_and_animations(tmp_path, monkeypatch):
    net, (x0, x1) = network(), pair()
    found = interpolate(net, x0, x1, [0, 0.4, 1])
    assert len(draw_interpolations([found, found]).axes) == 12
    write_animation(found, tmp_path / "new" / "there.gif")
    with Image.open(tmp_path / "new" / "there.gif") as animation:
        assert (animation.n_frames, animation.size) == (4, (256, 128))
    before = (tmp_path / "new" / "there.gif").read_bytes()
    monkeypatch.setattr(Image.Image, "save", half_saved)
    with pytest.raises(KeyboardInterrupt):
        write_animation(found, tmp_path / "new" / "there.gif")
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {"there.gif": before}
    with pytest.raises(InputError, match=r"cannot write /proc/none/x\.gif"):
        write_animation(found, Path("/proc/none/x.gif"))


def test_the_command_draws_pairs_of_the_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_pretrained(network(None), tmp_path / "net")
    options = ["--checkpoint", str(checkpoint), "--output", "out", "--size", "8"]
    assert main(["interpolation", *options, "--pairs", "1", "--pair", "0", "40", "--count", "3", "--gif"]) == 0
    assert "between the features of two images" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "interpolation.json").read_text())
    assert len(found["pairs"]) == 1
    assert len(found["pairs"][0]["steps"]) == 3
    assert found["pairs"][0]["end_error"] < 1e-4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"interpolation.{ending}" for ending in ("json", "png", "svg")),
        "interpolation-1.gif",
    }
    assert main(["interpolation", *options, "--pair", "0", "355"]) == 2
    assert capsys.readouterr().err == "error: the validation images have the numbers 0 ... 354, got 355\n"
