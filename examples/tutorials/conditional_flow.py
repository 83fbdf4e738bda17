"""
A conditional flow
==================

A flow is a density made of an invertible network; a conditional flow is a density for each value of a condition. This
page builds a small one, fits it to points in the plane by maximum likelihood, and compares it with the density that
the points come from.
"""

import math

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from invertible import ActNorm, Conditional, Coupling, Flow, Merge, RationalQuadraticSpline, Sequential, Split

torch.manual_seed(0)
torch.set_num_threads(1)  # the matrices are small: sharing them among threads takes longer than computing them


# %%
# The data
# --------
# Points of a curve with noise, and how far the curve swings is the condition c:
#
# .. math:: x_1 \sim \mathcal{N}(0, 1), \qquad x_2 \sim \mathcal{N}\left(c \sin(2 x_1), 0.2^2\right).
#
# The density of such points is known, and so is what the flow misses. It only sees points, with c between -1.5 and
# 1.5.
NOISE, LARGEST = 0.2, 1.5


def draw(c: Tensor) -> Tensor:
    """A point for each row of c, which is (points, 1)."""
    first = torch.randn_like(c)
    return torch.cat((first, c * (2 * first).sin() + NOISE * torch.randn_like(c)), 1)


def true_log_density(x: Tensor, c: Tensor) -> Tensor:
    first, second = x.split(1, 1)
    off = (second - c * (2 * first).sin()) / NOISE
    return (-0.5 * (first**2 + off**2) - math.log(2 * math.pi * NOISE))[:, 0]


# %%
# The flow
# --------
# A coupling bends one of the two numbers by a monotonic spline, whose knots a function computes from the other number
# *and the condition*; :class:`~invertible.Conditional` joins the two. The next coupling bends the other number.
# :class:`~invertible.ActNorm` at the entry shifts and scales, and takes its first numbers from the first batch.
# :class:`~invertible.Flow` puts a standard normal distribution at the exit.
spline = RationalQuadraticSpline(bins=8, bound=4.0)


def function() -> nn.Module:
    last = nn.Linear(64, spline.parameters_per_element)
    nn.init.zeros_(last.weight)  # with all parameters 0 a spline is the identity
    nn.init.zeros_(last.bias)
    return Conditional(nn.Sequential(nn.Linear(1 + 1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), last))


couplings = (layer for _ in range(4) for layer in (Split(), Coupling(function(), spline), Merge()))
flow = Flow.standard_normal(Sequential(ActNorm(2), *couplings), (2,), condition=torch.zeros(1, 1))

# %%
# Fit it
# ------
# ``flow(condition, value=x)`` returns the log-density of each sample, in nats, and its mean is what is maximised. New
# points are drawn in each step, with a condition each.
optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
for step in range(500):
    c = LARGEST * (2 * torch.rand(256, 1) - 1)
    loss = -flow(c, value=draw(c)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 100 == 0 or step == 499:
        print(f"step {step}: {-loss.item():.2f} nats")
flow.eval()
entropy = 0.5 * math.log(2 * math.pi * math.e) * 2 + math.log(NOISE)
print(f"the true density of its own points, in the mean: {-entropy:.2f} nats")

# %%
# Its densities
# -------------
# One network, and a density for each condition. In colour is what the flow says; a line surrounds where the true
# density is above 5 % of its highest value. The condition of the last picture is not among those in training.
axis = torch.linspace(-3, 3, 140)
second, first = torch.meshgrid(axis, axis, indexing="ij")
places = torch.stack((first, second), -1).reshape(-1, 2)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained", sharey=True)
for ax, value in zip(axes, (-1.5, 0.0, 0.75, 2.5), strict=True):
    c = torch.full((len(places), 1), value)
    with torch.no_grad():
        density = flow(c, value=places).exp().reshape(second.shape)
    ax.imshow(density.numpy(), origin="lower", extent=(-3, 3, -3, 3), cmap="magma_r", vmin=0, vmax=0.8)
    known = true_log_density(places, c).exp().reshape(second.shape)
    ax.contour(axis.numpy(), axis.numpy(), known.numpy(), [0.05 * float(known.max())], colors="C0", linewidths=0.8)
    ax.set(title=f"c = {value}", xlabel="$x_1$")
axes[0].set_ylabel("$x_2$")
colours = figure.colorbar(axes[0].images[0], ax=axes, label="density (per unit of area)")

# %%
# ``flow(c)`` is a distribution of PyTorch, with ``sample`` and ``log_prob``: two points for each of three conditions
# are
print(flow(torch.tensor([[-1.5], [0.0], [0.75]])).sample((2,)).shape)

# %%
# How far off, and where not to ask
# ---------------------------------
# The mean of the true log-density less the flow's, over new points, is the Kullback-Leibler divergence: 0 if they are
# the same. It is small for conditions as in training, and for others it is not: there nothing was learnt.
values = torch.linspace(-2.5, 2.5, 41)
divergences = []
for value in values:
    c = value.expand(2000, 1)
    x = draw(c)
    with torch.no_grad():
        divergences.append(float((true_log_density(x, c) - flow(c, value=x)).mean()))
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
ax.axvspan(-LARGEST, LARGEST, color="0.9", label="conditions in training")
ax.plot(values.numpy(), divergences, ".-")
ax.set(title="the flow against the truth", xlabel="condition c", ylabel="divergence (nats)", yscale="log")
legend = ax.legend(frameon=False)
inside = [d for value, d in zip(values, divergences, strict=True) if abs(value) <= LARGEST]
print(f"divergence in training's range: {sum(inside) / len(inside):.3f} nats; at c = 2.5: {divergences[-1]:.1f}")
plt.show()

# %%
# Where to go next
# ----------------
# * :doc:`/flows`: this flow with one call, :func:`zoo.spline_flow`, posteriors of inverse problems, and images.
# * :doc:`/couplings`: conditions of other shapes, such as labels and images, and transforms other than the spline.
# * :doc:`/coming_from`: the same tasks in other libraries' lines.
# * :doc:`own_layer`: what a wrong log-determinant does to a density.
