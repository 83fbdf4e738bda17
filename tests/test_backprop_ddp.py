"""Two processes with DistributedDataParallel train as one process does, and their communication overlaps."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import invertible as inv
from invertible import Coupling, Inverse, Recompute, Reconstruct, Sequential
from invertible.backprop import is_replaying
from tests.distributed import on_two
from tests.networks import UsersAffine, assert_same, deep, function

SAVING = [Reconstruct(), Reconstruct(anchor_every=2), Recompute(), Recompute(every=2)]
saving = pytest.mark.parametrize("strategy", SAVING, ids=repr)
TINY = {"bucket_cap_mb": 1e-4}
OPTIONS = [  # of DDP, and whether gradients are accumulated, which torch refuses to do with a static graph
    ({}, False),
    ({}, True),
    (TINY, True),
    ({"static_graph": True}, False),
    ({"find_unused_parameters": True}, True),
    ({"gradient_as_bucket_view": True}, True),
    ({**TINY, "static_graph": True, "gradient_as_bucket_view": True}, False),
]


class LogDet(nn.Module):
    """The documented route to a log-determinant under DDP: a module whose ``forward`` returns it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z, log_det = self.net.forward_and_log_det(x)
        return torch.cat([z.flatten(1), log_det[:, None]], 1)


class Idle(nn.Module):
    """F with a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.inner, self.idle = function(4), nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


def chain(*layers):
    return Sequential(inv.Split(), *layers, inv.Merge()).double()


def plain():
    return deep(3)


def frozen():
    net = deep(4)
    for layer in (net[1], net[3]):
        layer.requires_grad_(False)
    return net


def shared():
    block = Coupling(function(4))
    return chain(block, Coupling(function(4)), block)


def nested():
    return chain(*[Sequential(*[Coupling(function(4)) for _ in range(2)]) for _ in range(2)], UsersAffine(4))


def log_det():
    return LogDet(chain(UsersAffine(4), Coupling(function(4))))


def backwards():
    return Inverse(plain())


def idle():
    return chain(Coupling(Idle()), Coupling(function(4)))


NETWORKS = {f.__name__: f for f in (plain, frozen, shared, nested, log_det, backwards, idle)}


def built(name, strategy):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    next(part for part in net.modules() if isinstance(part, Sequential)).backprop = strategy
    return net


def batch(step, rank, micro=0):
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.float64)


def loss_of(y):
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).square().mean()


def optimizer_of(net):
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, momentum=0.9)


def state(net):
    return {k: p.detach().clone() for k, p in net.named_parameters()} | {k: b.clone() for k, b in net.named_buffers()}


def train_half(rank, name, strategies, options, accumulate, compiled=None):
    """Three steps on this process's half of each batch, for each strategy."""
    found = []
    for strategy in strategies:
        net = built(name, strategy)
        if compiled == "functions":
            net.compile_functions(backend="aot_eager")
        inside = torch.compile(net, backend="aot_eager") if compiled == "inside" else net
        ddp = DistributedDataParallel(inside, **options)
        run = torch.compile(ddp, backend="aot_eager") if compiled == "outside" else ddp
        optimizer = optimizer_of(net)
        for step in range(3):
            if accumulate:
                with ddp.no_sync():
                    loss_of(run(batch(step, rank, 1))).backward()
            loss_of(run(batch(step, rank))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found.append(state(net))
    return found


def in_one(name, accumulate=False):
    """The same by plain autograd in one process: each half has batch statistics of its own, as under DDP."""
    net = built(name, None)
    optimizer = optimizer_of(net)
    found = {}
    for step in range(3):
        start = copy.deepcopy(net.state_dict())
        for rank in (1, 0):  # the first process's buffers are everybody's in the next step
            net.load_state_dict(start)
            for micro in [1, 0] if accumulate else [0]:
                (loss_of(net(batch(step, rank, micro))) / 2).backward()
            found[rank] = dict(copy.deepcopy(net).named_buffers())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [state(net) | found[rank] for rank in range(2)]


@pytest.mark.parametrize(("options", "accumulate"), OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_as_one(name, options, accumulate):
    if name == "idle" and not options.get("static_graph"):  # which finds them by itself
        options = {"find_unused_parameters": True, **options}
    expected = in_one(name, accumulate)
    for mine, theirs in zip(on_two(train_half, name, SAVING, options, accumulate), expected, strict=True):
        for each in mine:
            assert_same(each, theirs, 1e-10)


@pytest.mark.parametrize("compiled", ["functions", "inside", "outside"])
def test_compiled_networks_train_as_one_too(compiled):
    """Their functions; or all of it, inside of DDP or around it."""
    expected = in_one("plain")
    found = on_two(train_half, "plain", [Reconstruct(), Recompute()], {}, False, compiled)
    for mine, theirs in zip(found, expected, strict=True):
        for each in mine:
            assert_same(each, theirs, 1e-10)


def order_of_events(rank, strategy):
    """When the functions are replayed and when the buckets with their gradients are sent, in the third step."""
    net = built("plain", strategy)
    wrapped = DistributedDataParallel(net, **TINY)
    events = []
    for layer in range(1, 4):
        net[layer].function.register_forward_hook(
            lambda *_, layer=layer: events.append(f"replay {layer}") if is_replaying() else None
        )
    owner = {id(p): layer for layer in range(1, 4) for p in net[layer].parameters()}

    def send(_, bucket):
        events.extend(f"send {layer}" for layer in sorted({owner[id(p)] for p in bucket.parameters()}))
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, send)
    for step in range(3):
        events.clear()
        loss_of(wrapped(batch(step, rank))).backward()
    return list(dict.fromkeys(events))


@saving
def test_gradients_are_sent_while_layers_before_are_still_replayed(strategy):
    for events in on_two(order_of_events, strategy):
        sent = [each for each in events if each.startswith("send")]
        assert sent == ["send 3", "send 2", "send 1"]
        assert events.index("send 3") < events.index("replay 1")
        if strategy != Recompute(every=2):
            assert events == ["replay 3", "send 3", "replay 2", "send 2", "replay 1", "send 1"]


def by_the_wrong_route(rank, strategy, method):
    """Gradients of a method that is called past DDP."""
    net = built("plain", strategy)
    DistributedDataParallel(net)
    value = getattr(net, method)(batch(0, rank))
    loss_of(value).backward()
    alone = built("plain", None)
    loss_of(getattr(alone, method)(batch(0, rank))).backward()
    return all(torch.allclose(p.grad, q.grad) for p, q in zip(net.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("strategy", [None, Reconstruct()])
@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_what_the_docs_say_of_the_wrong_route(method, strategy):
    """Nothing is said, and each process has the gradients of its own half: so it is with any module under DDP."""
    assert on_two(by_the_wrong_route, strategy, method) == [True, True]


def catch(rank):
    """One process drifts and says so by an error; the others hear of it, and all go on without that step."""
    net = built("plain", Reconstruct())
    wrapped = DistributedDataParallel(net)
    optimizer = optimizer_of(net)
    caught = []
    for step in range(4):
        bad = torch.zeros(1)
        try:
            loss_of(wrapped(batch(step, rank) * (1e-20 if (step, rank) == (1, 1) else 1))).backward()
        except inv.DriftError:
            bad += 1
        dist.all_reduce(bad)
        if not bad:
            optimizer.step()
        optimizer.zero_grad()
        caught.append(bad.item())
    return caught, dict(net.named_parameters())


def test_an_error_of_drift_that_is_caught_leaves_ddp_intact():
    (mine, first), (theirs, second) = on_two(catch)
    assert mine == theirs == [0, 1, 0, 0]
    assert all(torch.equal(first[key], second[key]) for key in first)


def skip_together(rank, damage):
    """A loop that agrees on skipping a step: the drift's verdict is reduced together with the loss."""
    net = built("plain", Reconstruct(on_drift="record"))
    wrapped = DistributedDataParallel(net)
    optimizer = optimizer_of(net)
    taken = []
    for step in range(4):
        x = batch(step, rank)
        if damage and rank == 1 and step == 2:
            x = x * 1e-20  # is lost in the sums
        loss = loss_of(wrapped(x))
        loss.backward()
        verdict = torch.stack([loss.detach(), net.drift_flag.to(loss.dtype)])
        dist.all_reduce(verdict)
        taken.append(not verdict[1])
        if not verdict[1]:
            optimizer.step()
        optimizer.zero_grad()
    return taken, state(net)


def test_one_process_drifts_and_all_skip_the_step():
    (mine, first), (theirs, second) = on_two(skip_together, True)
    assert mine == theirs == [True, True, False, True]
    parameters = dict(built("plain", None).named_parameters())
    for key in parameters:
        assert torch.equal(first[key], second[key])
        assert first[key].isfinite().all()
    assert [taken for taken, *_ in on_two(skip_together, False)] == [[True] * 4] * 2
