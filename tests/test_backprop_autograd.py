"""The engine is used as any other part of autograd, and says so where it can't be."""

import copy
import warnings

import pytest
import torch
from torch import nn

import invertible as inv
from invertible import Budget, Coupling, Recompute, Reconstruct, Sequential, Store
from invertible._value import leaves
from invertible.backprop import is_replaying
from tests.networks import UsersAffine, assert_same, deep, function, outcome, with_strategy

SAVING = [Reconstruct(), Reconstruct(anchor_every=2), Recompute(), Recompute(every=2)]
saving = pytest.mark.parametrize("strategy", SAVING)


def data(*shape, grad=True):
    return torch.randn(*(shape or (4, 8, 5, 5)), dtype=torch.float64, requires_grad=grad)


def named_gradients(net):
    return {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}


def compared(net, strategy, train):
    """What ``train(net)`` returns, and the gradients, under a strategy and under ``Store``."""
    results = []
    for each in (strategy, Store()):
        mine = with_strategy(net, each)
        torch.manual_seed(11)
        found = train(mine)
        found = {str(i): t for i, t in enumerate(found or ())}
        results.append(found | named_gradients(mine))
    return results


@saving
def test_an_input_without_grad_trains_every_block(strategy):
    net, x = deep(3), data(grad=False)
    found, expected = compared(net, strategy, lambda net: net(x).square().sum().backward())
    assert all(g is not None for g in found.values())
    assert_same(found, expected)


@saving
@pytest.mark.parametrize("frozen", [(1,), (3,), (1, 2, 3)])
def test_frozen_blocks_get_no_gradient_and_pass_it_on(frozen, strategy):
    net, x = deep(3), data()
    for i in frozen:
        net[i].requires_grad_(False)
    next(net[2].parameters()).requires_grad_(False)
    found, expected = compared(net, strategy, lambda net: torch.autograd.grad(run(net, x), x))
    assert all(found[k] is None for k, p in net.named_parameters() if not p.requires_grad)
    assert_same(found, expected)


def run(net, x):
    y = net(x).square().sum()
    if any(p.requires_grad for p in net.parameters()):
        y.backward(retain_graph=True)
    return y


def test_frozen_blocks_cost_no_gradient():
    """The derivatives of frozen weights are not computed: no convolution is asked for them."""
    net = deep(3).requires_grad_(False)
    net.backprop = Reconstruct()
    asked = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            asked.append(tuple(ctx.needs_input_grad))
            return grad, None

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

        def forward(self, x):
            return Watch.apply(x, self.weight)

    net.insert(2, Coupling(Weighted()))
    net(data()).sum().backward()
    assert asked == [(True, False)]
    y = net(data(grad=False))
    assert not y.requires_grad
    assert y.grad_fn is None


@saving
def test_flags_that_are_switched_between_forward_and_backward(strategy):
    def train(net):
        y = net(x)
        net[1].requires_grad_(False)
        net[2].requires_grad_(True)
        y.square().sum().backward()
        assert not any(p.requires_grad for p in net[1].parameters())

    net, x = deep(3), data()
    net[2].requires_grad_(False)
    found, expected = compared(net, strategy, train)
    assert_same(found, expected)


