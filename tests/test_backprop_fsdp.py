"""Two processes with FSDP2 train as one does; where it can't, that is said before anything is computed."""

import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import invertible as inv
from invertible import Coupling, Recompute, Reconstruct, Sequential, Store
from invertible.testing import measure_memory
from tests.distributed import on_two
from tests.networks import assert_same, function
from tests.test_backprop_ddp import batch, built, in_one, loss_of, optimizer_of

SAVING = [Reconstruct(), Reconstruct(anchor_every=2), Recompute(), Recompute(every=2)]
saving = pytest.mark.parametrize("strategy", SAVING, ids=repr)


def sharded(net, where, *, register=True, **options):
    """Applies ``fully_shard`` to the root, and to every block, stage or function; and makes ``inverse`` gather, too."""
    mesh = init_device_mesh("cpu", (2,))
    kinds = {"root": (), "block": Coupling, "stage": Sequential}
    for part in list(net.modules())[1:]:
        if where == "function" and isinstance(part, Coupling):
            fully_shard(part.function, mesh=mesh, **options)
        elif where != "function" and isinstance(part, kinds[where]):
            fully_shard(part, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    for part in net.modules():
        if register and isinstance(part, FSDPModule) and isinstance(part, inv.InvertibleModule):
            register_fsdp_forward_method(part, "inverse")
    return net


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_half(rank, name, strategies, where, compiled=False, **options):
    found = []
    for strategy in strategies:
        net = sharded(built(name, strategy), where, **options)
        if compiled:
            net.compile_functions(backend="aot_eager")
        optimizer = optimizer_of(net)
        for step in range(3):
            loss_of(net(batch(step, rank))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found.append({k: whole(p).detach() for k, p in net.named_parameters()})
    return found


@pytest.mark.parametrize("name", ["plain", "frozen", "shared", "nested", "backwards"])
@pytest.mark.parametrize("where", ["root", "block", "stage"])
def test_two_processes_train_as_one(where, name):
    strategies = [s for s in SAVING if where != "block" or s != Recompute(every=2)]
    expected = in_one(name)[0]
    for mine in on_two(train_half, name, strategies, where):
        for each in mine:
            assert_same(each, {k: expected[k] for k in each}, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["root", "block"])
def test_compiled_functions_train_as_one_too(where):
    expected = in_one("plain")[0]
    for mine in on_two(train_half, "plain", [Reconstruct(), Recompute()], where, True):
        for each in mine:
            assert_same(each, {k: expected[k] for k in each}, 1e-10)


def refused(rank, strategy, where):
    net = sharded(built("plain", strategy), where)
    before = {k: b.clone() for k, b in net.named_buffers()}
    with pytest.raises(ValueError, match="fully_shard must be applied to a layer of the network") as raised:
        net(batch(0, rank))
    assert all(torch.equal(b, before[k]) for k, b in net.named_buffers())
    return str(raised.value)


@saving
def test_sharding_inside_a_function_is_refused(strategy):
    for message in on_two(refused, strategy, "function"):
        assert message.startswith("FSDPSequential(): fully_shard must")
        assert "got '1.function', a part that is run again" in message
        assert "only Store() can train it" in message


def test_sharding_inside_a_segment_is_refused():
    assert on_two(refused, Recompute(every=2), "block")[0].startswith("FSDPCoupling(): fully_shard must")


def test_the_documented_way_out_is_store():
    expected = in_one("plain")[0]
    for mine in on_two(train_half, "plain", [Store()], "function"):
        assert_same(mine[0], {k: expected[k] for k in mine[0]}, 1e-10)


def kept_bytes(rank, depth, where):
    net = Sequential(*[Coupling(function(4)) for _ in range(depth)], backprop=Reconstruct())
    sharded(net, where, reshard_after_forward=True)
    pair = tuple(torch.randn(4, 4, 16, 16) for _ in range(2))
    sum(t.square().sum() for t in net(pair)).backward()
    return measure_memory(lambda: net(pair))[1].kept


@pytest.mark.parametrize("where", ["root", "block"])
def test_memory_stays_flat(where):
    shallow, deep = (on_two(kept_bytes, depth, where)[0] for depth in (4, 12))
    assert deep - shallow < 8 * 1024  # of a stream of 16 KiB, and what FSDP keeps of the sharded gradients


def through_the_inverse(rank, strategy, register):
    net = sharded(built("plain", strategy), "block", register=register)
    loss_of(net.inverse(batch(0, rank))).backward()
    return {k: p.grad.full_tensor() for k, p in net.named_parameters()}


@pytest.mark.parametrize("strategy", [Store(), Reconstruct(), Recompute()])
def test_gradients_through_a_registered_inverse(strategy):
    net = built("plain", None)
    for rank in range(2):
        (loss_of(net.inverse(batch(0, rank))) / 2).backward()
    for found in on_two(through_the_inverse, strategy, True):
        assert_same(found, {k: p.grad for k, p in net.named_parameters()}, 1e-10)


def test_what_the_docs_say_of_an_inverse_that_is_not_registered():
    with pytest.raises(AssertionError, match=r"got mixed torch\.Tensor and DTensor"):
        on_two(through_the_inverse, Reconstruct(), False)


def narrow(rank, where):
    functions = [torch.nn.Conv2d(4, 4, 1) for _ in range(3)]
    net = Sequential(inv.Split(), *map(Coupling, functions), inv.Merge(), backprop=Reconstruct(drift_error=9))
    wide = torch.float32 if where.endswith("outputs") else None
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=wide)
    sharded(net, where.split(",")[0], mp_policy=policy)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        net(batch(0, rank).float()).float().sum().backward()
    return [str(each.message) for each in found if issubclass(each.category, inv.DriftWarning)]


def untrained(rank, frozen):
    net = sharded(built("plain", Reconstruct()).requires_grad_(not frozen), "function")
    with torch.set_grad_enabled(frozen):
        return net(batch(0, rank))


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_not_trained_may_be_sharded_anywhere(frozen):
    expected = built("plain", None)(batch(0, 0))
    torch.testing.assert_close(on_two(untrained, frozen)[0], expected.detach())


@pytest.mark.parametrize("where", ["root", "block", "block, wide outputs"])
def test_a_policy_that_makes_the_streams_narrow_is_warned_of(where):
    for messages in on_two(narrow, where):
        assert "values of torch.bfloat16 enter" in messages[0]
        assert "a MixedPrecisionPolicy without param_dtype" in messages[0]


def mixed(rank, strategy):
    """The documented way: autocast around float32 parameters, and gradients reduced in float32."""
    net = sharded(built("plain", strategy).float(), "block", mp_policy=MixedPrecisionPolicy())
    with torch.autocast("cpu", torch.bfloat16):
        y = net(batch(0, rank).float())
    loss_of(y).backward()
    return {k: p.grad.full_tensor() for k, p in net.named_parameters()}


def test_autocast_under_sharding():
    for found, expected in zip(on_two(mixed, Reconstruct()), on_two(mixed, Store()), strict=True):
        assert_same(found, expected, 1e-2)
