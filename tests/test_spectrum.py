"""Figure 4: singular values of the features' differential, against whole matrices and values that are known."""

import json

import pytest
import torch

import zoo
from invertible import PadSplit
from tests.zoo_networks import randomize
from zoo.analysis import Jacobian, Spectrum, draw_spectra, largest_singular_values, singular_values, spectrum_cost
from zoo.analysis.__main__ import main
from zoo.analysis.spectrum import _rows, largest_fitting, say_cost
from zoo.errors import InputError
from zoo.irevnet import IRevNet
from zoo.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("digits_once")


def linear(values, rows=None):
    """The Jacobian of a linear map with these singular values, on a space of so many dimensions."""
    count = len(values)
    left = torch.linalg.qr(torch.randn(rows or count, count)).Q
    right = torch.linalg.qr(torch.randn(count, count)).Q
    matrix = left @ torch.diag(torch.as_tensor(values)) @ right.mT
    return Jacobian(lambda x: x @ matrix.mT, torch.randn(1, count), block=8)


def network(size=8, blocks=(2, 2), **options):
    """In eval, with statistics and weights that are not those of initialisation."""
    net = randomize(zoo.create("irevnet_small", num_classes=2, blocks=blocks, **options), 0.3)
    net.features(torch.rand(16, 3, size, size))
    return net.eval().requires_grad_(False)


def error(found, values):
    return ((found.double() - values) / values).abs().max()


@pytest.mark.parametrize("k", [1, 5, 40, 100])
@pytest.mark.parametrize("rows", [100, 130])
def test_a_linear_map_has_the_singular_values_it_is_made_of(k, rows):
    values = torch.linspace(3, -3, 100, dtype=torch.float64).exp()
    found = largest_singular_values(linear(values.float(), rows), k)
    assert error(found.values, values[:k]) < 1e-4
    assert abs(found.energy - values.square().sum()) < max(5 * found.energy_error, 1e-4 * found.energy)


@pytest.mark.parametrize("values", [[1.0] * 90, [2.0] * 45 + [1.0] * 45, [3.0] + [1e-3] * 89, [1.0] * 3 + [0.0] * 87])
@pytest.mark.parametrize("k", [1, 60, 90])
def test_repeated_values_and_zeros_are_counted_as_often_as_they_are(values, k):
    found = largest_singular_values(linear(values), k)
    assert torch.allclose(found.values, torch.tensor(values[:k]).double(), atol=1e-5)


def test_every_value_is_within_its_residual_of_the_whole_matrix():
    net = network(16, (1, 1))
    jacobian = Jacobian(net.features, torch.rand(1, 3, 16, 16))
    true = torch.linalg.svdvals(jacobian.dense().double())
    found = largest_singular_values(jacobian, 64)
    assert error(found.values, true[:64]) < 1e-3
    assert bool(((found.values - true[:64]).abs() <= found.residuals + 1e-5 * true[0]).all())
    assert abs(found.energy / float(true.square().sum()) - 1) < 0.1


@pytest.mark.parametrize("linearize", [False, True])
def test_the_products_are_those_of_the_matrix_that_autograd_gives(linearize):
    net = network(blocks=(1,)).double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    jacobian = Jacobian(net.features, x, linearize=linearize)
    expected = torch.autograd.functional.jacobian(net.features, x).reshape(192, 192)
    assert torch.allclose(jacobian.dense(), expected, atol=1e-12)
    u = torch.randn(3, 192, dtype=torch.float64)
    assert torch.allclose(jacobian.transposed_times(u), u @ expected, atol=1e-12)


def test_all_values_and_both_ends_agree_and_their_logarithms_sum_to_zero():
    net, x = network(16, (1, 1)), torch.rand(1, 3, 16, 16)
    net.grid = "exact"
    every = singular_values(net, x, double=True)
    ends = singular_values(net, x, k=50, smallest=8)
    assert every.complete
    assert not ends.complete
    assert abs(every.log_determinant) < 1e-9
    assert error(torch.tensor(ends.largest), torch.tensor(every.largest[:50], dtype=torch.float64)) < 1e-3
    least = torch.tensor(every.largest[::-1][:8], dtype=torch.float64)
    assert error(torch.tensor(ends.smallest), least) < 1e-3
    assert abs(ends.condition / every.condition - 1) < 1e-3
    assert net.grid is not None


def test_shares_of_the_energy_and_how_many_values_carry_them():
    found = Spectrum((3.0, 2.0, 1.0), (), 3, 14.0, 0.0, 0.0, None)
    assert found.cumulative() == pytest.approx([9 / 14, 13 / 14, 1])
    assert (found.carrying(0.5), found.carrying(0.7), found.carrying(1.0)) == (1, 2, 3)
    assert found.share(4) is None
    assert Spectrum((3.0,), (), 3, 14.0, 0.0, 0.0, None).carrying(0.9) is None