@saving
def test_autograd_grad_twice_with_retain_graph(strategy):
    def train(net):
        y = net(x).square().sum()
        first = torch.autograd.grad(y, [x, *net.parameters()], retain_graph=True)
        second = torch.autograd.grad(y, [x, *net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, x)
        return second

    net, x = deep(3), data()
    assert_same(*compared(net, strategy, train))


@saving
def test_backward_for_some_inputs_only(strategy):
    def train(net):
        y = net(x).square().sum()
        y.backward(inputs=list(net[2].parameters()), retain_graph=True)
        assert all(p.grad is None for p in net[1].parameters())
        y.backward(inputs=[x])
        grad, x.grad = x.grad, None
        return [grad]

    net, x = deep(3), data()
    assert_same(*compared(net, strategy, train))


@saving
def test_gradients_accumulate(strategy):
    def train(net):
        for _ in range(3):
            net(torch.randn(4, 8, 5, 5, dtype=torch.float64)).square().sum().backward()

    assert_same(*compared(deep(3), strategy, train))


@saving
def test_two_forwards_before_one_backward(strategy):
    def train(net):
        a, b = net(x), net(2 * x)
        (a * b).sum().backward()
        x.grad = None

    net, x = deep(3, dropout=0.3), data()
    assert_same(*compared(net, strategy, train))


@saving
def test_two_forwards_with_backwards_in_either_order(strategy):
    def train(net):
        a, b = net(x).square().sum(), net(2 * x).square().sum()
        a.backward()
        b.backward()

    net, x = deep(3, dropout=0.3), data(grad=False)
    assert_same(*compared(net, strategy, train))


@saving
def test_shared_blocks_and_a_network_in_a_loop(strategy):
    block, other = Coupling(function(4)), Coupling(function(4))
    net = Sequential(inv.Split(), block, other, block, inv.Sequential(other, block), inv.Merge()).double()
    x = data()
    assert_same(*compared(net, strategy, lambda net: net(net(x)).square().sum().backward()))


@saving
def test_several_consumers_of_an_intermediate_value(strategy):
    """A hook takes a value from inside; the loss depends on it and on the output."""

    def train(net):
        taken = []
        handle = net[2].register_forward_hook(lambda module, args, output: taken.append(output))
        y = net(x)
        handle.remove()
        loss = y.square().sum() + taken[0][0].sin().sum() + (taken[0][1] * 3).sum()
        return torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True)

    net, x = deep(4), data()
    assert_same(*compared(net, strategy, train))


def test_a_loss_of_an_inner_value_alone_is_refused():
    net, x = with_strategy(deep(3), Reconstruct()), data()
    taken = []
    net[2].register_forward_hook(lambda module, args, output: taken.append(output[1]))
    net(x)
    with pytest.raises(
        RuntimeError, match=r"Coupling\(\): its output can't be reconstructed, because the loss depends"
    ):
        taken[0].sum().backward()


@saving
def test_an_unused_part_of_the_output(strategy):
    net = Sequential(inv.Split(), *[Coupling(function(4)) for _ in range(3)]).double()
    x = data()
    for part in (0, 1):
        assert_same(*compared(net, strategy, lambda net, part=part: net(x)[part].square().sum().backward()))


@pytest.mark.parametrize("strategy", [each for each in SAVING if each != Recompute(every=2)])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch does not look for tensors in tuples
def test_hooks_on_layers_fire_once_and_may_change_values(strategy):
    """Whatever a hook puts in place of a value, the layer before keeps what was there."""

    def train(net):
        fired = []
        net[1].register_forward_pre_hook(lambda *_: fired.append("pre"))
        net[1].register_forward_hook(lambda m, args, out: fired.append("post"))
        net[2].register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
        net[3].register_forward_pre_hook(lambda m, args: ((args[0][0], args[0][1].sin()),))
        net[1].register_full_backward_hook(lambda *_: fired.append("backward"))
        net[4].register_full_backward_hook(lambda *_: fired.append("backward"))
        net(x).square().sum().backward()
        assert sorted(fired) == ["backward", "backward", "post", "pre"]

    net, x = deep(4), data()
    assert_same(*compared(net, strategy, train))


def test_hooks_inside_a_segment_fire_in_the_replay_too():
    def train(net):
        replays = []
        net[2].register_forward_hook(lambda m, args, out: replays.append(is_replaying()) or (out[0] * 2, out[1]))
        net(x).square().sum().backward()
        assert replays == ([False, True] if net.backprop == Recompute(every=2) else [False])

    net, x = deep(4), data()
    assert_same(*compared(net, Recompute(every=2), train))


def test_a_full_backward_hook_does_not_cost_memory():
    from tests.test_backprop_memory import kept

    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    net = Sequential(inv.Split(), *[Coupling(function(8)) for _ in range(4)], inv.Merge(), backprop=Reconstruct())
    kept(net, x)
    before = kept(net, x)
    for layer in net:
        layer.register_full_backward_hook(lambda *_: None)
    kept(net, x)
    assert kept(net, x) == before


@saving
def test_hooks_on_parameters_fire_once_per_gradient(strategy):
    def train(net):
        fired = []
        for p in net.parameters():
            p.register_hook(lambda grad: fired.append(1) or 2 * grad)
            p.register_post_accumulate_grad_hook(lambda p: fired.append(1))
        net(x).square().sum().backward()
        assert len(fired) == 2 * len(list(net.parameters()))

    net, x = deep(2), data()
    assert_same(*compared(net, strategy, train))


