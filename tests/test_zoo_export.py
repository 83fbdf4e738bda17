"""Every classifier of the zoo can be exported in both directions: by torch.export, and as ONNX, for any batch size."""

import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import zoo
from invertible import Coupling, Inverse, Sequential
from invertible._value import leaves, map_value
from tests.zoo_networks import randomize

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # torch 2.11's own exporter


@dataclass
class Thin:
    """How to make a small network by a builder: its options, the shape of an image, fewer blocks per stage if cut."""

    options: dict = field(default_factory=dict)
    image: tuple = (3, 32, 32)
    cut: bool = False


THIN = {
    "irevnet_a": Thin({"num_classes": 3, "split_channels": 48}, cut=True),
    "irevnet_b": Thin({"num_classes": 3}, cut=True),
    "irevnet_cifar": Thin({"num_classes": 3}, (3, 8, 8), cut=True),
    "irevnet_small": Thin({"num_classes": 3, "blocks": (1,)}, (3, 8, 8)),
    "iunet": Thin({"channels": 8, "blocks": (1, 1)}, (3, 8, 8)),
    "resnet50": Thin({"num_classes": 3}, cut=True),
    "resnet101": Thin({"num_classes": 3}, cut=True),
    "resnet_small": Thin({"num_classes": 3}, (3, 16, 16)),
    "revnet38": Thin({"num_classes": 3}, (3, 8, 8), cut=True),
    "revnet56": Thin({"num_classes": 3}, cut=True),
    "revnet104": Thin({"num_classes": 3}, cut=True),
    "revnet110": Thin({"num_classes": 3}, (3, 8, 8), cut=True),
    "revnet164": Thin({"num_classes": 3}, (3, 8, 8), cut=True),
    "revvit_s": Thin(
        {"num_classes": 3, "dim": 12, "depth": 1, "heads": 3, "patch_size": 8, "image_size": 16}, (3, 16, 16)
    ),
}
ON_GRID = ["irevnet_small", "iunet", "revnet38", "revvit_s"]  # one of each kind: they take time

FAST = [*ON_GRID, "resnet_small"]

every_model = pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in zoo.names(kind="classifier")],
)


def test_each_kind_is_tried_on_a_grid():
    """Networks without invertible layers have no grid."""
    with torch.device("meta"):
        nets = {name: zoo.create(name, **THIN[name].options) for name in THIN}
    missing = {type(net) for net in nets.values() if chains(net)} - {type(nets[name]) for name in ON_GRID}
    assert not missing, f"add a name of {missing} to ON_GRID in tests/test_zoo_export.py"


def thin(name):
    """A small network of the registry's builder, in eval mode, and three images."""
    if name not in THIN:
        line = f'"{name}": Thin({{"num_classes": 3}}, (3, 32, 32)),'
        pytest.fail(f"add a line with options that make it small to THIN in tests/test_zoo_export.py: {line}")
    how = THIN[name]
    net = zoo.create(name, **how.options)
    if how.cut:
        cut(net)
    return randomize(net, 0.02).eval().requires_grad_(False), torch.rand(3, *how.image)


def cut(net):
    """Leaves out blocks that keep the shape of their streams."""
    if isinstance(net, zoo.IRevNet):
        widths, kept = set(), []
        for layer in net.body:
            width = layer.function[-1].out_channels if isinstance(layer, Coupling) else None
            if width is None or width not in widths:
                kept.append(layer)
            widths.add(width)
        net.body = Sequential(*kept)
    elif isinstance(net, zoo.RevNet):
        for stage in net.stages:
            stage.body = stage.body[:2]
    else:  # torchvision's
        for key in ("layer1", "layer2", "layer3", "layer4"):
            setattr(net, key, getattr(net, key)[:1])


def chains(net):
    """Its chains of invertible layers."""
    found = getattr(net, "chains", None)
    return found if found is not None else [net.body] if hasattr(net, "body") else []


class Method(nn.Module):
    """A method as a module's forward."""

    def __init__(self, owner, name):
        super().__init__()
        self.owner, self.name = owner, name

    def forward(self, value):
        return getattr(self.owner, self.name)(value)


