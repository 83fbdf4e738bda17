"""The optimiser inside the backward pass: the same training, without room for all gradients."""

import copy

import pytest
import torch
from torch import nn

import invertible as inv
from benchmarks.inside import bytes_of_step
from invertible import Coupling, Recompute, Reconstruct, Sequential, Store
from invertible.backprop import StepInBackward
from invertible.testing import measure_memory
from tests.networks import deep, function, with_strategy

STRATEGIES = pytest.mark.parametrize("strategy", [Store(), Recompute(), Reconstruct()])
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
}


def state(net):
    return {key: t.detach().clone() for key, t in net.state_dict().items()}


def groups(net):
    """Weights and the rest, with options of their own."""
    parameters = list(net.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(net, make, *, inside, steps=4):
    """The same loop either way, with a schedule of learning rates."""
    optimizer = make(groups(net))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    held = StepInBackward(optimizer) if inside else None
    for i in range(steps):
        net(torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(i)).double()).square().mean().backward()
        if held is not None:
            assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return state(net), optimizer


@STRATEGIES
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_moments_and_schedule_are_those_of_the_ordinary_loop(strategy, name):
    torch.manual_seed(0)
    net = with_strategy(deep(3), strategy)
    (found, inside), (expected, after) = (
        train(with_strategy(net, strategy), OPTIMIZERS[name], inside=inside) for inside in (True, False)
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    one, other = inside.state_dict(), after.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for key, moments in other["state"].items():
        assert all(torch.equal(torch.as_tensor(one["state"][key][k]), torch.as_tensor(t)) for k, t in moments.items())


def test_a_state_that_is_loaded_is_the_one_that_is_used():
    torch.manual_seed(0)
    net = deep(2)
    start, saved = train(with_strategy(net, Store()), OPTIMIZERS["adamw"], inside=False)
    found = []
    for inside in (True, False):
        fresh = deep(2)
        fresh.load_state_dict(start)
        optimizer = OPTIMIZERS["adamw"](groups(fresh))
        if inside:
            StepInBackward(optimizer)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        fresh(torch.ones(2, 8, 6, 6).double()).square().mean().backward()
        optimizer.step()
        found.append(state(fresh))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])


def test_gradients_of_one_layer_at_a_time_are_held():
    """Ten layers, whose weights are large beside their values: the peak falls by the gradients of nine of them."""
    torch.manual_seed(0)
    layers = [inv.Split(), *(Coupling(function(48)) for _ in range(10)), inv.Merge()]
    net = Sequential(*layers, backprop=Reconstruct())
    x = torch.randn(1, 96, 4, 4)
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)
    gradients = sum(p.numel() * p.element_size() for p in net.parameters())

    def step():
        net(x).square().mean().backward()
        optimizer.step()

    def counted():
        optimizer.zero_grad()
        step()
        optimizer.zero_grad()  # the momentum is there, and no gradient
        return measure_memory(step)[1]

    ordinary = counted()
    optimizer.zero_grad()
    held = StepInBackward(optimizer)
    inside = counted()
    assert ordinary.kept >= gradients > 0.95 * ordinary.kept
    assert inside.kept < 0.01 * gradients
    assert inside.peak < ordinary.peak - 0.8 * gradients
    held.remove()
    step()
    assert all(p.grad is not None for p in net.parameters())


def test_the_table_of_the_documentation_is_counted():
    for strategy in (Store(), Reconstruct()):
        usual, inside = (bytes_of_step("irevnet_small", 1, 32, strategy, inside=way) for way in (False, True))
        assert 0 < inside < usual


