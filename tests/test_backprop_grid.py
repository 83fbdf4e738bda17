"""On a grid what comes back is compared bit for bit, before an optimizer has used the gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import invertible as inv
from invertible import Coupling, DriftError, InexactInverseError, NondeterministicBlockError, Reconstruct, Store
from invertible._checksum import checksum
from invertible.backprop import is_replaying
from invertible.testing import measure_memory
from tests.distributed import on_two
from tests.networks import outcome, with_strategy

# The checksum

tensors = st.tuples(
    st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.float64]), st.integers()
)


def drawn(given):
    shape, dtype, seed = given
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63))
    return (x * 4).round().div(4).to(dtype)  # with equal elements


def bits_of(x):
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


@given(tensors, st.data())
def test_a_flipped_bit_changes_the_checksum(given, data):
    x = drawn(given)
    y = x.clone()
    place = data.draw(st.integers(0, x.numel() - 1))
    bit = data.draw(st.integers(0, 8 * x.element_size() - 2))
    bits_of(y).view(-1)[place] ^= 1 << bit
    assert checksum(x) != checksum(y)
    bits_of(y).view(-1)[place] = ~bits_of(x).view(-1)[place]  # all of them
    assert checksum(x) != checksum(y)


@given(tensors, st.data())
def test_two_elements_in_each_others_place_change_the_checksum(given, data):
    x = drawn(given)
    i, j = (data.draw(st.integers(0, x.numel() - 1)) for _ in "ij")
    if data.draw(st.booleans(), label="opposite"):
        x.view(-1)[j] = -x.view(-1)[i]
    y = x.clone()
    y.view(-1)[i], y.view(-1)[j] = x.view(-1)[j], x.view(-1)[i]
    assert (checksum(x) == checksum(y)) == torch.equal(bits_of(x), bits_of(y))


@given(tensors, st.randoms(use_true_random=False))
def test_the_checksum_knows_no_layout(given, random):
    x = drawn(given)
    order = list(range(x.ndim))
    random.shuffle(order)
    back = [order.index(i) for i in range(x.ndim)]
    assert checksum(x.permute(order).contiguous().permute(back)) == checksum(x)
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    assert checksum(wide[..., ::2]) == checksum(x)


def test_a_thousand_errors_in_the_last_bit_are_found():
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    true = checksum(x)
    for _ in range(1000):
        y = x.clone()
        places = torch.randint(x.numel(), (int(torch.randint(1, 9, ())),))
        bits_of(y).view(-1)[places] += torch.randint(0, 2, places.shape) * 2 - 1
        assert (checksum(y) == true) == torch.equal(x, y)


# A function that does not repeat its bits


class Wavering(nn.Module):
    """Does something else to its values in the replay."""

    def __init__(self, damage, channels=4):
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.damage = damage

    def forward(self, x):
        result = self.inner(torch.relu(x))
        return self.damage(result) if is_replaying() else result


def shifted(x):
    return x * (1 + 1e-7)


def jolted(x):
    """By more than half a step of the coarser grid."""
    return x * (1 + 1e-4)


def flipped(x):
    x = x.clone()
    x.detach().view(torch.int32).view(-1)[77] ^= 1 << 20
    return x


def swapped(x):
    x = x.clone()
    flat = x.detach().view(-1)
    flat[[5, 91]] = flat[[91, 5]]
    return x


DAMAGES = [shifted, flipped, swapped]


def network(damage=None, at=5, depth=9, grid="exact", **options):
    torch.manual_seed(0)
    functions = [Wavering(damage if i == at and damage is not None else lambda x: x) for i in range(depth)]
    return inv.Sequential(
        inv.Split(), *map(Coupling, functions), inv.Merge(), grid=grid, backprop=Reconstruct(**options)
    )


def train(net, x=None):
    """One step of a loop as people write it."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.randn(2, 8, 6, 6) if x is None else x
    net(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("grid", "damage"), [*(("exact", d) for d in DAMAGES), *(("exact32", d) for d in (jolted, flipped, swapped))]
)
def test_it_is_found_before_the_optimizer_steps(grid, damage):
    net = network(damage, grid=grid)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    words = r"Sequential: the reconstructed inputs are not the true ones bit for bit .* Reconstruct\(locate=True\)"
    with pytest.raises(InexactInverseError, match=words) as error:
        train(net)
    assert not isinstance(error.value, NondeterministicBlockError)
    assert isinstance(error.value, DriftError)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.drift == error.value.drift > 0
    assert net.drift_flag


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("at", [0, 5, 8])
def test_the_layer_is_named(damage, at):
    with pytest.raises(
        NondeterministicBlockError, match=rf"at layer '{at + 1}', Coupling\(\), the {at + 1}\. that comp"
    ):
        train(network(damage, at, locate=True))


