"""Draws sums on grids and compares the kernel of ``benchmarks.triton_grid`` with its eager twin, to the bit.

A process of its own: Triton asks for ``TRITON_INTERPRET`` when it is imported.
"""

import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import triton_grid
from invertible import Coupling, Grid, Merge, Reconstruct, Sequential, Split, Store
from invertible._range import taken_down
from invertible._value import is_channels_last

torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy, of infinities
FORMS = ("contiguous", "last", "half", "half of last", "transposed", "vector")
SPECIAL = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e300, -1e300, 3e38, 1e-310, -0.0, 0.0]).double()
seen = {"served": 0, "not served": 0, "no number": 0}


def laid(x, form):
    """The same shape for all, in some layout."""
    if form == "vector":
        return x.flatten()
    if form == "transposed":
        return x.transpose(2, 3)
    if form == "half":
        return torch.cat((x, x), 1)[:, : x.shape[1]]
    if form == "half of last":
        return torch.cat((x, x), 1).to(memory_format=torch.channels_last)[:, x.shape[1] :]
    return x.to(memory_format=torch.channels_last) if form == "last" else x


def drawn(shape, grid, special):
    """Halfway cases, small and large numbers, at the limit and above it, and what is no number."""
    x = torch.randn(shape).double() * 2.0 ** torch.randint(-70, 16, shape)
    halfway = (torch.randint(-99, 99, shape) + 0.5) * grid.step
    edge = grid.limit * torch.tensor([1.0, -1.0, 0.5, 2.0]).double()[torch.randint(4, shape)] + halfway
    kind = torch.randint(8, shape)
    x = torch.where(kind == 0, halfway, torch.where(kind == 1, edge, x))
    return torch.where(kind == 7, SPECIAL[torch.randint(len(SPECIAL), shape)], x) if special else x


def same(found, true):
    """All bits but those that say which "no number" it is, and the layout."""
    assert found.dtype == true.dtype
    assert found.shape == true.shape
    number = ~true.isnan()
    assert torch.equal(found.isnan(), true.isnan())
    assert torch.equal(found[number], true[number])
    assert torch.equal(found[number].signbit(), true[number].signbit())
    strides = zip(found.shape, found.stride(), true.stride(), strict=True)
    assert all(a == b for size, a, b in strides if size > 1)


def add(grid, x, shift, sign):
    """The eager twin, and the range that it takes down."""
    with taken_down() as peaks:
        y = (grid.add if sign == 1 else grid.subtract)(x, shift)
    return y, *peaks


GRIDS = st.sampled_from([Grid(40), Grid(16, torch.float32), Grid(0), Grid(23, torch.float32), Grid(52)])
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.integers(1, 20))


@given(GRIDS, DTYPES, SHAPES, st.sampled_from(FORMS), st.sampled_from(FORMS[:2]), st.sampled_from([1, -1]), st.data())
def forward(grid, dtype, shape, form, other, sign, data):
    """Sums and their range, of the whole of floating-point numbers."""
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    special = data.draw(st.booleans())
    x = laid(grid.round(drawn(shape, grid, False).clamp(-grid.limit, grid.limit)), form)
    if special:
        x = torch.where(torch.rand(x.shape) < 0.01, torch.tensor(-0.0, dtype=x.dtype), x)
    shift = laid(drawn(shape, grid, special).to(dtype), form if data.draw(st.integers(0, 4)) else other)
    shift = shift.reshape(x.shape) if form == "vector" else shift
    if not triton_grid.serves(x, shift):
        seen["not served"] += 1
        return
    seen["served"] += 1
    true, found = add(grid, x, shift, sign), triton_grid.total(grid, x, shift, sign)
    same(found[0], true[0])
    seen["no number"] += bool(true[0].isnan().any())
    assert [float(v) for v in found[1:]] == [float(v) for v in true[1:]] or true[0].isnan().any()
    assert all(v.isnan() for v in found[1:]) == bool(true[0].isnan().any())


@given(GRIDS, DTYPES, SHAPES, st.sampled_from(FORMS), st.sampled_from([1, -1]), st.sampled_from(FORMS), st.data())
def backward(grid, dtype, shape, form, sign, form_of_grad, data):
    """Gradients of the stream and of the shift, in whatever layout they come."""
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    shift = laid(torch.randn(shape).to(dtype), form).detach()
    x = laid(grid.round(torch.randn(shape) / 64), form).detach()
    if not triton_grid.serves(x, shift):
        return
    values = drawn(shape, grid, data.draw(st.booleans())).to(grid.dtype)
    grad = laid(values, form_of_grad if form != "vector" else form)
    grad = grad if grad.shape == x.shape else grad.reshape(x.shape)
    outcomes = []
    for run in (lambda *args: add(*args)[0], triton_grid.TritonSum()):
        leaves = x.requires_grad_(), shift.requires_grad_()
        y = run(grid, *leaves, sign)
        outcomes.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    for found, true in zip(outcomes[1][:2], outcomes[0][:2], strict=True):
        same(found.contiguous(), true.contiguous())
    same(outcomes[1][2].contiguous(), outcomes[0][2].contiguous())
    assert is_channels_last(outcomes[1][2]) == is_channels_last(outcomes[0][2])


def network():
    """Every strategy, the inverse, and bf16 autocast: the bits of a network that sums by the kernel."""
    outcomes = []
    for strategy in (Store(), Reconstruct()):
        for kernel in (False, True):
            torch.manual_seed(0)
            functions = [torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
            net = Sequential(Split(), *map(Coupling, functions), Merge(), grid="exact", backprop=strategy)
            x = torch.randn(2, 8, 5, 5)
            if kernel:
                triton_grid.put(net)
            with torch.autocast("cpu", torch.bfloat16):
                y = net(x)
            y.square().sum().backward()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(net.inverse(y), net.snap(x))
            outcomes.append([y.detach(), torch.tensor(net.peak), *(p.grad for p in net.parameters())])
    for outcome in outcomes[1:]:
        for found, true in zip(outcome, outcomes[0], strict=True):
            assert torch.equal(found, true)


if __name__ == "__main__":
    assert triton_grid.ready_for(torch.zeros(1))
    count = int(sys.argv[1])
    for law in (forward, backward):
        settings(max_examples=count, derandomize=True, database=None, deadline=None)(law)()
    network()
    print(json.dumps(seen))
