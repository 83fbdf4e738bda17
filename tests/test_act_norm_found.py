"""What was found in ActNorm: states that it did not see, and numbers that its buffers can't hold."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from invertible import ActNorm, Inverse, Sequential
from tests.test_act_norm import assert_normal, same, state


def test_a_call_with_other_buffers_leaves_the_first_batch_to_come():
    norm = ActNorm(2)
    others = {key: t.detach().clone() for key, t in norm.state_dict().items()}
    torch.func.functional_call(norm, others, (torch.randn(64, 2),))
    assert others["initialized"]
    assert not norm.initialized
    assert_normal(norm(3 * torch.randn(64, 2) + 5))


def test_buffers_that_are_written_are_read_anew():
    norm, fresh = ActNorm(2), ActNorm(2)
    norm(torch.randn(64, 2))
    for own, other in zip(norm.buffers(), fresh.buffers(), strict=True):
        own.copy_(other)
    assert_normal(norm(3 * torch.randn(64, 2) + 5))


def test_known_layers_run_under_torch_func_and_on_fake_tensors():
    """Where the buffer can't be read, what it was counts."""
    norm = ActNorm(2)
    norm(torch.randn(64, 2))
    x, state = torch.randn(3, 4, 2), {key: t.detach().clone() for key, t in norm.state_dict().items()}
    found = torch.func.vmap(lambda state, x: torch.func.functional_call(norm, state, (x,)), (None, 0))(state, x)
    torch.testing.assert_close(found, torch.stack([norm(each) for each in x]))
    with torch.inference_mode():
        torch.testing.assert_close(norm(x[0]), found[0])


@pytest.mark.parametrize("wrap", [lambda net: net, Inverse], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("dtype", "batch"),
    [
        (torch.float16, lambda x: 1e6 * x),
        (torch.float32, lambda x: 1e100 * x.double()),
        (torch.float32, lambda x: 1 + 1e-39 * x + 1e39 * x.double().sign()),
    ],
)
def test_statistics_that_the_buffers_cannot_hold_are_refused(dtype, batch, wrap):
    norm = ActNorm(2).to(dtype)
    before = state(norm)
    with pytest.raises(ValueError, match=f"must have a mean and a deviation that {dtype} holds, got a tensor"):
        wrap(norm)(batch(torch.randn(50, 2)))
    assert same(before, state(norm))
    assert norm(torch.randn(50, 2).to(dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_varies_in_16_bits_is_normalised(dtype):
    norm = ActNorm(2)
    y = norm((3 + 0.02 * torch.randn(50, 2)).to(dtype))
    torch.testing.assert_close(y.float().std(0, correction=0), torch.ones(2), atol=0.02, rtol=0)
    assert ActNorm(2)(torch.full((50, 2), 0.1, dtype=dtype)).abs().max() < 1e-6


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}], ids=["swa", "ema"])
def test_models_are_averaged_with_their_buffers(average):
    net = Sequential(ActNorm(2))
    averaged = AveragedModel(net, use_buffers=True, **average)
    for _ in range(3):
        net(torch.randn(64, 2) + 5)
        averaged.update_parameters(net)
    assert averaged.module[0].initialized == 1
    torch.testing.assert_close(averaged.module[0].mean, net[0].mean)


def test_one_graph_serves_whatever_was_written():
    norm, x = ActNorm(2), torch.randn(4, 2)
    norm(x)
    torch.compiler.reset()
    graphs = []
    compiled = torch.compile(norm, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), norm(x))
        norm.initialized.fill_(1)
    assert len(graphs) == 1


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_checkpoint_with_impossible_deviations_is_refused(bad):
    norm = ActNorm(2)
    before = state(norm)
    with pytest.raises(ValueError, match=r"ActNorm\(channels=2\): std must be positive and finite, got \[1\.0, "):
        norm.load_state_dict({**before, "std": torch.tensor([1.0, bad])})
    assert same(before, state(norm))
