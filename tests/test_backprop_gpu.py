"""The engine on a CUDA device: its random numbers, autocast, allocator and synchronisation."""

import pytest
import torch

import invertible as inv
from invertible import Coupling, Recompute, Reconstruct, Sequential, Store
from invertible.testing import check_backprop, measure_memory
from tests.networks import deep, function, in_threads, off, outcome, with_strategy

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


@saving
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_under_autocast_with_a_scaler(channels_last, strategy):
    """Kernels of cuDNN in 16 bits, streams in 32."""

    def train(net):
        optimizer, scaler = torch.optim.SGD(net.parameters(), 0.05), torch.amp.GradScaler("cuda", init_scale=2.0**8)
        for step in range(4):
            x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(step)).cuda()
            x = x.to(memory_format=torch.channels_last) if channels_last else x
            with torch.autocast("cuda", torch.float16):
                loss = net(x).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return dict(net.state_dict())

    net = deep(4).float().cuda()
    assert off(train(with_strategy(net, strategy)), train(with_strategy(net, Store())))[0] < 1e-2


def peak(depth, strategy):
    net, x = with_strategy(deep(depth, channels=16), strategy).cuda(), torch.randn(8, 32, 32, 32).double().cuda()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net(x).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    net(x).sum().backward()
    return torch.cuda.max_memory_allocated() - before


def test_the_peak_of_the_allocator():
    """It does not grow with depth, but for a few KiB of bookkeeping."""
    assert peak(18, Reconstruct()) <= peak(6, Reconstruct()) + 64 * 1024
    assert peak(18, Reconstruct()) < peak(18, Recompute()) < peak(18, Store())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@saving
def test_a_whole_step_is_captured_in_a_cuda_graph(strategy, dropout):
    """Forward, backward and optimizer, replayed on other data; the drift is recorded, for nothing can be read."""
    net = with_strategy(deep(4, dropout=dropout), strategy).float().cuda()
    x = torch.randn(4, 8, 8, 8, device="cuda")
    optimizer = torch.optim.SGD(net.parameters(), 0.05)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    losses = []
    for i in range(3):
        x.copy_(torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(i)))
        graph.replay()
        losses.append(loss.item())
    if isinstance(strategy, Reconstruct):
        assert net.drift < 1e-4
    if not dropout:
        net.load_state_dict(start)
        for i in range(3):
            x.copy_(torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(i)))
            assert step().item() == pytest.approx(losses[i], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # of inductor, which looks at the machine
@saving
def test_compiled_functions(strategy):
    torch.compiler.reset()
    net, x = deep(4).float().cuda(), torch.randn(4, 8, 16, 16, device="cuda")
    expected, _ = outcome(net, x)
    net.backprop = strategy
    net.compile_functions()
    assert off(outcome(net, x, copies=False)[0], expected)[0] < 1e-3
    with torch.no_grad():
        torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-3, atol=1e-3)


def test_two_networks_in_two_threads():
    """Autograd runs a device's backward passes in a thread of its own."""
    nets = [with_strategy(deep(4), Reconstruct()).cuda() for _ in range(2)]
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64, device="cuda")
    expected = [outcome(net, x)[0] for net in nets]
    found = in_threads(*(lambda net=net: outcome(net, x)[0] for net in nets))
    for mine, theirs in zip(found, expected, strict=True):
        assert off(mine, {k: v for k, v in theirs.items() if k != "random stream"})[0] < 1e-9