class RoundTrip(nn.Module):
    """The logits, what enters each chain, and what is recovered of it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        met = []
        hooks = [chain.register_forward_hook(lambda *values: met.append(values)) for chain in chains(self.net)]
        logits = self.net(x)
        for hook in hooks:
            hook.remove()
        entered = tuple(value for _, (value,), _ in met)
        return logits, entered, tuple(chain.inverse(y) for chain, _, y in met)


def inverses(net, x):
    """The network's inverse, or those of its chains, and what they take."""
    if hasattr(net, "inverse"):
        return [(Method(net, "inverse"), net.features(x))]
    found, hooks = [], []
    for chain in chains(net):
        module = Inverse(chain) if chain.bijective else Method(chain, "inverse")
        hooks.append(chain.register_forward_hook(lambda *values, module=module: found.append((module, values[-1]))))
    net(x)
    for hook in hooks:
        hook.remove()
    return found


def batch_of(value, size):
    """Samples that differ."""
    each = torch.linspace(1, 0.5, size)
    repeated = map_value(lambda t: torch.cat([t] * size)[:size], value)
    return map_value(lambda t: (t * each.view(-1, *[1] * (t.ndim - 1))).to(t.dtype), repeated)


def exported(module, value):
    """By torch.export, of a batch of 3 for any: not strict, which gives the same and takes longer."""
    dynamic = map_value(lambda _: {0: torch.export.Dim("batch", min=2, max=64)}, value)
    return torch.export.export(module, (value,), dynamic_shapes=(dynamic,), strict=False)


def onnx_of(program):
    """A session of onnxruntime, and the model's size in bytes."""
    buffer = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])


def run_onnx(session, value):
    """What onnxruntime computes, for a batch of any size."""
    inputs = session.get_inputs()
    assert all(isinstance(each.shape[0], str) for each in inputs), "the batch is fixed"
    found = session.run(None, {each.name: t.numpy() for each, t in zip(inputs, leaves(value), strict=True)})
    return [torch.from_numpy(np.asarray(each)) for each in found]


def assert_close(found, expected):
    """To rounding, relative to the largest value."""
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * max(b.abs().max().item(), 1.0))


def check(module, value, sizes=(1, 5)):
    """The exported program and the ONNX model compute what the module does."""
    program = exported(module, value)
    five = batch_of(value, 5)
    assert_close(program.module(check_guards=False)(five), module(five))
    session = onnx_of(program)
    for size in sizes:
        other = batch_of(value, size)
        assert_close(tuple(run_onnx(session, other)), tuple(leaves(module(other))))


@every_model
def test_forward(name):
    net, x = thin(name)
    check(net, x)


@every_model
def test_inverse(name):
    net, x = thin(name)
    found = inverses(net, x)
    assert len(found) == len(chains(net))
    for module, value in found:
        check(module, value)


@pytest.mark.parametrize("name", ON_GRID)
def test_on_a_grid_the_exported_inverse_is_exact_too(name):
    """The streams are float64, and what onnxruntime recovers is what entered, bit for bit."""
    net, x = thin(name)
    net.grid = "exact"
    chain = chains(net)[0]
    module = RoundTrip(net)
    five = batch_of(x, 5)
    program = exported(module, x)
    expected = module(five)
    for found in (module(five), program.module(check_guards=False)(five), run_onnx(onnx_of(program), five)):
        each = list(leaves(tuple(found)))
        half = (len(each) - 1) // 2
        assert_close(each[0], expected[0])
        for entered, recovered in zip(each[1 : 1 + half], each[1 + half :], strict=True):
            assert recovered.dtype == torch.float64
            assert torch.equal(recovered, chain.snap(entered))


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"__name__": "export"}
    exec(compile(block, "docs/export.md", "exec"), names)  # noqa: S102
    found = onnxruntime.InferenceSession("forward.onnx").run(None, {"x": names["image"].numpy()})
    assert_close(torch.from_numpy(found[0]), names["net"](names["image"]).detach())


@pytest.mark.slow
def test_the_papers_network_at_its_full_size():
    net = randomize(zoo.create("irevnet_b"), 1e-3).eval().requires_grad_(False)
    x = torch.rand(2, 3, 224, 224)
    check(net, x, sizes=(3,))
    ((module, features),) = inverses(net, x)
    check(module, features, sizes=(3,))
