"""Networks for the tests of the gradient engine, and all that a training step leaves behind."""

import copy
import threading
from contextlib import nullcontext

import torch
from hypothesis import strategies as st
from torch import nn

import invertible as inv
from invertible._value import leaves, map_value
from tests.rows import Scale, seeded

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
METHODS = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det")


def function(channels, out=None, *, dims=2, norm=True, stride=1, dropout=0.0):
    """A smooth F: its derivatives don't jump where the input is off by rounding."""
    layers = [NORM[dims](channels)] if norm else []
    layers += [nn.SiLU(), CONV[dims](channels, out or channels, 3, padding=1, stride=stride)]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []))


class Conditioned(nn.Module):
    """F of a stream and a condition of shape ``(batch, channels)``."""

    def __init__(self, channels, dims=2):
        super().__init__()
        self.inner = function(channels, dims=dims)

    def forward(self, x, condition):
        return self.inner(x * condition.view(*condition.shape, *[1] * (x.ndim - 2)))


class UsersAffine(inv.InvertibleModule):
    """An affine coupling as a user would write it: with no rule for its gradients."""

    def __init__(self, channels, dims=2, dropout=0.0):
        super().__init__()
        self.net = function(channels, 2 * channels, dims=dims, dropout=dropout)

    def forward(self, x, *, condition=None):
        log_scale, shift = self.net(x[1]).tanh().chunk(2, 1)
        return x[1], x[0] * log_scale.exp() + shift

    def inverse(self, y, *, condition=None):
        log_scale, shift = self.net(y[0]).tanh().chunk(2, 1)
        return (y[1] - shift) * (-log_scale).exp(), y[0]

    def forward_and_log_det(self, x, *, condition=None):
        log_scale, shift = self.net(x[1]).tanh().chunk(2, 1)
        return (x[1], x[0] * log_scale.exp() + shift), log_scale.flatten(1).sum(1)


class Averaged(nn.Module):
    """Reads a buffer that it writes: what it does depends on how often it ran."""

    def __init__(self, mean=None):
        super().__init__()
        self.register_buffer("mean", torch.ones(()) if mean is None else mean)

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.detach().abs().mean())
        return torch.tanh(x / self.mean.clone())


