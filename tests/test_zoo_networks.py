"""What the zoo's networks share: state dicts that load whole or not at all, dtypes, values on the way."""

import copy
import re

import pytest
import torch
from torch import nn

import zoo
from zoo.dry_run import cost_of, flops_of
from zoo.errors import StateError, WeightsError

SMALL = {
    "irevnet_small": {"blocks": (1,)},
    "iunet": {"channels": 4, "blocks": (1, 1)},
    "revvit_s": {"dim": 4, "depth": 1, "heads": 1, "patch_size": 4, "image_size": 8},
    "resnet_small": {},
}
every_kind = pytest.mark.parametrize("name", SMALL)


def small(name, num_classes=2):
    return zoo.create(name, num_classes=num_classes, **SMALL[name])


@every_kind
def test_a_state_dict_loads_whole_or_not_at_all(name):
    net, other = small(name), small(name, 3)
    before = {key: t.clone() for key, t in net.state_dict().items()}
    wrong, weights = other.state_dict(), [key for key in before if key.startswith("head.")][-2:]
    kind, total, shape = type(net).__name__, len(before), tuple(before[weights[0]].shape)
    message = f"{kind}: the state dict does not fit, 2 of {total} tensors differ, first {weights[0]}: expected {shape}"
    for strict in (True, False):
        with pytest.raises(StateError, match=re.escape(message)) as refused:
            net.load_state_dict(wrong, strict=strict)
        assert isinstance(refused.value, WeightsError | RuntimeError)
        with pytest.raises(RuntimeError, match="does not fit"):  # as torch's own would be
            net.load_state_dict(wrong, strict=strict, assign=True)
    for extra in ({**before, "more": torch.zeros(1)}, dict(list(before.items())[1:])):
        with pytest.raises(
            StateError, match=f"1 of {total + ('more' in extra)} tensors differ, first .*no such tensor"
        ):
            net.load_state_dict(extra)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    some = {key: t for key, t in wrong.items() if key not in weights}
    found = net.load_state_dict(some, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (weights, [])
    assert all(torch.equal(t, net.state_dict()[key]) for key, t in some.items())
    net.load_state_dict(before, assign=True)
    assert all(t.data_ptr() == before[key].data_ptr() for key, t in net.state_dict().items())


@every_kind
def test_a_state_dict_has_a_version(name):
    net = small(name)
    state = net.state_dict()
    assert state._metadata[""] == {"version": type(net)._version}
    wrapped = nn.Sequential(copy.deepcopy(net)).state_dict()
    state._metadata[""]["version"] = wrapped._metadata["0"]["version"] = 7
    message = "expected a state dict of version 1 or older, got version 7. Load it with the version of this library"
    with pytest.raises(StateError, match=f"{type(net).__name__}: {message}"):
        net.load_state_dict(state)
    with pytest.raises(StateError, match=message):
        nn.Sequential(net).load_state_dict(wrapped)
    net.load_state_dict(dict(state))  # as from a file that has no versions


def test_hooks_and_the_forgiveness_of_batch_norm_are_torchs():
    net = small("irevnet_small")
    state = {key: t for key, t in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    net.load_state_dict(state)
    renamed = {key.replace("body", "old"): t for key, t in net.state_dict().items()}

    def rename(module, state, *_):
        for key in list(state):
            state[key.replace("old", "body")] = state.pop(key)

    net.register_load_state_dict_pre_hook(rename)
    net.load_state_dict(renamed)


@every_kind
def test_images_in_another_dtype(name):
    """They are refused with both dtypes, except where a grid or autocast converts them."""
    net, x = small(name).eval(), torch.rand(2, 3, 8, 8)
    for dtype in (torch.float64, torch.bfloat16):
        words = f"{type(net).__name__}: expected images of the weights' dtype, torch.float32, got {dtype}. Convert them"
        with pytest.raises(TypeError, match=re.escape(words)):
            net(x.to(dtype))
        assert copy.deepcopy(net).to(dtype)(x.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        net(x.bfloat16())
    if hasattr(net, "inverse"):
        net.grid = "exact"
        assert torch.equal(net.inverse(net.features(x.double())).float(), x)
    net.head.double()  # in two dtypes; one of them is that of the image
    if not hasattr(net, "inverse"):
        with pytest.raises(RuntimeError):
            net(x)


@pytest.mark.parametrize("name", ["irevnet_small", "iunet"])
def test_values_on_the_way_in_both_directions(name):
    net, x = small(name).eval(), torch.rand(2, 3, 8, 8)
    forwards = list(net.trace(x))
    assert torch.equal(forwards[-1][1], net.features(x))
    backwards = list(net.trace_inverse(forwards[-1][1]))
    assert [key for key, _ in backwards] == [key for key, _ in reversed(forwards)]
    torch.testing.assert_close(backwards[-1][1], x)
    with pytest.raises(ValueError, match="expected images of shape"):  # before the first is asked for
        net.trace(x[0])
    with pytest.raises(ValueError, match="features have the shape"):
        net.trace_inverse(x)


def test_costs_of_other_channels_and_dimensions():
    with torch.device("meta"):
        net = zoo.create("irevnet_small", in_channels=1, dimensions=3, blocks=(1,), num_classes=2)
    assert flops_of(copy.deepcopy(net).eval(), 4) > 0
    assert cost_of(net, 8).per_image > 0