def test_the_table_has_the_shares_of_the_dimension_that_the_paper_names():
    found = Spectrum((2.0,) + (1.0,) * 1504, (), 1505, 1508.0, 0.0, 0.0, None)
    rows = dict(_rows([found]))
    assert rows["energy in 10, 0.66 % of the values"] == f"{100 * 13 / 1508:.1f} %"
    assert rows["energy in 100, 6.6 % of the values"] == f"{100 * 103 / 1508:.1f} %"
    assert rows["values with 80% of it"] == "1204"


def test_an_injective_network_has_no_log_determinant_and_no_smallest_values():
    options = {"blocks": (1, 1), "channels": (4, 16), "strides": (1, 2), "size_divisor": 2}
    net = IRevNet([PadSplit(3, 8)], 8, num_classes=2, **options).eval()
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(InputError, match="the smallest singular values come from the inverse of a bijective network"):
        singular_values(net, x, k=2, smallest=1)
    found = singular_values(net, x)
    assert found.dimension == len(found.largest) == 48
    assert found.log_determinant is None
    assert singular_values(net, x, k=2).smallest == ()


@pytest.mark.parametrize("k", [0, 193])
def test_a_number_of_values_that_there_is_not_is_refused(k):
    with pytest.raises(InputError, match=r"k must be in 1 ... 192, the dimension of the image, got"):
        singular_values(network(), torch.rand(1, 3, 8, 8), k=k)
    with pytest.raises(ValueError, match=r"largest_singular_values: k must be in 1 ... 3, got 4"):
        largest_singular_values(linear([1.0, 1.0, 1.0]), 4)


def test_what_does_not_fit_is_refused_with_a_k_that_does(monkeypatch, capsys):
    from rich.console import Console

    net, x = network(16), torch.rand(1, 3, 16, 16)
    cost = spectrum_cost(net, x, k=200)
    assert cost.memory > 200 * 3 * 2 * 768 * 4
    monkeypatch.setattr("zoo.analysis.spectrum.free_memory", lambda device: cost.memory // 2)
    with pytest.raises(InputError, match=r"the spectrum takes about .* GiB are free; --k \d+ fits"):
        say_cost(Console(), net, x, 200, 1, double=False, device=x.device)
    assert "for each of 1 images" in capsys.readouterr().out
    fits = largest_fitting(net, x, 200, cost.memory // 2, double=False)
    assert 0 < fits < 200
    assert spectrum_cost(net, x, k=fits).memory <= cost.memory // 2
    assert largest_fitting(net, x, 200, 10, double=False) == 0


def test_the_command_writes_numbers_and_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_pretrained(network(blocks=(1, 1)), tmp_path / "net")
    options = ["--output", str(tmp_path / "out"), "--size", "8", "--images", "2", "--k", "10"]
    assert main(["spectrum", "--checkpoint", str(checkpoint / "model.safetensors"), *options]) == 0
    assert "condition number" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert found["model"] == "irevnet_small"
    assert found["data"] == "digits"
    assert [len(each["largest"]) for each in found["spectra"]] == [10, 10]
    assert (tmp_path / "out" / "spectrum.png").stat().st_size > 1000
    assert "</svg>" in (tmp_path / "out" / "spectrum.svg").read_text()
    for wrong, message in (
        (["--k", "193"], "error: k must be in 1 ... 192, the dimension of the image, got 193\n"),
        (["--size", "9"], "error: irevnet_small needs a size that 8 divides, got 9\n"),
        (["--data", "nowhere"], "error: no such folder: nowhere\n"),
    ):
        assert main(["spectrum", "--checkpoint", str(checkpoint), *options, *wrong]) == 2
        assert capsys.readouterr().err == message
    other = save_pretrained(zoo.create("resnet_small", num_classes=2), tmp_path / "resnet")
    assert main(["spectrum", "--checkpoint", str(other), *options]) == 2
    assert "error: resnet_small has no inverse; this analysis is of i-RevNets" in capsys.readouterr().err
    assert main(["spectrum", "--checkpoint", "nothing"]) == 2
    assert capsys.readouterr().err == "error: no such checkpoint: nothing\n"


def test_the_picture_has_a_line_for_each_image():
    both = [Spectrum((2.0, 1.0), (0.5,), 3, 6.0, 0.1, 0.0, None)] * 2
    axes = draw_spectra(both).axes
    assert [line.get_label() for line in axes[1].lines][:2] == ["image 1", "image 2"]
    assert all(each.get_xlabel() and each.get_ylabel() for each in axes)


@pytest.mark.slow
def test_the_top_two_hundred_of_a_network_at_32_pixels():
    """The oracle of the whole: svdvals of the dense Jacobian, d = 3072."""
    net = randomize(zoo.create("irevnet_small", num_classes=10), 0.1)
    net.features(torch.rand(16, 3, 32, 32))
    jacobian = Jacobian(net.eval().requires_grad_(False).features, torch.rand(1, 3, 32, 32))
    true = torch.linalg.svdvals(jacobian.dense()).double()
    found = largest_singular_values(jacobian, 200)
    assert error(found.values, true[:200]) < 1e-3
    assert abs(float(true.log().sum())) < 0.1