@saving
def test_saved_tensors_may_be_moved_away(strategy):
    def train(net):
        with torch.autograd.graph.save_on_cpu():
            y = net(x)
        return torch.autograd.grad(y.square().sum(), [x, *net.parameters()])

    net, x = deep(3), data()
    assert_same(*compared(net, strategy, train))


@saving
def test_inside_torchs_checkpoint(strategy):
    from torch.utils.checkpoint import checkpoint

    net, x = deep(3, norm=False), data()
    assert_same(*compared(net, strategy, lambda net: checkpoint(net, x, use_reentrant=False).square().sum().backward()))


# What is not allowed


@saving
def test_the_callers_tensors_are_left_alone(strategy):
    net = with_strategy(Sequential(inv.Split(), Coupling(function(4)), UsersAffine(4), inv.Merge()), strategy).double()
    x, condition = data(), data(4, 4)
    before = [(t.clone(), t._version, t.data_ptr(), t.untyped_storage().nbytes()) for t in (x, condition)]
    y = net(x, condition=condition)
    grad = torch.randn_like(y)
    before.append((grad.clone(), grad._version, grad.data_ptr(), grad.untyped_storage().nbytes()))
    output = y.detach().clone()
    y.backward(grad)
    for t, (value, *rest) in zip((x, condition, grad), before, strict=True):
        assert torch.equal(t, value)
        assert [t._version, t.data_ptr(), t.untyped_storage().nbytes()] == rest
    assert torch.equal(y, output)


@pytest.mark.parametrize("last", [inv.Merge, inv.Swap])
@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.detach().mul_(2)], ids=["with graph", "behind it"])
def test_an_output_changed_in_place_raises(change, last):
    """At once or in backward, as torch has it."""
    net = Sequential(inv.Split(), *[Coupling(function(4)) for _ in "ab"], last(), backprop=Reconstruct()).double()
    y = net(data())
    y = y[0] if isinstance(y, tuple) else y

    def use():
        change(y)
        y.sum().backward()

    with pytest.raises(RuntimeError, match="modified"):
        use()


@saving
def test_the_output_is_no_view(strategy):
    """Of which FSDP would warn, and in-place changes at once."""
    for net in (with_strategy(deep(2), strategy), Sequential(*with_strategy(deep(2), strategy)[:2], backprop=strategy)):
        assert not any(t._is_view() for t in leaves(net(data())))


@saving
def test_a_weight_changed_in_place_raises(strategy):
    net = with_strategy(deep(3), strategy)
    y = net(data())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(data()).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"Coupling\(\).*: a parameter was changed in place between forward and"):
        y.sum().backward()


def test_a_weight_behind_autograds_back_is_found_by_the_drift():
    net = with_strategy(deep(3), Reconstruct())
    y = net(data())
    for p in net.parameters():
        p.data = p.data * 2
    with pytest.raises(inv.DriftError):
        y.sum().backward()


@saving
def test_other_parameters_than_in_forward_raise(strategy):
    net = with_strategy(deep(1), strategy)
    others = {k: (2 * p).detach().requires_grad_() for k, p in net.named_parameters()}
    y = torch.func.functional_call(net, others, data())
    with pytest.raises(RuntimeError, match=r"its parameters are no longer those of the forward pass"):
        y.sum().backward()


@saving
def test_a_network_that_was_cast_meanwhile_says_so(strategy):
    """``weight.data`` is replaced without a word to autograd; the replay met two dtypes, or rounded weights."""
    net = with_strategy(deep(2), strategy)
    y = net(data())
    net.float()
    with pytest.raises(
        RuntimeError, match=r"a parameter was cast from torch\.float64 to torch\.float32 between forward"
    ):
        y.sum().backward()


@pytest.mark.parametrize("strategy", [*SAVING, Budget(10**9)])
def test_values_made_in_inference_mode(strategy):
    net = with_strategy(deep(2), strategy)
    with torch.inference_mode():
        x = data(grad=False)
    with pytest.raises(RuntimeError, match=r"Sequential: inputs and conditions .*inference_mode\. .* x\.clone\(\)"):
        net(x)
    net(x.clone()).sum().backward()
    net.requires_grad_(False).eval()
    assert torch.equal(net(x), net(x.clone()))  # as under Store, there is nothing to train


