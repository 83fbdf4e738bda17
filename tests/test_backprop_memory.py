"""What is kept does not grow with depth, nothing leaks, and F runs twice."""

import gc
import weakref

import pytest
import torch
from torch import nn

import invertible as inv
from invertible import Coupling, Inverse, Parallel, Recompute, Reconstruct, Sequential, Store
from invertible.testing import measure_memory
from tests.networks import METHODS, UsersAffine, deep, function, with_strategy


def chain(depth, *, wrap=None, **options):
    couplings = [Coupling(function(8, **options)) for _ in range(depth)]
    return Sequential(inv.Split(), *(couplings if wrap is None else [wrap(couplings)]), inv.Merge())


def kept(net, x, method="forward"):
    """Bytes that are held between forward and backward, above those of the output itself."""
    call = net if method == "forward" else getattr(net, method)
    result, memory = measure_memory(lambda: call(x))
    value = result[0] if method.endswith("log_det") else result
    return memory.kept - value.untyped_storage().nbytes()


def slope(make, x, method="forward", depths=(4, 10)):
    nets = [make(depth) for depth in depths]
    for net in nets:
        net.backprop = Reconstruct()
        kept(net, x, method)  # what torch allocates once is not ours
    shallow, deeper = (kept(net, x, method) for net in nets)
    return (deeper - shallow) / (depths[1] - depths[0])


@pytest.mark.parametrize("grad", [True, False], ids=["input with grad", "input without"])
@pytest.mark.parametrize("method", METHODS)
def test_no_byte_is_kept_per_block(method, grad):
    x = torch.randn(4, 16, 16, 16, requires_grad=grad)
    if method.endswith("log_det"):  # 4 bytes per sample and block would be the log-determinants themselves
        assert slope(chain, x, method) == 0
    assert slope(chain, x, method) == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda couplings: Sequential(*couplings),
        lambda couplings: Inverse(Sequential(*couplings)),
        lambda couplings: Sequential(Parallel(*(Sequential(inv.Split(), *half(couplings), inv.Merge()) for _ in "ab"))),
        lambda couplings: Sequential(*(Sequential(inv.Swap(), c, inv.Swap()) for c in couplings)),
        lambda couplings: Sequential(*(UsersAffine(8) for _ in couplings)),
    ],
    ids=["nested", "inverse", "branches", "moved", "a user's own"],
)
def test_no_byte_is_kept_per_block_in_containers(wrap):
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    assert slope(lambda depth: chain(depth, wrap=wrap), x) == 0


def half(couplings):
    return [Coupling(function(4)) for _ in couplings]


def test_a_block_that_draws_random_numbers_keeps_where_it_drew_them():
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    assert slope(lambda depth: chain(depth, dropout=0.3), x) == torch.get_rng_state().nbytes == 5056
    assert slope(lambda depth: chain(depth, dropout=0.3).eval(), x) == 0


def test_the_peak_does_not_grow_with_depth():
    x = torch.randn(4, 16, 16, 16, requires_grad=True)

    def peak(depth, strategy):
        net = chain(depth)
        net.backprop = strategy
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        peaks = [measure_memory(lambda: net(x).square().mean().backward())[1].peak for _ in range(2)]
        return peaks[1]  # what torch allocates once is not ours

    assert peak(12, Reconstruct()) == peak(4, Reconstruct())
    assert peak(12, Store()) > 2 * peak(4, Store())
    assert peak(12, Recompute()) < peak(12, Store())
    assert peak(12, Reconstruct()) < peak(12, Recompute())


def test_anchors_and_probes_keep_what_they_say():
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    net = chain(8)
    net.backprop = Reconstruct()
    base = kept(net, x)
    net.backprop = Reconstruct(anchor_every=4)  # two anchors; each begins a part with probes of its own
    assert 2 * x.nbytes <= kept(net, x) - base <= 2 * x.nbytes + 4 * 4096
    net.backprop = Reconstruct(locate=True)  # 4 KiB more for each stream of the 6 blocks that had no probes
    assert kept(net, x) - base == 6 * 2 * 4096


