"""Equal logits and different pixels: the projection against all choices of active units, and the logits anew."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import zoo
from tests.zoo_networks import randomize
from zoo.analysis import draw_metamers, find_metamers, head_sees, nearest_sums, open_subject, rectified_projection
from zoo.analysis.__main__ import main
from zoo.analysis.metamers import _numbers
from zoo.augment import Preparation
from zoo.errors import InputError
from zoo.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("digits_once")


def network(grid="exact", **options):
    """In train, with statistics and weights that are not those of initialisation."""
    net = randomize(zoo.create("irevnet_small", num_classes=3, blocks=(1, 1), **options), 0.3)
    for _ in range(20):
        net(torch.rand(16, 3, 16, 16))
    net.grid = grid
    return net.requires_grad_(False)


def images(count=2):
    return (torch.randint(0, 256, (2 * count, 3, 16, 16)) / 255).chunk(2)


def simplex(z, total):
    """The nearest point with values from 0 on and this sum: by trying every set of positive ones."""
    best = None
    for size in range(1, len(z) + 1):
        for chosen in itertools.combinations(range(len(z)), size):
            at = list(chosen)
            y = torch.zeros_like(z)
            y[at] = z[at] + (total - z[at].sum()) / size
            if bool((y >= 0).all()) and (best is None or (y - z).norm() < (best - z).norm()):
                best = y
    return best


def by_trying(z, total):
    """The distance to the set: for each choice of active units these go to a simplex, the others end at most at 0."""
    distances = [float(z.relu().norm())] if total == 0 else []
    for size in range(1, len(z) + 1):
        for chosen in itertools.combinations(range(len(z)), size):
            at = list(chosen)
            y = z.clamp(max=0)
            y[at] = simplex(z[at], total)
            distances.append(float((y - z).norm()))
    return min(distances)


def test_the_projection_is_the_nearest_of_all_choices_of_active_units():
    generator = torch.Generator().manual_seed(1)
    for i in range(60):
        z = torch.randn(1 + i % 5, generator=generator, dtype=torch.float64) - (i % 3 - 1)
        total = 0.0 if i % 7 == 0 else float(3 * torch.rand((), generator=generator))
        y = rectified_projection(z, torch.tensor(total, dtype=torch.float64))
        assert float(y.relu().sum()) == pytest.approx(total, abs=1e-12)
        assert float((y - z).norm()) == pytest.approx(by_trying(z, total), abs=1e-9)


def test_the_projection_leaves_alone_what_has_the_sum_and_works_on_batches():
    z = torch.tensor([[1.0, -2.0, 0.5], [-1.0, -1.0, -3.0], [0.0, 0.0, -1.0]])
    assert torch.equal(rectified_projection(z, z.relu().sum(-1)), z)
    found = rectified_projection(z, torch.tensor([0.0, 2.0, 1.0]))
    assert torch.equal(found[0], torch.tensor([0.0, -2.0, 0.0]))
    assert torch.equal(found[1], torch.tensor([1.0, 1.0, -3.0]))  # two by 2 cost less than one by 3
    assert torch.equal(found[2], torch.tensor([0.5, 0.5, -1.0]))  # equal values rise together
    assert torch.equal(rectified_projection(z[None], torch.zeros(1, 3)), z[None].clamp(max=0))
    with pytest.raises(ValueError, match="rectified_projection: a sum of rectified values is 0 at least"):
        rectified_projection(z, torch.tensor([0.0, -1.0, 0.0]))


def test_the_nearest_sums_are_those_that_an_optimiser_finds():
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        sums, wanted = 2 * torch.rand(2, 1, 6, generator=generator, dtype=torch.float64)
        matrix = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        ease = torch.rand(1, 6, generator=generator, dtype=torch.float64) + 0.1
        found = nearest_sums(sums, wanted, matrix, ease)
        assert torch.allclose(found @ matrix.mT, wanted @ matrix.mT, atol=1e-10)
        assert float(found.min()) >= 0
        w, target, sigma = matrix.numpy(), (wanted @ matrix.mT)[0].numpy(), sums[0].numpy()
        weight = 1 / (2 * ease[0].numpy())
        best = minimize(
            lambda s, weight=weight, sigma=sigma: float((weight * (s - sigma) ** 2).sum()),
            wanted[0].numpy(),
            jac=lambda s, weight=weight, sigma=sigma: 2 * weight * (s - sigma),
            bounds=[(0, None)] * 6,
            constraints={"type": "eq", "fun": lambda s, w=w, target=target: w @ s - target, "jac": lambda s, w=w: w},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert np.allclose(found[0].numpy(), best.x, atol=1e-5)


def test_sums_that_cannot_change_stay():
    sums = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64)
    matrix = torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]], dtype=torch.float64)  # of rank 1
    found = nearest_sums(sums, wanted, matrix, torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64))
    assert torch.allclose(found @ matrix.mT, wanted @ matrix.mT)
    assert torch.allclose(found, torch.tensor([[1.0, 2.8, 1.6]], dtype=torch.float64))


@pytest.mark.parametrize("keep", ["logits", "pooled"])
@pytest.mark.parametrize("grid", ["exact", None])
def test_the_logits_are_those_of_one_image_and_the_pixels_others(keep, grid):
    net, (x, other) = network(grid), images()
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.weight[::3] *= -1  # the head sees some channels upside down
    net.head[0].weight[1] = 0  # and one not at all
    found = find_metamers(net, x, other, keep=keep)
    assert net.training
    net.eval()
    assert torch.equal(found.logits, net(x))
    assert torch.equal(found.found, net(found.images if grid else found.images.float()))
    assert float(found.differences.max()) < (2e-5 if grid is None else 5e-6) * float(found.logits.abs().max() + 1)
    assert float((found.images - x).abs().max()) > 0.05
    assert float((net(x) - net(other)).abs().max()) > 1e-3
    pooled = [net.head[:4](net.features(each).float()) for each in (x, found.images)]
    assert torch.allclose(*pooled, atol=1e-4) == (keep == "pooled")
    own, approached, kept = (net.features(each).double() for each in (found.images, other, x))
    distance = (own - approached).flatten(1).norm(dim=1)
    assert torch.allclose(found.moved, distance / (kept - approached).flatten(1).norm(dim=1), rtol=1e-3)
    assert torch.equal(own[:, 1], approached[:, 1]) if grid else torch.allclose(own[:, 1], approached[:, 1], atol=1e-3)


def test_to_keep_the_logits_alone_moves_less():
    net, (x, other) = network(), images(4)
    logits, pooled = (find_metamers(net, x, other, keep=keep).moved for keep in ("logits", "pooled"))
    assert bool((logits < pooled).all())
    assert float(pooled.max()) < 1  # the image whose pooled values are kept is one of those to choose from


def test_the_head_sees_what_it_says():
    net, (x, _) = network(None).eval(), images()
    scale, shift = head_sees(net)
    features = net.features(x)
    z = scale[:, None, None] * features.double() + shift[:, None, None]
    assert torch.allclose(z.relu().mean((2, 3)).float(), net.head[:4](features), atol=1e-5)


def test_without_a_classifier_pooled_features_are_kept():
    net = randomize(zoo.create("irevnet_small", num_classes=0, blocks=(1, 1)), 0.3).eval().requires_grad_(False)
    x, other = images()
    assert torch.equal(find_metamers(net, x, other).images, find_metamers(net, x, other, keep="pooled").images)
    assert float(find_metamers(net, x, other).differences.max()) < 1e-4


def test_an_image_is_its_own_metamer():
    net, (x, _) = network(), images()
    for keep in ("logits", "pooled"):
        found = find_metamers(net, x, x, keep=keep)
        assert torch.allclose(found.images, x.double(), atol=1e-8)
        assert found.moved.tolist() == [0, 0]


def test_wrong_networks_and_images_are_refused():
    net, (x, other) = network(), images()
    with pytest.raises(InputError, match=r"the images must have one shape, got \(2, 3, 16, 16\) and \(2, 3, 16, 8\)"):
        find_metamers(net, x, other[..., :8])
    with pytest.raises(ValueError, match="find_metamers: keep must be one of logits, pooled, got 'class'"):
        find_metamers(net, x, other, keep="class")
    for classes in (0, 2):
        unet = zoo.create("iunet", num_classes=classes, channels=4, blocks=(1, 1))
        with pytest.raises(
            InputError, match="the head of IUNet does not average rectified features, and this analysis"
        ):
            find_metamers(unet, x, other)
    with pytest.raises(InputError, match="this IRevNet is injective: features that are moved may be those of no image"):
        find_metamers(zoo.create("irevnet_cifar", num_classes=2), x, other)


def test_the_picture_has_a_row_for_each_pair():
    x, other = images()
    figure = draw_metamers(x, other, x + 0.5, [["0", "1", "0"], ["a", "b", "c"]])
    assert len(figure.axes) == 10
    assert [axes.get_xlabel() for axes in figure.axes[5:8]] == ["a", "b", "c"]


def test_the_logits_of_a_file_are_those_of_whole_numbers_in_range(tmp_path):
    save_pretrained(network().eval(), tmp_path / "net")
    subject = open_subject(tmp_path / "net", size=16)
    x, other = images(1)
    found = find_metamers(subject.net, x, other)
    shown = [subject.restored(each)[0].double() for each in (x, other, found.images)]
    logits = _numbers(subject, other, found, shown)["logits"]
    pixels, prepare = 255 * shown[2].clamp(0, 1), Preparation(subject.recipe)
    assert float((255 * shown[2] - pixels).abs().max()) > 1
    for key, each in (("clipped", pixels), ("8 bits", pixels.round())):
        assert logits[key] == subject.net(prepare(each[None]))[0].tolist()
    assert len({str(each) for each in logits.values()}) == 5 - (logits["A"] == logits["metamer"])


@pytest.mark.parametrize("classes", [0, 3])
def test_the_command_checks_what_a_file_would_hold(tmp_path, capsys, monkeypatch, classes):
    monkeypatch.chdir(tmp_path)
    net = randomize(zoo.create("irevnet_small", num_classes=classes, blocks=(1, 1)), 0.3).eval()
    checkpoint = save_pretrained(net, tmp_path / "net")
    options = ["metamers", "--checkpoint", str(checkpoint), "--output", "out", "--size", "16"]
    assert main([*options, "--pair", "0", "40"]) == 0
    assert ("metamers with the logits" if classes else "metamers with the pooled features") in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "metamers.json").read_text())["pairs"]
    assert len(found) == 1
    assert set(found[0]["differences"]) == {"B", "metamer", "clipped", "8 bits"}
    assert ("classes" in found[0]) == bool(classes)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"metamers.{e}" for e in ("json", "png", "svg")}
    assert main([*options, "--pair", "0", "355"]) == 2
    assert capsys.readouterr().err == "error: the validation images have the numbers 0 ... 354, got 355\n"
