"""What every network of the zoo that is made of invertible layers is held to."""

import copy
from itertools import product

import torch

from invertible import Recompute, Reconstruct, Store
from invertible.testing import measure_memory


def psi_nd(x):
    """Pixel-major unshuffling by two, by index, in any number of dimensions."""
    offsets = product(range(2), repeat=x.ndim - 2)
    return torch.cat([x[(slice(None), slice(None), *(slice(i, None, 2) for i in each))] for each in offsets], dim=1)


def psi_nd_inverse(y, dimensions):
    """Undoes :func:`psi_nd`."""
    parts = y.chunk(2**dimensions, dim=1)
    x = torch.empty(y.shape[0], parts[0].shape[1], *(2 * size for size in y.shape[2:]), dtype=y.dtype)
    for part, each in zip(parts, product(range(2), repeat=dimensions), strict=True):
        x[(slice(None), slice(None), *(slice(i, None, 2) for i in each))] = part
    return x


def randomize(net, size=0.1):
    """No parameter is where its initialisation put it: zeros hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return net


def step(net, x, strategy):
    """The output, the gradients and the buffers that a training step on a copy leaves behind."""
    net = copy.deepcopy(net)
    keys = list(net.state_dict())
    net.backprop = strategy
    assert list(net.state_dict()) == keys
    x = x.clone().requires_grad_()
    y = net(x)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"gradient of {key}": p.grad for key, p in net.named_parameters()}
    return found | {f"buffer {key}": b for key, b in net.named_buffers()}, net


def check_gradients(net, x, grid=None):
    """Whatever is kept, a step leaves the same behind: up to rounding in float64, and bit for bit on a grid."""
    if grid is None:
        net, x = net.double(), x.double()
    net = randomize(net)
    net.grid = grid
    expected, _ = step(net, x, Store())
    for strategy in (Recompute(every=2), Reconstruct()):
        found, copied = step(net, x, strategy)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if grid is not None:
                assert torch.equal(found[key], value), f"{strategy}: {key}"
                continue
            size = value.double().norm().item() if value.is_floating_point() else 0.0
            error = (found[key] - value).double().norm().item()
            assert error <= 1e-9 * max(size, 1.0), f"{strategy}: {key} is off by {error:.1e} of {size:.1e}"
        assert copied.drift is not None or not isinstance(strategy, Reconstruct)


def kept(net, x):
    """Bytes that are held between forward and backward, above those of the output."""
    y, memory = measure_memory(lambda: net(x))
    return memory.kept - y.untyped_storage().nbytes()


def check_memory(make, x, depths=(2, 6)):
    """With Reconstruct() no byte is kept per block, and with Store() some are."""
    found = {}
    for strategy in (Store(), Reconstruct()):
        for depth in depths:
            net = make(depth)
            net.backprop = strategy
            kept(net, x)  # what torch allocates once is not ours
            found[str(strategy), depth] = kept(net, x)
    shallow, deep = (found[str(Reconstruct()), depth] for depth in depths)
    assert deep == shallow, f"{(deep - shallow) / (depths[1] - depths[0])} bytes per block are kept"
    shallow, deep = (found[str(Store()), depth] for depth in depths)
    assert deep - shallow > x.nbytes
