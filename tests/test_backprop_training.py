"""All that training loops do around a step, each against plain autograd."""

import copy
import io
import sys
import threading

import pytest
import torch
from torch import nn

import invertible as inv
from invertible import Coupling, Recompute, Reconstruct, Sequential, Store
from invertible.backprop import is_replaying
from invertible.testing import measure_memory
from tests.networks import assert_same, deep, function, in_threads, with_strategy

SAVING = [Reconstruct(), Reconstruct(anchor_every=2), Recompute(), Recompute(every=2)]
saving = pytest.mark.parametrize("strategy", SAVING, ids=repr)


def batch(step, dtype=torch.float64):
    return torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def loss_of(y):
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).square().mean()


def state(net):
    return copy.deepcopy(net.state_dict())


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


def plainly(net, steps=range(4)):
    optimizer = sgd(net)
    for step in steps:
        optimizer.zero_grad()
        loss_of(net(batch(step))).backward()
        optimizer.step()
    return state(net)


@torch.no_grad()
def descend(p):
    """An optimizer without a state, as a hook."""
    p.sub_(0.05 * p.grad)
    p.grad = None


def compare(train, strategy, limit=1e-10, **options):
    """The same loop with a strategy and with plain autograd."""
    net = deep(4, **options)
    assert_same(train(with_strategy(net, strategy)), train(with_strategy(net, Store())), limit)


@saving
def test_the_optimizer_steps_inside_the_backward_pass(strategy):
    """Each parameter is updated, and its gradient freed, as soon as it has arrived."""

    def train(net):
        for p in net.parameters():
            optimizer = torch.optim.SGD([p], 0.05, momentum=0.9)

            def update(p, optimizer=optimizer):
                optimizer.step()
                p.grad = None

            p.register_post_accumulate_grad_hook(update)
        for step in range(4):
            loss_of(net(batch(step))).backward()
            assert all(p.grad is None for p in net.parameters())
        return state(net)

    compare(train, strategy)
    net = deep(4)
    assert_same(train(with_strategy(net, strategy)), plainly(net), 1e-10)


@saving
def test_shared_blocks_and_an_optimizer_inside_the_backward_pass(strategy):
    block = Coupling(function(4))
    net = Sequential(inv.Split(), block, Coupling(function(4)), block, inv.Merge()).double()

    def train(net):
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(descend)
        for step in range(3):
            loss_of(net(batch(step))).backward()
        return state(net)

    assert_same(train(with_strategy(net, strategy)), train(with_strategy(net, Store())), 1e-10)


@saving
def test_saved_tensors_are_kept_on_the_cpu(strategy):
    def train(net):
        optimizer = sgd(net)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autograd.graph.save_on_cpu():
                loss = loss_of(net(batch(step)))
            loss.backward()
            optimizer.step()
        return state(net)

    compare(train, strategy)


@saving
@pytest.mark.parametrize("inside", [True, False])
def test_a_gradient_scaler_and_clipping(inside, strategy):
    """A step that overflows is skipped, and the scale halved, as without."""

    def train(net):
        optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        norms = []
        for step in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(net(batch(step, torch.float32))) * (float("inf") if step == 2 else 1.0)
                if inside:
                    scaler.scale(loss).backward()
            if not inside:
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5))
            scaler.step(optimizer)
            scaler.update()
        assert not norms[2].isfinite()
        finite = torch.stack(norms)[[0, 1, 3, 4]]
        return {**state(net), "norms": finite, "scale": torch.tensor(scaler.get_scale())}

    net = deep(4).float()
    assert_same(train(with_strategy(net, strategy)), train(with_strategy(net, Store())), 1e-2)


