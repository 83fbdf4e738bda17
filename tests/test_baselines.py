"""The networks that i-RevNets are compared with, the i-RevNet for CIFAR, and the trainer, which takes all of them."""

import dataclasses
import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision import models

import zoo
from invertible import Coupling, PadSplit, Reconstruct, Store
from tests.distributed import on_two, one_of_two
from zoo.building import build
from zoo.digits import write_digits
from zoo.distributed import World, parallel
from zoo.dry_run import costs, size_of
from zoo.errors import InputError
from zoo.learner import Learner
from zoo.progress import Reporter
from zoo.recipes import RECIPES
from zoo.resnet import ResidualUnit
from zoo.run import Run
from zoo.training import Trainer

DIGITS = RECIPES["digits"]


def meta(name, **options):
    with torch.device("meta"):
        return zoo.create(name, **options)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("resnet50", 1000, 25_557_032),
        ("resnet101", 1000, 44_549_160),
        ("resnet_small", 10, 464_154),
        ("resnet_small", 1000, 528_504),
        ("irevnet_cifar", 10, 6_274_826),
        ("irevnet_cifar", 100, 6_320_996),
        ("irevnet_small", 10, 484_738),
    ],
)
def test_parameters(name, classes, count):
    assert sum(p.numel() for p in meta(name, num_classes=classes).parameters()) == count


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_they_are_torchvisions(name):
    net = meta(name, num_classes=7)
    with torch.device("meta"):
        own = getattr(models, name)(num_classes=7)
    assert type(net) is type(own)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}
    assert net(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 7)