@pytest.mark.filterwarnings("ignore")  # of torch, that it is deprecated
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(3, 2))])
def test_torchscript_is_for_stored_activations(make):
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh())
    net, same = (Sequential(inv.Split(), Coupling(f), inv.Merge()) for f in (make(copy.deepcopy(plain)), plain))
    x = torch.randn(3, 4)
    assert torch.equal(net(x), same(x))
    before = [b.clone() for b in net.buffers()]
    assert torch.equal(net.inverse(x), same.inverse(x))
    assert all(torch.equal(b, a) for b, a in zip(before, net.buffers(), strict=True))
    for strategy in [*SAVING, Budget(10**9)]:
        net.backprop = strategy
        with pytest.raises(TypeError, match=r"Sequential: a function must not be TorchScript, .* Store\(\)\."):
            net(x)


@saving
def test_a_condition_changed_in_place_raises(strategy):
    net = with_strategy(Sequential(inv.Split(), UsersAffine(4), inv.Merge()).double(), strategy)
    condition = data(4, 4, grad=False)
    y = net(data(), condition=condition)
    condition.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@saving
def test_a_trained_tensor_that_is_no_parameter_is_refused(strategy):
    outside = torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)

    class Captures(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(x) * outside

    net = with_strategy(Sequential(inv.Split(), Coupling(Captures()), inv.Merge()).double(), strategy)
    with pytest.raises(
        RuntimeError, match=r"depends on a tensor of shape \(4, 1, 1\) that requires gradients and is no"
    ):
        net(data()).sum().backward()


@saving
def test_a_function_that_writes_to_its_input_is_named(strategy):
    net = with_strategy(Sequential(inv.Split(), Coupling(nn.ReLU(inplace=True)), inv.Merge()), strategy)
    with pytest.raises(ValueError, match=r"Coupling\(\): the function must not write to its input") as error:
        net(torch.randn(2, 4, 3, 3, requires_grad=True))
    assert any("in Sequential, layer 1 of 3, forward" in note for note in error.value.__notes__)


def test_a_layer_that_writes_to_its_input_is_named():
    class Writes(inv.InvertibleModule):
        def forward(self, x, *, condition=None):
            return x.mul_(2)

        def inverse(self, y, *, condition=None):
            return y / 2

    net = Sequential(inv.Identity(), Writes(), backprop=Reconstruct())
    with pytest.raises(ValueError, match=r"Writes\(\): a layer must not write to its input, but it did"):
        net(torch.ones(1, 2, requires_grad=True) * 1)


@saving
def test_a_function_with_tuple_output_is_refused(strategy):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    net = with_strategy(Sequential(inv.Split(), Coupling(Two()), inv.Merge()), strategy)
    with pytest.raises(TypeError, match=r"Coupling\(\): the function must return a tensor, got a tuple of a tensor"):
        net(torch.randn(2, 4, requires_grad=True))


@saving
def test_second_derivatives_are_refused_with_the_way_out(strategy):
    net, x = with_strategy(deep(2), strategy), data()
    (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives need the activations.* Use backprop=Store\(\)"):
        grad.square().sum().backward()
    net.backprop = Store()
    (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()


@saving
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # torch's own forward-mode formulas
def test_function_transforms_and_forward_mode_take_the_plain_path(strategy):
    plain = deep(2, norm=False)
    net, x = with_strategy(plain, strategy), data(3, 8, 4, 4, grad=False)
    assert_same({"g": torch.func.grad(lambda x: net(x).sin().sum())(x)},
                {"g": torch.func.grad(lambda x: plain(x).sin().sum())(x)}, 0)  # fmt: skip
    each = torch.func.vmap(torch.func.grad(lambda x: net(x[None]).sin().sum()))(x)
    assert_same({"g": each}, {"g": torch.func.grad(lambda x: plain(x).sin().sum())(x)})
    parameters = dict(net.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(net, p, x).sin().sum())(parameters)
    expected = torch.func.grad(lambda p: torch.func.functional_call(plain, p, x).sin().sum())(
        dict(plain.named_parameters())
    )
    assert_same(found, expected, 0)
    tangent = torch.randn_like(x)
    assert_same({"t": torch.func.jvp(net, (x,), (tangent,))[1]}, {"t": torch.func.jvp(plain, (x,), (tangent,))[1]}, 0)
    with torch.autograd.forward_ad.dual_level():
        dual = net(torch.autograd.forward_ad.make_dual(x, tangent))
        expected = plain(torch.autograd.forward_ad.make_dual(x, tangent))
        a, b = (torch.autograd.forward_ad.unpack_dual(t).tangent for t in (dual, expected))
        assert torch.equal(a, b)
    hessian = torch.func.hessian(lambda x: net(x).sin().sum())(x[:1, :, :1, :1])
    assert hessian.any()


@saving
def test_export_takes_the_plain_path(strategy):
    net, x = with_strategy(deep(2), strategy).eval(), data(grad=False)
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), net(x))
    assert not any("Node" in str(node.target) for node in exported.graph.nodes)


@saving
def test_tracing_takes_the_plain_path(strategy):
    net, x = with_strategy(deep(2), strategy).eval(), data(grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and our checks of shapes become constants
        traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), net(x))