@saving
@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_of_the_weights(use_buffers, strategy):
    """It is a copy made in the middle of training, and can be trained on itself."""

    def train(net):
        optimizer = sgd(net)
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        loss_of(net(batch(5))).backward()
        average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=ema, use_buffers=use_buffers)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(net(batch(step))).backward()
            optimizer.step()
            average.update_parameters(net)
        torch.optim.swa_utils.update_bn([batch(9)], average)
        loss_of(average(batch(10))).backward()
        gradients = {f"gradient {k}": p.grad for k, p in average.named_parameters()}
        return {**state(net), **{f"average {k}": v for k, v in state(average).items()}, **gradients}

    compare(train, strategy)


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@saving
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, saved])
@pytest.mark.parametrize("between", [True, False], ids=["between forward and backward", "between steps"])
def test_copies_made_in_the_middle_of_training(between, copied, strategy):
    """The copy trains on as the original does, and making it leaves the running step alone."""
    net = with_strategy(deep(3), strategy)
    expected = plainly(copy.deepcopy(net))
    optimizer = sgd(net)
    other = net
    for step in range(2):
        optimizer.zero_grad()
        loss = loss_of(net(batch(step)))
        other = copied(net)
        loss.backward()
        optimizer.step()
    other = other if between else copied(net)
    assert other.backprop == strategy
    if copied is not copy.copy and not between:
        fresh = sgd(other)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for step in (2, 3):
            fresh.zero_grad()
            loss_of(other(batch(step))).backward()
            fresh.step()
        assert_same(state(other), expected, 1e-10)
    for step in (2, 3):
        optimizer.zero_grad()
        loss_of(net(batch(step))).backward()
        optimizer.step()
    assert_same(state(net), expected, 1e-10)


@saving
def test_two_networks_in_two_threads(strategy):
    nets = [with_strategy(deep(4), strategy) for _ in range(2)]
    expected = [plainly(copy.deepcopy(net), range(20)) for net in nets]
    found = in_threads(*(lambda net=net: plainly(net, range(20)) for net in nets))
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, 1e-12)


class Masked(nn.Module):
    """Dropout that compares its masks in both passes."""

    stochastic = True

    def __init__(self):
        super().__init__()
        self.conv, self.mask, self.wrong = nn.Conv2d(4, 4, 3, padding=1), None, 0

    def forward(self, x):
        mask = (torch.rand_like(x) > 0.3).to(x.dtype)
        if is_replaying():
            self.wrong += not torch.equal(mask, self.mask)
        self.mask = mask
        return self.conv(x) * mask


@saving
def test_random_networks_in_two_threads_are_right_or_refused(strategy):
    """Their replays set back the one generator that both draw from."""

    def train():
        masks = [Masked() for _ in range(3)]
        net = Sequential(inv.Split(), *map(Coupling, masks), inv.Merge(), backprop=strategy).double()
        silent = 0
        for step in range(60):
            before = sum(mask.wrong for mask in masks)
            try:
                loss_of(net(batch(step))).backward()
            except (RuntimeError, inv.DriftError):
                continue
            silent += sum(mask.wrong for mask in masks) - before
        return silent

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert in_threads(train, train) == [0, 0]
    finally:
        sys.setswitchinterval(interval)


@saving
def test_a_thread_that_draws_does_not_disturb_what_does_not(strategy):
    net, stop = with_strategy(deep(4), strategy), threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(100)

    other = threading.Thread(target=draw)
    other.start()
    try:
        for step in range(20):
            loss_of(net(batch(step))).backward()
    finally:
        stop.set()
        other.join()


@saving
def test_the_default_device_does_not_matter(strategy):
    net, x = with_strategy(deep(2, dropout=0.3), strategy), batch(0)
    torch.set_default_device("meta")
    try:
        net(x).square().mean().backward()
    finally:
        torch.set_default_device(None)


@saving
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_random_numbers_drawn_by_another_thread_are_refused(when, strategy):
    """The masks of the forward pass would not come back; a hook plays the other thread's part, at the worst moment."""
    net = with_strategy(deep(2, dropout=0.3), strategy)
    x = batch(0)

    def draw(*_):
        other = threading.Thread(target=torch.rand, args=(1,))
        other.start()
        other.join()

    if when == "forward":
        handle = net[1].function[1].register_forward_hook(draw)
        y = net(x)
        handle.remove()
    else:
        y = net(x)
        net[1].function[1].register_forward_hook(draw)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="did not draw the random numbers of the forward pass: does another thread"):
        loss_of(y).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_offloaded_training_keeps_nothing_per_block():
    """The optimizer in the backward pass frees each gradient: neither activations nor gradients add up."""

    def peak(depth):
        net = with_strategy(deep(depth), Reconstruct())
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(descend)
        x = torch.randn(4, 8, 16, 16, dtype=torch.float64)
        loss_of(net(x)).backward()
        return measure_memory(lambda: loss_of(net(x)).backward())[1].peak

    assert peak(12) == peak(6)