def test_the_small_resnet_by_hand():
    """He et al.: x + F(x), activated before each convolution, averages and zeros where the shape changes."""
    net = zoo.resnet_small(num_classes=10).double().eval()
    x = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    h = net.stem[1](nn.functional.conv2d(x, net.stem[0].weight, stride=2, padding=1)).relu()
    widths = []
    for unit in net.units:
        inner = unit.function(h)
        if inner.shape != h.shape:
            mean = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
            zeros = torch.zeros_like(mean[:, : mean.shape[1] // 2])
            h = torch.cat([zeros, mean, zeros], 1)
        h = h + inner
        widths.append(h.shape[1:])
    assert widths == [(16, 16, 24)] * 5 + [(32, 8, 12)] * 5 + [(64, 4, 6)] * 5
    torch.testing.assert_close(net.features(x), h)
    torch.testing.assert_close(net(x), net.head[-1](net.head[0](h).relu().mean((2, 3))))
    starts = [isinstance(unit.function[0], nn.Conv2d) for unit in net.units]
    assert starts == [True] + [False] * 14
    assert all(isinstance(unit, ResidualUnit) for unit in net.units)


def test_parameters_are_registered_in_the_order_in_which_data_meets_them():
    net, met = zoo.resnet_small(num_classes=3), []
    for name, module in net.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: met.append(name))
    net(torch.rand(2, 3, 32, 32)).sum().backward()
    assert met == list(dict.fromkeys(name.rpartition(".")[0] for name, _ in net.named_parameters()))
    assert all(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n.endswith("weight"))


REFUSALS = {
    "ResNet: height and width must be divisible by 8, got a tensor of shape (2, 3, 30, 32).": (
        lambda: zoo.resnet_small()(torch.zeros(2, 3, 30, 32))
    ),
    "ResNet: expected images of shape (batch, 3, height, width), got a tensor of shape (2, 1, 32, 32).": (
        lambda: zoo.resnet_small()(torch.zeros(2, 1, 32, 32))
    ),
    "ResNet: in training mode batch norm needs more than one value per channel in the last stage, "
    "got a tensor of shape (1, 3, 8, 8).": lambda: zoo.resnet_small()(torch.zeros(1, 3, 8, 8)),
    "ResNet: expected floating-point images, got dtype torch.uint8. Scale them: x / 255.": (
        lambda: zoo.resnet_small()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    ),
    "ResNet: num_classes must be at least 0, got -1.": lambda: zoo.resnet_small(num_classes=-1),
    "ResNet: num_classes must be an integer, got 2.5.": lambda: zoo.resnet_small(num_classes=2.5),
    "resnet50: num_classes must be an integer, got '3'.": lambda: zoo.resnet50(num_classes="3"),
    "ResNet: in_channels must be at least 1, got 0.": lambda: zoo.resnet_small(in_channels=0),
    "resnet50: num_classes must be at least 0, got -1.": lambda: zoo.resnet50(num_classes=-1),
    "IRevNet: dropout must be at least 0 and less than 1, got 1.": lambda: zoo.irevnet_cifar(dropout=1),
    "IRevNet: height and width must be divisible by 4, got a tensor of shape (2, 3, 30, 32).": (
        lambda: zoo.irevnet_cifar()(torch.zeros(2, 3, 30, 32))
    ),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        REFUSALS[words]()


# The i-RevNet for CIFAR


def released_count(blocks, channels, strides, classes):
    """The parameters of the released code's network: 3 by 3 kernels, a fourth of the channels in the middle."""
    total, width = 0, channels[0]
    for stage, (count, out, stride) in enumerate(zip(blocks, channels, strides, strict=True)):
        for i in range(count):
            middle = out // 4
            total += 0 if stage == i == 0 else 2 * width
            total += 9 * (width * middle + middle * middle + middle * out) + 4 * middle
            width = out
        assert stride in {1, 2}
    return total + 4 * width + 2 * width * classes + classes


def test_the_structure_for_cifar():
    net = meta("irevnet_cifar")
    assert released_count((18, 18, 18), (16, 64, 256), (1, 2, 2), 10) == 6_274_826
    assert isinstance(net.body[0], PadSplit)
    couplings = [layer for layer in net.body if isinstance(layer, Coupling)]
    assert len(couplings) == 54
    assert [i for i, each in enumerate(couplings) if each.downsample is not None] == [18, 36]
    whole = [nn.BatchNorm2d, nn.ReLU, nn.Conv2d] * 2 + [nn.Dropout, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    for i, each in enumerate(couplings):
        assert [type(part) for part in each.function] == (whole[2:] if i == 0 else whole)
        assert {p.kernel_size for p in each.function if isinstance(p, nn.Conv2d)} == {(3, 3)}
        assert each.function.dropout.p == 0.1
    assert not net.body.bijective
    assert net.size_divisor == 4


def test_its_features_against_the_released_equation():
    """A merge of the released blocks: x2, and x1 + F x2; the zeros are where PadSplit puts them."""
    net = zoo.irevnet_cifar().double().eval()
    image = torch.rand(2, 3, 32, 16, dtype=torch.float64)
    zeros = torch.zeros(2, 15, 32, 16, dtype=torch.float64)
    x1, x2 = torch.cat([image[:, :2], zeros[:, :14]], 1), torch.cat([image[:, 2:], zeros], 1)

    def psi(x):
        return torch.cat([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], dim=1)

    for j, block in enumerate(net.body[1:-1]):
        moved = block.function(x2)
        if j in {18, 36}:
            x1, x2 = psi(x1), psi(x2)
        x1, x2 = x2, x1 + moved
    assert torch.equal(net.features(image), torch.cat([x1, x2], 1))
    torch.testing.assert_close(net.inverse(net.features(image)), image)


def test_dropout_changes_no_key_and_is_replayed():
    plain, net = zoo.irevnet_cifar(dropout=0.0), zoo.irevnet_cifar()
    assert list(plain.state_dict()) == list(net.state_dict())
    plain.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain.eval()(x), net.eval()(x))
    net.train()
    found = []
    for strategy in (Store(), Reconstruct()):
        net.grid, net.backprop = "exact", strategy
        net.zero_grad()
        torch.manual_seed(3)
        net(x).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert net.body.stochastic


# The trainer


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(write_digits(tmp_path_factory.mktemp("digits")))


@pytest.mark.parametrize("name", ["resnet_small", pytest.param("revnet38", marks=pytest.mark.slow)])
def test_a_run_on_the_digits(digits, tmp_path, name):
    recipe = dataclasses.replace(DIGITS, model=name, epochs=1, batch_size=360, size=16, resize=16, log_every=1)
    found = []
    for backprop in ("reconstruct", "store") if name == "revnet38" else ("reconstruct",):
        run = Run(dataclasses.replace(recipe, backprop=backprop), digits)
        trainer = Trainer(run, tmp_path / backprop)
        trainer.fit(Reporter(Console(file=io.StringIO()), total=trainer.total))
        assert trainer.finished
        assert trainer.invert() is None
        assert trainer.books.drift == (0 if (name, backprop) == ("revnet38", "reconstruct") else None)
        found.append((trainer.evaluate(), [p.detach() for p in trainer.net.parameters()], trainer.peak))
        resumed = Trainer(run, tmp_path / backprop)
        assert resumed.restore()
        assert all(torch.equal(a, b) for a, b in zip(resumed.net.parameters(), found[-1][1], strict=True))
    if len(found) == 2:
        assert found[0][0] == found[1][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
        assert found[0][2] < found[1][2]


@pytest.mark.parametrize("name", ["resnet50", "resnet_small", "revnet56", "irevnet_small"])
def test_a_dry_run(name):
    """Every network says what each strategy keeps; one without chains of invertible layers keeps everything."""
    run = Run(dataclasses.replace(DIGITS, model=name))
    size = size_of(run, 10)
    assert size.parameters == sum(p.numel() for p in meta(name, num_classes=10).parameters())
    assert size.flops > 10**6
    kept = dict(costs(run, 10))
    assert list(kept) == (["store"] if name.startswith("resnet") else ["store", "recompute", "reconstruct"])
    assert name.startswith("resnet") or kept["reconstruct"].per_image < kept["store"].per_image
    if not name.startswith("irevnet"):  # these are planned, under autocast too
        assert not dict(costs(Run(dataclasses.replace(DIGITS, model=name, autocast="bf16")), 10))


@pytest.mark.slow
def test_a_dry_run_with_a_budget():
    run = Run(dataclasses.replace(DIGITS, model="revnet38"), budget=2**30)
    kept = dict(costs(run, 10))
    assert kept["budget of 1.0 GiB"] == kept["store"]


def test_sizes_and_batches_that_do_not_fit(digits, tmp_path):
    run = Run(dataclasses.replace(DIGITS, model="resnet_small", size=20, resize=20), digits)
    with pytest.raises(InputError, match="resnet_small needs a size that 8 divides, got 20"):
        Trainer(run, tmp_path)
    small = dataclasses.replace(DIGITS, model="revnet164", size=4, resize=4, batch_size=1)
    with pytest.raises(InputError, match="revnet164 needs a batch of two or more at size 4"):
        Trainer(Run(small, digits), tmp_path)


def test_a_network_that_does_not_classify(digits, tmp_path):
    with pytest.raises(InputError, match="iunet has logits for each pixel; what is trained here classifies images"):
        Trainer(Run(dataclasses.replace(DIGITS, model="iunet"), digits), tmp_path)


def test_a_network_without_buffers(digits, tmp_path):
    """It has layer norms only; a step that is taken back, for its loss is not finite, has none to put back."""
    options = {"dim": 12, "depth": 2, "heads": 3, "patch_size": 8, "image_size": 16}
    recipe = dataclasses.replace(DIGITS, model="revvit_s", model_options=options, size=16, resize=16, epochs=1)
    trainer = Trainer(Run(dataclasses.replace(recipe, batch_size=360), digits), tmp_path)
    with torch.no_grad():
        next(trainer.net.parameters()).fill_(torch.nan)
    trainer.fit(Reporter(Console(file=io.StringIO()), total=trainer.total))
    assert trainer.books.skipped == trainer.total > 1


def one_step(rank, kind):
    """Gradients of a step of two processes, whole, and the drift."""
    torch.manual_seed(0)
    net = zoo.revnet38()
    net.backprop, net.grid = Reconstruct(on_drift="record"), "exact"
    net.eval()  # batch norm of each process by itself, so that one process can tell
    model = parallel(net, kind, one_of_two(rank), torch.device("cpu"))
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    grads = [p.grad if kind == "ddp" else p.grad.full_tensor() for p in net.parameters()]
    return grads, net.drift


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_take_the_step_of_one(kind):
    (grads, drift), (others, _) = on_two(one_step, kind)
    torch.manual_seed(0)
    net = zoo.revnet38().eval()
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    net(x).square().mean().backward()
    torch.testing.assert_close(grads, [p.grad for p in net.parameters()], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    assert drift == 0


def test_what_the_trainer_sets_is_on_every_chain():
    run = Run(dataclasses.replace(DIGITS, model="revnet38"), budget=10**8)
    learner = Learner(run, 10, torch.device("cpu"), World())
    assert learner.net.backprop == run.strategy
    assert {str(chain.grid) for chain in learner.net.chains} == {str(learner.net.grid)} != {"None"}
    assert build(run.recipe, num_classes=4).num_classes == 4
