"""A latent comes back bit for bit, or says what has changed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import invertible as inv
from invertible import Coupling, EnvironmentMismatch, Latent, Sequential
from invertible._value import leaves, map_value
from tests.networks import draw_network
from tests.test_grid import adverse, deep


@settings(max_examples=20)
@given(data=st.data())
def test_drawn_networks_encode_and_come_back(data):
    net, x, condition = draw_network(data.draw, additive=True)
    net.grid = data.draw(st.sampled_from(["exact", "exact32"]))
    net.train(data.draw(st.booleans(), label="train"))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    latent = net.encode(x, condition=condition)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(t.requires_grad for t in leaves(latent.value))
    found = net.inverse(latent, condition=condition)
    for a, b in zip(leaves(found), leaves(net.snap(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_under_autocast_and_in_both_modes(train, autocast):
    net, x = deep(20).train(train), adverse()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        latent = net.encode(x)
        assert torch.equal(net.inverse(latent), net.snap(x))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(net.inverse(net.encode(x)), net.snap(x))


def test_it_is_saved_and_loaded(tmp_path):
    net, x = deep(3), adverse()
    latent = net.encode(x)
    torch.save((latent.value, latent.fingerprint), tmp_path / "latent.pt")
    loaded = Latent(*torch.load(tmp_path / "latent.pt"))
    assert torch.equal(net.inverse(loaded), net.snap(x))
    assert torch.equal(copy.deepcopy(net).inverse(loaded), net.snap(x))


def change_weight(net):
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1e-6


def change_statistics(net):
    next(part for part in net.modules() if isinstance(part, nn.BatchNorm2d)).running_mean += 1e-6


def freeze(net):
    next(net.parameters()).requires_grad_(False)


def set_grid(net):
    net.grid = inv.Grid(41)


CHANGES = {
    "weights": change_weight,
    "buffers": change_statistics,
    "trained": freeze,
    "grid": set_grid,
    "structure": lambda net: setattr(net[3].function, "1", nn.Tanh().eval()),
    "eps": lambda net: setattr(net[3].function[0], "eps", 1e-2),
    "format": lambda net: net.to(memory_format=torch.channels_last),
    "mode": lambda net: net.train(),
    "mixed": lambda net: net[3].train(),
    "compiled": lambda net: net.compile_functions(backend="eager"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_named(name):
    net, x = deep(3).eval(), adverse()
    latent = net.encode(x)
    CHANGES[name](net)
    key = {"buffers": "weights", "mixed": "mode", "format": "weights", "eps": "structure"}.get(name, name)
    words = {
        "weights": "the weights, or",
        "structure": "what the network consists of",
        "trained": "which parameters",
        "compiled": "which functions",
    }
    with pytest.raises(EnvironmentMismatch, match=words.get(key, f"{key} was")) as error:
        net.inverse(latent)
    assert set(error.value.differences) == {key}
    with pytest.warns(UserWarning, match="Sequential: the latent may not come back bit for bit"):
        result = net.inverse(latent, strict=False)
    assert result.shape == x.shape


def test_statistics_that_training_does_not_read_may_change():
    net, x = deep(3).train(), adverse()
    latent = net.encode(x)
    net(x)  # counts them
    assert torch.equal(net.inverse(latent), net.snap(x))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch reads that flag, too
def test_the_context_counts():
    net, x = deep(3).eval(), adverse()
    latent = net.encode(x)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(EnvironmentMismatch, match=r"None, is torch\.bfloat16"):
        net.inverse(latent)
    words = r"torch\.backends\.mkldnn\.enabled was True, is False\. Restore"
    with torch.backends.mkldnn.flags(enabled=False), pytest.raises(EnvironmentMismatch, match=words):
        net.inverse(latent)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    with pytest.raises(EnvironmentMismatch, match=f"threads was {threads}, is {threads + 1}"):
        net.inverse(latent)
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float64)
    with pytest.raises(EnvironmentMismatch, match="default dtype was"):
        net.inverse(latent)
    torch.set_default_dtype(torch.float32)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(EnvironmentMismatch, match="flash_sdp_enabled was True"):
        net.inverse(latent)
    assert torch.equal(net.inverse(latent), net.snap(x))
    moved = Latent(latent.value.contiguous(memory_format=torch.channels_last), latent.fingerprint)
    assert torch.equal(net.inverse(moved), net.snap(x))
    old = Latent(latent.value, {**latent.fingerprint, "torch": "2.0", "device": "cuda"})
    with pytest.raises(EnvironmentMismatch, match=r"torch was 2\.0, is .*; device was cuda, is cpu"):
        net.inverse(old)
    latent.value[0, 0, 0, 0] += 1
    with pytest.raises(EnvironmentMismatch, match="the latent's value changed"):
        net.inverse(latent)


def test_a_batch_in_training_is_one():
    net, x = deep(3).train(), adverse()
    latent = net.encode(x)
    half = Latent(latent.value[:2], latent.fingerprint)
    with pytest.raises(EnvironmentMismatch, match=r"batch was \[3\], is \[2\]"):
        net.inverse(half)


def test_a_part_of_a_batch_is_none():
    """Kernels are chosen by the size of the batch, in eval too."""
    net, x = deep(3).eval(), adverse()
    latent = net.encode(x)
    with pytest.raises(EnvironmentMismatch, match=r"batch was \[3\], is \[2\]"):
        net.inverse(Latent(latent.value[:2], latent.fingerprint))
    assert latent != Latent(latent.value.clone(), latent.fingerprint)


class Conditioned(nn.Module):
    def forward(self, x, condition):
        return torch.tanh(x * condition[1])


def test_the_condition_is_part_of_it():
    class Shifted(nn.Module):
        def forward(self, x, condition):
            return torch.tanh(x + condition)

    net = Sequential(inv.Split(), Coupling(Shifted()), inv.Merge(), grid="exact").eval()
    x, condition = torch.randn(3, 4), torch.randn(3, 1)
    latent = net.encode(x, condition=condition)
    assert torch.equal(net.inverse(latent, condition=condition), net.snap(x))
    with pytest.raises(EnvironmentMismatch, match="the condition changed"):
        net.inverse(latent, condition=condition + 1)
    mixed = Conditioned()
    net = Sequential(inv.Split(), Coupling(mixed), inv.Merge(), grid="exact").eval()
    latent = net.encode(x, condition=(None, 2.0))
    assert torch.equal(net.inverse(latent, condition=(None, 2.0)), net.snap(x))
    with pytest.raises(EnvironmentMismatch, match="the condition changed"):
        net.inverse(latent, condition=(None, 3.0))


def test_a_narrow_copy_is_refused_even_so():
    net, x = deep(3).eval(), adverse()
    latent = net.encode(x)
    narrow = Latent(latent.value.float(), latent.fingerprint)
    with pytest.raises(EnvironmentMismatch, match="value"):
        net.inverse(narrow)
    with (
        pytest.warns(UserWarning, match="value changed"),
        pytest.raises(TypeError, match=r"got torch\.float32, which has lost their last bits"),
    ):
        net.inverse(narrow, strict=False)


def test_networks_without_a_way_back_are_refused():
    net, x = deep(3, grid=None), adverse()
    with pytest.raises(ValueError, match="Sequential: encode needs a grid"):
        net.encode(x)
    dropout = Sequential(inv.Split(), Coupling(nn.Dropout()), inv.Merge(), grid="exact")
    with pytest.raises(ValueError, match="draws no random numbers"):
        dropout.encode(torch.randn(2, 4))
    assert isinstance(dropout.eval().encode(torch.randn(2, 4)), Latent)
    for drawing in (Sequential(inv.Augment(2), inv.Split(), Coupling(nn.Dropout()), grid="exact"), dropout.train()):
        advice = (
            r"anew\. Call eval\(\)\.$" if drawing is dropout else r"anew\. Augment\(2\) draws in eval, too: leave it"
        )
        with pytest.raises(ValueError, match=advice):
            drawing.encode(torch.randn(2, 4))


def test_streams_and_inner_networks():
    net = Sequential(inv.Split(), Sequential(Coupling(nn.Linear(2, 2)), inv.Swap()), grid="exact")
    x = torch.randn(3, 4)
    latent = net.encode(x)
    assert len(latent.value) == 2
    assert torch.equal(net.inverse(latent), net.snap(x))
    inner = net[1]
    pair = map_value(torch.Tensor.double, (x[:, :2], x[:, 2:]))
    assert all(torch.equal(a, b) for a, b in zip(inner.inverse(inner.encode(pair)), inner.snap(pair), strict=True))