@pytest.mark.parametrize("strategy", [Reconstruct(), Recompute(every=2)])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_leaks_even_without_garbage_collection(strategy, backward):
    net = chain(4, dropout=0.1)
    net.backprop = strategy
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(4, 16, 16, 16)
    alive = []

    def step():
        y = net(x)
        alive.append(weakref.ref(y))
        if backward:
            y.square().mean().backward()

    gc.collect()
    gc.disable()
    try:
        step()
        _, memory = measure_memory(step)
        assert memory.kept == 0
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_a_backward_pass_in_part_leaves_nothing_behind():
    """Only the last block's gradient is asked for: nobody takes the input that it reconstructs."""
    net = chain(4)
    net.backprop = Reconstruct()
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    last = list(net[-2].parameters())
    y = net(x)
    torch.autograd.grad(y.sum(), last, retain_graph=True)
    found, memory = measure_memory(lambda: torch.autograd.grad(y.sum(), last, retain_graph=True))
    assert memory.kept == sum(g.nbytes for g in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", [Reconstruct(), Recompute(), Recompute(every=3)])
def test_a_function_runs_twice_per_step(method, strategy):
    class Counted(nn.Module):
        calls = 0

        def forward(self, x):
            Counted.calls += 1
            return torch.tanh(x)

    down = Coupling(nn.Sequential(Counted(), nn.Conv2d(2, 8, 3, stride=2, padding=1)), downsample=inv.PixelUnshuffle(2))
    net = Sequential(
        inv.Split(), Coupling(Counted()), Inverse(Coupling(Counted())), down, inv.Merge(), backprop=strategy
    )
    x = torch.randn(2, 4, 4, 4)
    x = (x if method.startswith("forward") else net(x).detach()).requires_grad_()
    Counted.calls = 0
    result = net(x) if method == "forward" else getattr(net, method)(x)
    sum(t.sum() for t in (result if isinstance(result, tuple) else (result,))).backward()
    assert Counted.calls == 2 * 3


def test_layers_that_only_move_elements_keep_nothing():
    net = Sequential(inv.PixelUnshuffle(2), inv.Permute.reversed(16), inv.Split(), inv.Swap(), inv.Merge())
    x = torch.randn(4, 4, 16, 16, requires_grad=True)
    for strategy in (Reconstruct(), Recompute()):
        net.backprop = strategy
        net(x)
        assert kept(net, x) == 0
        (grad,) = torch.autograd.grad(net(x).square().sum(), x)
        torch.testing.assert_close(grad, 2 * x)


def test_conditions_are_kept_once_for_all_blocks():
    from tests.networks import Conditioned

    def make(depth):
        return Sequential(*[Coupling(Conditioned(8)) for _ in range(depth)], backprop=Reconstruct())

    pair = tuple(torch.randn(4, 8, 16, 16, requires_grad=True) for _ in "ab")
    sizes = []
    for depth in (2, 8):
        net = make(depth)
        runs = [measure_memory(lambda net=net: net(pair, condition=torch.rand(4, 8)))[1] for _ in range(2)]
        sizes.append(runs[1].kept)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("strategy", [Store(), Recompute(), Reconstruct()], ids=repr)
def test_bytes_without_data_are_those_with_data(strategy):
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        net = with_strategy(deep(4), strategy).to(device)
        x = torch.zeros(2, 8, 16, 16, dtype=torch.float64, device=device)
        y, memory = measure_memory(lambda net=net, x=x: net(x), device)
        assert y.device.type == device
        found.append(memory.kept)
    assert found[0] == found[1] > x.nbytes


def test_measure_memory_counts_what_hooks_on_saved_tensors_miss():
    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x.clone()
            return x * 1

    x = torch.zeros(1000, requires_grad=True)
    _, memory = measure_memory(lambda: Hides.apply(x))
    assert memory.kept == 8000
    assert deep(1)(torch.zeros(2, 8, 4, 4).double()).shape == (2, 8, 4, 4)