def test_nothing_is_found_where_nothing_is_wrong():
    for options in ({}, {"locate": True}, {"on_drift": "record"}, {"anchor_every": 3}):
        net = network(**options)
        train(net)
        assert net.drift == 0
        assert not net.drift_flag


def test_what_is_far_off_no_number_or_recorded():
    net = network(shifted, on_drift="record")
    train(net)
    assert 0 < net.drift < 1e-5
    assert net.drift_flag
    net = network(lambda x: x * math.nan)
    with pytest.raises(InexactInverseError, match="not finite"):
        train(net)


def test_elements_that_are_no_probes_count():
    """Of 2^18 elements 1024 are probes."""
    net = network(flipped, at=0, depth=1)
    with pytest.raises(InexactInverseError) as error:
        train(net, torch.randn(8, 8, 128, 64))
    assert error.value.drift == torch.finfo(torch.float64).eps


def test_a_value_beyond_the_limit_has_no_exact_way_back():
    grid = inv.Grid(22, torch.float32, on_range="record")
    torch.manual_seed(0)
    functions = [nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(12)]
    net = inv.Sequential(inv.Split(), *map(Coupling, functions), inv.Merge(), grid=grid, backprop=Reconstruct())
    words = r"of size [\d.]+, was beyond the limit of .* 4\. Take fewer bits"
    with pytest.raises(InexactInverseError, match=words):
        train(net, torch.full((64, 4), 3.0) + torch.rand(64, 4))
    assert net.peak >= grid.limit


def test_networks_on_a_grid_beside_others():
    """Each has its own measure; the verdict is on both."""
    net = inv.Sequential(network(), network(grid=None).double(), backprop=Reconstruct())
    for inner in net:
        inner.backprop = None
    train(net)
    assert 0 < net.drift < 1e-4
    assert not net.drift_flag
    net = inv.Sequential(network(shifted), network(grid=None).double(), backprop=Reconstruct())
    for inner in net:
        inner.backprop = None
    with pytest.raises(InexactInverseError):
        train(net)


def test_zeros_come_back_as_zeros_and_are_not_kept():
    """What enters, and what an injective layer pads, is reconstructed like all else; the bits are those of Store."""
    torch.manual_seed(0)
    functions = [nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(8)]
    net = inv.Sequential(inv.PadSplit(8, 16), *map(Coupling, functions), grid="exact", backprop=Reconstruct())
    x = torch.randn(4, 8, 16, 16)
    expected, _ = outcome(with_strategy(net, Store()), x)
    found, _ = outcome(net, x)
    assert all(torch.equal(found[key], value) for key, value in expected.items() if value is not None)
    (first, second), memory = measure_memory(lambda: net(x.requires_grad_()))
    returned = first.untyped_storage().nbytes() + second.untyped_storage().nbytes()
    assert memory.kept - returned < 30_000  # the probes; each stream has 65 536 bytes
    net.grid = None
    (first, second), memory = measure_memory(lambda: net(x.requires_grad_()))
    assert memory.kept - first.untyped_storage().nbytes() - second.untyped_storage().nbytes() > 30_000


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("depth", "grid", "mode"), [(100, "exact32", "train"), (100, "exact", "eval"), (500, "exact", "train")]
)
def test_gradients_and_inverse_at_depth(depth, grid, mode, autocast):
    torch.manual_seed(0)
    functions = [nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)) for _ in range(depth)]
    net = inv.Sequential(inv.Split(), *map(Coupling, functions), inv.Merge(), grid=grid)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(2, 6, 5, 5))  # statistics for eval
    net.train(mode == "train")
    context = {"autocast": torch.autocast("cpu", torch.bfloat16, enabled=autocast)}
    x = torch.randn(2, 6, 5, 5)
    expected, _ = outcome(with_strategy(net, Store()), x, **context)
    found, _ = outcome(with_strategy(net, Reconstruct()), x, **context)
    assert all(torch.equal(found[key], value) for key, value in expected.items() if value is not None)
    with torch.no_grad(), context["autocast"]:
        assert torch.equal(net.inverse(net(x)), net.snap(x))


# Several processes


def verdicts(rank):
    """One of two processes has a function that does not repeat its bits, in one of the steps."""
    wavers = itertools.cycle([False] * 2 + [True])
    net = network(lambda x: shifted(x) if rank == 1 and bad else x, on_drift="record")
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    taken = []
    for step in range(3):
        bad = next(wavers)
        torch.manual_seed(10 * step + rank)
        wrapped(torch.randn(2, 8, 6, 6)).square().mean().backward()
        flag = net.drift_flag.float()
        dist.all_reduce(flag)
        taken.append(not flag)
        if not flag:
            optimizer.step()
        optimizer.zero_grad()
    return taken, dict(net.named_parameters())


def test_all_processes_skip_the_step_of_one():
    (mine, first), (theirs, second) = on_two(verdicts)
    assert mine == theirs == [True, True, False]
    assert all(torch.equal(first[key], second[key]) for key in first)
