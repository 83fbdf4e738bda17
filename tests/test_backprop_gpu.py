"""The engine on a CUDA device: its random numbers, autocast, allocator and synchronisation."""

import pytest
import torch

import invertible as inv
from invertible import Coupling, Recompute, Reconstruct, Sequential
from invertible.testing import check_backprop, measure_memory
from tests.networks import deep, function, off, outcome, with_strategy

pytestmark = pytest.mark.gpu
SAVING = [Reconstruct(), Recompute(), Recompute(every=2)]
saving = pytest.mark.parametrize("strategy", SAVING)


@saving
def test_random_numbers_of_the_device_are_drawn_again(strategy):
    net = deep(4, dropout=0.3).cuda()
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64, device="cuda")
    torch.cuda.manual_seed(1)
    expected, _ = outcome(net, x)
    torch.cuda.manual_seed(1)
    state = torch.cuda.get_rng_state()
    found, _ = outcome(with_strategy(net, strategy), x)
    assert off(found, expected)[0] < 1e-9
    assert not torch.equal(torch.cuda.get_rng_state(), state)


@saving
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_of_the_device_is_replayed(inside, strategy):
    torch.manual_seed(1)
    net = deep(4).float().cuda()
    x = torch.randn(4, 8, 8, 8, device="cuda")
    cast = lambda: torch.autocast("cuda", torch.bfloat16)  # noqa: E731
    expected, _ = outcome(net, x, autocast=cast(), inside=inside)
    found, _ = outcome(with_strategy(net, strategy), x, autocast=cast(), inside=inside)
    assert off(found, expected)[0] < 1e-2


def test_no_byte_is_kept_per_block_on_the_device():
    def kept(depth):
        net = Sequential(inv.Split(), *[Coupling(function(8)) for _ in range(depth)], inv.Merge()).cuda()
        net.backprop = Reconstruct()
        net(x)
        y, memory = measure_memory(lambda: net(x), "cuda")
        return memory.kept - y.untyped_storage().nbytes()

    x = torch.randn(4, 16, 16, 16, device="cuda", requires_grad=True)
    kept(2)
    assert kept(10) == kept(4)


def test_recording_the_drift_does_not_synchronise():
    net = deep(4).float().cuda()
    net.backprop = Reconstruct(on_drift="record")
    x = torch.randn(4, 8, 8, 8, device="cuda")
    net(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not net.drift_flag
    assert net.drift < 1e-4


def test_the_comparison_of_strategies():
    report = check_backprop(deep(4).cuda(), torch.randn(4, 8, 8, 8, dtype=torch.float64, device="cuda"))
    assert report.rows[2].memory.kept < report.rows[0].memory.kept / 2