@saving
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(context, strategy):
    net, x = with_strategy(deep(2), strategy), data()
    with context():
        y = net(x)
    assert y.grad_fn is None
    torch.testing.assert_close(y, copy.deepcopy(net)(x), rtol=0, atol=1e-12)


# Forms


@saving
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_to_three_spatial_dimensions(dims, strategy):
    net = deep(3, dims=dims)
    x = data(4, 8, *[4] * dims)
    assert_same(outcome(with_strategy(net, strategy), x)[0], outcome(net, x)[0])


@saving
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_is_kept(dims, strategy):
    form = torch.channels_last if dims == 2 else torch.channels_last_3d
    net = Sequential(*[Coupling(function(4, dims=dims)) for _ in range(3)], backprop=strategy).to(memory_format=form)
    pair = tuple(torch.randn(2, 4, *[4] * dims).contiguous(memory_format=form).requires_grad_() for _ in "ab")
    seen = []
    for layer in net:
        layer.function.register_forward_hook(
            lambda m, args, out: seen.append((args[0].is_contiguous(memory_format=form), out.stride()))
        )
    y = net(pair)
    assert all(t.is_contiguous(memory_format=form) for t in y)
    sum(t.square().sum() for t in y).backward()
    assert len(seen) == 6
    assert all(kept for kept, _ in seen)
    assert len({strides for _, strides in seen}) == 1
    assert all(t.grad.is_contiguous(memory_format=form) for t in pair)


@saving
def test_complex_and_integer_streams(strategy):
    net = Sequential(inv.Swap(), inv.Permute.reversed(4), backprop=strategy)
    with pytest.raises(TypeError, match="pair of tensors"):
        net(torch.ones(2, 4))
    net = Sequential(inv.Permute.reversed(4), inv.Split(), inv.Swap(), inv.Merge(), backprop=strategy)
    z = torch.randn(2, 4, dtype=torch.complex64, requires_grad=True)
    net(z).abs().sum().backward()
    torch.testing.assert_close(z.grad, (z / z.abs()).detach())
    assert torch.equal(net(torch.arange(8).view(2, 4)), torch.tensor([[1, 0, 3, 2], [5, 4, 7, 6]]))


@saving
def test_an_empty_network_and_an_empty_batch(strategy):
    x = torch.randn(2, 4, requires_grad=True)
    assert Sequential(backprop=strategy)(x) is x
    net = with_strategy(deep(2, norm=False), strategy)
    y = net(data(0, 8, 4, 4))
    y.sum().backward()
    assert y.shape == (0, 8, 4, 4)


@saving
def test_errors_say_where(strategy):
    net = with_strategy(deep(2), strategy)
    with pytest.raises(TypeError, match="expected a pair") as error:
        Sequential(net, Coupling(nn.Tanh()), backprop=strategy)(data())
    assert error.value.__notes__[-1].startswith("in Sequential, layer 1 of 2, forward")


@saving
def test_lazy_modules_find_their_shape_in_the_first_run(strategy):
    net = with_strategy(Sequential(inv.Split(), Coupling(nn.LazyConv2d(2, 1)), inv.Merge()), strategy)
    for _ in range(2):
        net(torch.randn(3, 4, 5, 5)).sum().backward()
    assert net[1].function.weight.grad.any()


@saving
def test_on_the_meta_device(strategy):
    with torch.device("meta"):
        net = Sequential(inv.Split(), *[Coupling(function(4)) for _ in range(3)], inv.Merge(), backprop=strategy)
        x = torch.randn(2, 8, 4, 4, requires_grad=True)
        net(x).sum().backward()
    assert x.grad.shape == x.shape
    assert net.drift is None