class Functional(nn.Module):
    """Reads and writes statistics by ``batch_norm``, which does not count its writes in their versions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("var", torch.ones(2))

    def forward(self, x):
        center = self.mean.view(1, -1, 1, 1).clone()
        return torch.tanh(nn.functional.batch_norm(x, self.mean, self.var, training=self.training) + center)


def deep(depth, channels=4, **options):
    """A tensor to a tensor through couplings."""
    couplings = [inv.Coupling(function(channels, **options)) for _ in range(depth)]
    return inv.Sequential(inv.Split(), *couplings, inv.Merge()).double()


def draw_layers(draw, channels, dims, *, nested=True, additive=False):
    """Layers from a pair to a pair of the same channels; downsampling ones multiply them."""
    layers = []
    kinds = ["coupling", "conditioned", "affine", "swap", "inverse", "down", "parallel"]
    if additive:
        kinds = [kind for kind in kinds if kind not in {"affine", "parallel"}]
    for kind in draw(st.lists(st.sampled_from(kinds + ["nested"] * nested), max_size=5), label="layers"):
        if kind == "coupling":
            layers.append(inv.Coupling(function(channels, dims=dims, norm=draw(st.booleans()))))
        elif kind == "conditioned" and channels == 2:
            layers.append(inv.Coupling(Conditioned(channels, dims)))
        elif kind == "affine":
            layers.append(UsersAffine(channels, dims))
        elif kind == "swap":
            layers.append(inv.Swap())
        elif kind == "inverse":
            layers.append(inv.Inverse(inv.Sequential(inv.Swap(), inv.Coupling(function(channels, dims=dims)))))
        elif kind == "down" and channels == 2:
            out = channels * 2**dims
            layers.append(inv.Coupling(function(channels, out, dims=dims, stride=2), downsample=inv.PixelUnshuffle(2)))
            channels = out
        elif kind == "parallel":
            layers.append(inv.Parallel(inv.Sequential(Scale(), inv.Permute.reversed(channels)), inv.Identity()))
        elif kind == "nested":
            inner, channels = draw_layers(draw, channels, dims, nested=False, additive=additive)
            layers.append(inv.Sequential(*inner))
    return layers, channels


def draw_network(draw, *, additive=False):
    """A bijective network of a tensor with 4 channels, its input, a condition, and whether it is in training."""
    dims = draw(st.integers(1, 3), label="dims")

    def make():
        layers, _ = draw_layers(draw, 2, dims, additive=additive)
        return inv.Sequential(inv.Split(), *layers, inv.Merge())

    net = seeded(draw, make).train(draw(st.booleans(), label="train"))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99), label="data"))
    batch, size = draw(st.integers(2, 3), label="batch"), draw(st.sampled_from([4, 8]), label="size")
    x = torch.randn(batch, 4, *[size if dims < 3 else 4] * dims, generator=generator, dtype=torch.float64)
    return net, x, torch.rand(batch, 2, generator=generator, dtype=torch.float64) + 0.5


def outcome(
    net, x, condition=None, *, method="forward", grad=True, autocast=None, inside=False, copies=True, compiled=None
):
    """All that one training step on a copy of the network leaves behind; or on itself, as a compiled one, say."""
    net = copy.deepcopy(net) if copies else net
    net.zero_grad()
    torch.manual_seed(7)
    x, condition = (
        None if v is None else map_value(lambda t: t.detach().clone().requires_grad_(grad), v) for v in (x, condition)
    )
    call = (net if method == "forward" else getattr(net, method)) if compiled is None else compiled
    context = autocast if autocast is not None else nullcontext()
    with context:
        result = call(x, condition=condition)
        parts = list(leaves(result))
        loss = sum(
            (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).view_as(t)).sum() for t in parts
        )
        if inside:
            loss.backward()
    if not inside and loss.requires_grad:  # an empty network has nothing to train
        loss.backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(parts)}
    found |= {f"input {i}": t.grad for i, t in enumerate(leaves(x)) if grad}
    found |= {f"condition {i}": t.grad for i, t in enumerate(leaves(condition)) if grad and condition is not None}
    found |= {f"parameter {k}": p.grad for k, p in net.named_parameters()}
    found |= {f"buffer {k}": b.clone() for k, b in net.named_buffers()}
    found["random stream"] = torch.get_rng_state()
    return found, net


def off(found, expected):
    """The largest difference of any tensor, relative to its own size, and where it is.

    What is nothing but rounding, such as the gradient of a bias in front of a batch norm, is not looked at closely.
    """
    worst = (0.0, "nowhere")
    sizes = [v.norm().item() for v in expected.values() if v is not None and v.dtype.is_floating_point]
    least = 1e-4 * max(sizes, default=0.0)
    for key, value in expected.items():
        other = found[key]
        if value is None or other is None:
            # Zero and no gradient are the same to an optimizer that starts from none.
            assert value is other or not (value if other is None else other).any(), key
        elif not value.dtype.is_floating_point:
            assert torch.equal(value, other), key
        else:
            size = max(value.norm().item(), least) or 1.0
            worst = max(worst, ((value - other).norm().item() / size, key))
    return worst


def assert_same(found, expected, limit=1e-12):
    error, where = off(found, expected)
    assert error <= limit, f"{where} is off by {error:.1e}"


def with_strategy(net, strategy):
    net = copy.deepcopy(net)
    net.backprop = strategy
    return net


def in_threads(*functions):
    """What the functions return, or raise, when they run at the same time."""
    found = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def run(i):
        barrier.wait()
        try:
            found[i] = functions[i]()
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
