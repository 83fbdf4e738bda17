"""
Train deeper than memory allows
===============================

Ordinary training keeps every activation until the backward pass, so that a deeper network needs more memory. A network
with an inverse need not: it gets the input of each layer back from the output. Here both are counted, byte by byte, and
a network is trained that would not fit otherwise.
"""

import torch
from matplotlib import pyplot as plt
from torch import nn

from invertible import Budget, Coupling, Merge, Recompute, Reconstruct, Sequential, Split, Store
from invertible.backprop import Strategy
from invertible.testing import check_backprop, measure_memory

torch.manual_seed(0)
MiB = 2**20


def network(depth: int, backprop: Strategy) -> Sequential:
    def function() -> nn.Module:
        first, last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        nn.init.normal_(last.weight, std=0.01)  # a deep network begins near the identity
        return nn.Sequential(first, nn.ReLU(), last)

    return Sequential(Split(), *(Coupling(function()) for _ in range(depth)), Merge(), backprop=backprop)


x = torch.rand(4, 32, 32, 32)
print(f"the input: {x.nbytes / MiB:.1f} MiB")

# %%
# What is kept is a strategy
# --------------------------
# The network stays the same, and so do its values, its gradients and the names of its weights. What changes is what
# the forward pass leaves behind for the backward pass, and that is the option ``backprop``, which can be set later,
# too:
#
# * :class:`~invertible.Store` keeps all, as PyTorch does.
# * :class:`~invertible.Recompute` keeps the input of each layer, and runs the layer again for the rest.
# * :class:`~invertible.Reconstruct` keeps the input and the output of the network. Each layer's input is computed from
#   its output, the last layer's first.
# * :class:`~invertible.Budget` is told how many bytes there are, and chooses among the three for each layer.
#
# :func:`~invertible.testing.check_backprop` trains copies of a network for one step by each, compares what they leave
# behind with ``Store``'s, and raises if something differs by more than rounding:
shallow = network(8, Store())
print(check_backprop(shallow, x, strategies=[Recompute(), Reconstruct(), Budget(4 * MiB)]))

# %%
# "F runs" says what it costs: where not everything is stored, the functions inside the couplings run once more in the
# backward pass. ``drift`` says how far off a reconstructed input was, relative to its size.
#
# Bytes against depth
# -------------------
# :func:`~invertible.testing.measure_memory` counts at the allocator: what is still there when the function has
# returned, and the most that was there at any time. The first for a forward pass is what is kept for the backward
# pass; the second for a whole step decides whether the step fits. Gradients of parameters are allocated beforehand,
# for they do not depend on the strategy.


def counted(depth: int, backprop: Strategy) -> tuple[float, float]:
    net = network(depth, backprop)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _, forward = measure_memory(lambda: net(x))
    _, step = measure_memory(lambda: net(x).square().mean().backward())
    return forward.kept / MiB, step.peak / MiB


strategies = {"Store()": Store(), "Recompute()": Recompute(), "Budget(10 MiB)": Budget(10 * MiB)}
strategies |= {"Reconstruct()": Reconstruct()}
depths = [4, 8, 16, 24, 36]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
for (name, backprop), marker in zip(strategies.items(), "os^D", strict=True):
    columns = zip(*(counted(depth, backprop) for depth in depths), strict=True)
    for ax, sizes in zip(axes, columns, strict=True):
        ax.plot(depths, sizes, marker=marker, label=name)
for ax, title in zip(axes, ("kept from forward to backward", "peak of a training step"), strict=True):
    ax.set(title=title, xlabel="depth (couplings)", xticks=depths, ylim=0)
    ax.grid(alpha=0.3)
axes[0].set_ylabel("memory (MiB)")
legend = axes[0].legend(frameon=False)

# %%
# With ``Store`` each coupling adds half a MiB, with ``Recompute`` half of that, with ``Reconstruct`` nothing. A budget
# follows ``Store`` until there is no room left; from there on, what does not fit is reconstructed. :doc:`/budget` says
# what is outside of a budget: the loss, for example, and the workspaces of convolutions.
#
# A network that does not fit
# ---------------------------
# Say that there are 32 MiB, and that the network is to have 100 couplings. ``net.plan`` counts on tensors without
# data, so that nothing of this size need be allocated to learn how large it would be:
limit = 32 * MiB
net = network(100, Store())
print(f"Store:       {net.plan(x).peak / MiB:5.1f} MiB planned")
net.backprop = Reconstruct()
print(f"Reconstruct: {net.plan(x).peak / MiB:5.1f} MiB planned")

# %%
# So it trains by reconstruction. The target is the mean of each pixel's neighbours; Adam makes a few steps.
target = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)


def step() -> float:
    optimizer.zero_grad(set_to_none=False)  # gradients stay allocated, and are not counted again
    loss = (net(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


losses = [step()]  # the first step allocates gradients and Adam's averages
for _ in range(2):
    loss, memory = measure_memory(step)
    losses.append(loss)
    fits = "fits" if memory.peak < limit else "does not fit"
    print(f"loss {loss:.3f}, peak {memory.peak / MiB:.1f} MiB: {fits}; drift {net.drift:.0e}")
plt.show()

# %%
# ``net.drift`` compares what came back at the input with what had gone in; above 1e-4 there is a warning, above 1e-2
# an error, so that a network whose inverse is not good enough does not train on in silence.
#
# A limit that is only counted is one that a page can show. ``python examples/volume_segmentation.py`` from a checkout
# has the system itself refuse memory above 96 MiB: with ``--backprop store`` it ends, with reconstruction it trains.
#
# Where to go next
# ----------------
# * :doc:`/backprop`: what is promised, what is kept all the same, and what the same costs with other libraries.
# * :doc:`/budget`: how a budget is spent. :doc:`/drift`: what to do if there is a warning.
# * :doc:`exact_in_bf16`: no drift at all.
# * :doc:`volumes`: the networks that need it most.
