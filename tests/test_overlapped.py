"""Two streams: the numbers of one, and no access that another stream's could overtake, by torch's own sanitizer."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.cuda._sanitizer import EventHandler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import overlapped
from benchmarks.contenders import Floor, bottleneck
from benchmarks.overlapped import CALLER, Lanes, Overlapped, Overlapping
from invertible.backprop._counting import Numbers, storage_of


def functions(depth, channels=8):
    torch.manual_seed(0)
    return [bottleneck(channels) for _ in range(depth)]


def trained(net, x, steps=2):
    """Gradients and buffers; the second step adds to the first."""
    x = x.clone().requires_grad_()
    for _ in range(steps):
        net(x).square().mean().backward()
    return [x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_the_numbers_are_those_of_the_floor(depth, shared):
    x = torch.randn(2, 16, 6, 6)
    made = [functions(1) * depth if shared else functions(depth) for _ in range(2)]
    for found, true in zip(trained(Overlapped(made[0]), x), trained(Floor(made[1]), x), strict=True):
        assert torch.equal(found, true)


class Watched(TorchDispatchMode, Lanes):
    """Streams that are numbers, and the accesses on each."""

    def __init__(self, forgets=None):
        super().__init__()
        self.forgets = forgets
        self.handler = EventHandler()
        self.lane, self.events, self.numbers, self.errors = CALLER, 0, Numbers(), []
        self.makers, self.used, self.lent, self.kept = {}, set(), set(), []
        for lane in (CALLER, 0, 1):
            self.handler._handle_stream_creation(lane)

    def number(self, t):
        self.kept.append(t.untyped_storage())  # so that no other gets its place
        return self.numbers.of(storage_of(t), t.untyped_storage())

    @contextmanager
    def on(self, lane):
        self.lane, before = lane, self.lane
        yield
        self.lane = before

    def mark(self, lane):
        self.events += 1
        self.handler._handle_event_creation(self.events)
        self.handler._handle_event_record(self.events, lane)
        return self.events

    def wait(self, lane, event):
        if event is not None and self.forgets != (lane if lane == CALLER else "lanes"):
            self.handler._handle_event_wait(event, lane)

    def lend(self, tensors, lane):
        if self.forgets != "lend":
            self.lent |= {(self.number(t), lane) for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or str(func).startswith("aten.detach"):
            return result
        given = list(zip(func._schema.arguments, args, strict=False))
        written = {
            self.number(t)
            for a, value in given
            if a.is_write
            for t in tree_leaves(value)
            if isinstance(t, torch.Tensor)
        }
        read = {self.number(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)} - written
        made = {self.number(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        for number in made - read - written:
            self.makers[number] = self.lane
        self.used |= {(number, self.lane) for number in read | written | made}
        names = {number: [] for number in read | written | made}
        self.errors += self.handler._handle_kernel_launch(self.lane, read - made, written | made, made, func, names)
        return result

    def unlent(self):
        """What was used where it was not made, and not lent."""
        return {
            (number, lane)
            for number, lane in self.used - self.lent
            if self.makers.get(number, lane) != lane  # parameters and the like have no maker
        }


def watched(monkeypatch, forgets=None, depth=5, shared=False):
    """Two steps, each with another one's work on the caller's stream around it."""
    net = Overlapped(functions(1) * depth if shared else functions(depth))
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    lanes = Watched(forgets)
    monkeypatch.setattr(Overlapping, "lanes", lambda _: lanes)
    with lanes:
        for _ in range(2):
            net(x).square().mean().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
    return lanes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shared", [False, True])
def test_no_stream_overtakes_another(monkeypatch, shared):
    lanes = watched(monkeypatch, shared=shared)
    assert not lanes.errors, lanes.errors[0]
    assert {lane for _, lane in lanes.used} == {CALLER, 0, 1}
    assert not lanes.unlent()


@pytest.mark.parametrize("forgets", ["lanes", CALLER, "lend"])
def test_what_is_forgotten_is_found(monkeypatch, forgets):
    lanes = watched(monkeypatch, forgets)
    assert bool(lanes.errors) == (forgets != "lend")
    assert bool(lanes.unlent()) == (forgets == "lend")


def test_streams_of_a_gpu_are_told_what_lanes_are(monkeypatch):
    """Which call of torch stands for what: there is no GPU to see it on."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return f"event of {self.name}"

        def wait_event(self, event):
            told.append((self.name, event))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("caller"))
    monkeypatch.setattr(overlapped, "_streams", lambda _: (Stream("first"), Stream("second")))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream.name)
    lanes = overlapped.CudaLanes(torch.device("cuda"))
    lanes.after(1, CALLER)
    lanes.wait(0, None)
    assert told == [("second", "event of caller")]
    assert lanes.on(0) == "first"


@pytest.mark.gpu
def test_on_a_gpu_the_gradients_are_those_of_the_floor():
    x = torch.randn(8, 64, 28, 28, device="cuda")
    nets = [kind(functions(12, 32)).cuda() for kind in (Overlapped, Floor)]
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        for _ in range(20):
            for found, true in zip(*(trained(net, x, 1) for net in nets), strict=True):
                assert torch.equal(found, true)


def test_a_function_keeps_its_own_graph():
    """Functions of another kind than the benchmark's."""
    nets = [kind([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]) for kind in (Overlapped, Floor)]
    nets[0].load_state_dict(nets[1].state_dict())
    for found, true in zip(*(trained(net, torch.ones(3, 8)) for net in nets), strict=True):
        assert torch.equal(found, true)