def test_an_optimizer_that_counts_for_a_whole_group_is_refused():
    """Its count would be lost, and it would go on from the first step for ever."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1

    net = nn.Linear(2, 2)
    StepInBackward(Counting(net.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"each parameter alone, but Counting changes 'k' of the whole group"):
        net(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize("strategy", [Store(), Recompute(), Reconstruct()])
def test_a_weight_of_two_layers_is_updated_once_all_its_gradient_is_there(strategy):
    found = []
    for inside in (True, False):
        torch.manual_seed(0)
        shared, own = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        net = Sequential(inv.Split(), *map(Coupling, (shared, own, shared)), inv.Merge(), backprop=strategy)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2, fused=True)
        if inside:
            StepInBackward(optimizer)
        for _ in range(3):
            net(torch.ones(2, 8).double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(state(net))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])


def test_an_optimizer_may_have_attributes_of_its_own():
    """A copy of an optimiser has its groups and its state, and nothing else."""

    class Signs(torch.optim.Optimizer):
        def __init__(self, parameters, size):
            super().__init__(parameters, {})
            self.size = size

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.grad.sign(), alpha=-self.size)

    net = nn.Linear(2, 2)
    nn.init.zeros_(net.weight)
    optimizer = Signs(net.parameters(), 0.5)
    StepInBackward(optimizer)
    optimizer.size = 0.25  # changed later, as a schedule does
    net(torch.ones(1, 2)).sum().backward()
    assert net.weight.tolist() == [[-0.25] * 2] * 2

    class Shrinking(Signs):
        def step(self, closure=None):
            super().step()
            self.size *= 0.5  # for each parameter, not for each step

    net = nn.Linear(2, 2)
    StepInBackward(Shrinking(net.parameters(), 0.5))
    with pytest.raises(TypeError, match=r"each parameter alone, but Shrinking changes its attribute 'size' at each"):
        net(torch.ones(1, 2)).sum().backward()


class Momentum(torch.optim.Optimizer):
    """Keeps outside its state that it has begun: a flag, a tensor that it counts in, an attribute made on the way."""

    def __init__(self, parameters, kind):
        super().__init__(parameters, {})
        self.kind, self.begun, self.count, self.mean = kind, False, torch.zeros(()), None

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not self.begun:
            self.state.update((p, {"moment": torch.zeros_like(p)}) for p in parameters)
            self.begun = True
        if self.kind == "tensor":
            self.count += 1
        elif self.kind == "new":
            self.steps = getattr(self, "steps", 0) + 1
        elif self.kind == "none":
            self.mean = torch.ones(())
        for p in parameters:
            if p.grad is not None:
                p.sub_(self.state[p]["moment"].mul_(0.9).add_(p.grad), alpha=0.1)


def test_a_flag_that_it_has_begun_is_kept_for_each_parameter():
    """It was reset before each update, and with it what the optimiser sets up once: moments were zero again."""
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = Momentum(net.parameters(), "flag")
        steps = StepInBackward(optimizer) if inside else None
        for i in range(5):
            if steps is not None and i == 3:
                steps.remove()
            net(torch.ones(1, 2)).square().sum().backward()
            if steps is None or i >= 3:
                optimizer.step()
            optimizer.zero_grad()
        found.append(net[0].weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize(("kind", "key"), [("tensor", "count"), ("new", "steps"), ("none", "mean")])
def test_whatever_an_optimizer_counts_in_is_refused(kind, key):
    net = nn.Linear(2, 2)
    StepInBackward(Momentum(net.parameters(), kind))
    with pytest.raises(TypeError, match=f"each parameter alone, but Momentum changes its attribute '{key}' at each"):
        net(torch.ones(1, 2)).sum().backward()


def test_what_it_refuses():
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"StepInBackward: optimizer must be one of torch\.optim, got str"):
        StepInBackward("sgd")
    with pytest.raises(TypeError, match=r"StepInBackward: the optimizer must update each parameter alone, got LBFGS"):
        StepInBackward(torch.optim.LBFGS(net.parameters()))
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"StepInBackward: no parameter may have a gradient yet\. Call optimizer"):
        StepInBackward(torch.optim.SGD(net.parameters(), 0.1))
