"""Regional compilation: forward, replay and inverse run by the same graphs, and none is made twice."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import zoo
from invertible import Coupling, Reconstruct, Store


def look(function):
    """What makes functions one kind."""
    return repr(function), tuple(p.shape for p in function.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("grid", "strategy", "backend"),
    [
        ("exact", Reconstruct(), "eager"),
        pytest.param(None, Reconstruct(), "aot_eager", marks=pytest.mark.slow),
        pytest.param("exact", Reconstruct(), "aot_eager", marks=pytest.mark.slow),
        pytest.param("exact", Store(), "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_an_i_revnet_keeps_its_graphs(grid, strategy, backend):
    torch.compiler.reset()
    net = zoo.create("irevnet_small")
    net.backprop, net.grid = strategy, grid
    graphs = CompileCounterWithBackend(backend)
    net.compile_functions(backend=graphs)
    functions = [layer.function for layer in net.body if isinstance(layer, Coupling)]
    kinds = len(set(map(look, functions)))
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    made = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            net(x).square().mean().backward()
            made.append(len(graphs.graphs))
        with torch.no_grad():
            net.body.inverse(net.body(x))
            made.append(len(graphs.graphs))
            net.body.inverse(net.body(x))
            made.append(len(graphs.graphs))
    assert kinds < len(functions)
    assert made[0] == made[1]
    assert made[2] == made[3]
    if grid is None:
        assert made == [kinds] * 4
    elif strategy == Reconstruct():  # sums, too, have graphs: there, back, and by where a stream begins
        assert made == [made[0]] * 4
        assert made[0] <= kinds + 4
