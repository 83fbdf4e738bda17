r"""
Where an inverse blows up, and how to see it
============================================

On paper a network of invertible layers comes back from its output. In floating point the output is rounded, and the
inverse divides the rounding by the slope: where the map is flat, little is left of the input.
:cite:t:`behrmann2021` found this in many uses of such networks, with incorrect gradients among the consequences. Here
it is made in single layers, in depth and in training, and each time there is a way to see it.
"""

from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from invertible import (
    Additive,
    Affine,
    Coupling,
    CouplingTransform,
    DriftError,
    InvertibleLinear,
    Reconstruct,
    Sequential,
    Sigmoid,
    Split,
)
from invertible.testing import exactness_report

torch.set_num_threads(1)  # on values as few as these, threads cost more than they gain


def error(found: Tensor, true: Tensor) -> float:
    return float((found.detach() - true).norm() / true.norm())


# %%
# One law, three layers
# ---------------------
#
# Three maps with slopes down to 1e-7: the transform of an affine coupling whose scale is as good as :math:`e^a` without
# bounds; a matrix whose largest singular value is 1; and :class:`~invertible.Sigmoid`, which is flatter the larger x
# is.

x, shift = torch.randn(2, 1000, 8)
slopes, points = 10.0 ** -torch.arange(8), torch.arange(1.0, 16.0)
exponential = Affine(scale="exp-clamped", clamp=1000)
matrix, rotation = (InvertibleLinear(8, parametrization="free") for _ in range(2))  # both begin as rotations
first = matrix.dense().detach().clone()
by_scale, by_matrix, by_point = [], [], []
for slope in slopes:
    parameters = torch.cat([slope.log().expand(1000, 8), shift], dim=1)
    by_scale.append(error(exponential.inverse(exponential(x, parameters), parameters), x))
    values = torch.logspace(0, slope.log10().item(), 8)
    matrix.load_state_dict({"matrix.values": first * values @ rotation.dense()})
    by_matrix.append(error(matrix.inverse(matrix(x)), x))
for point in points:
    near = point + 0.5 * torch.rand(1000, 1)
    by_point.append(error(Sigmoid().inverse(Sigmoid()(near)), near))

# %%
# The dashed line is the law: the rounding of a value in single precision, 6e-8 of it, over the slope.

rounding = torch.finfo(torch.float32).eps / 2
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", facecolor="white", sharey=True)
figure.suptitle("error of the inverse against the slope, for three layers")
axes[0].set_ylabel("relative error of the inverse")
for ax, name, at, errors, law in (
    (axes[0], "coupling: 1 / scale", 1 / slopes, by_scale, rounding / slopes),
    (axes[1], "matrix: condition number", 1 / slopes, by_matrix, rounding / slopes),
    (axes[2], "Sigmoid: x", points, by_point, rounding / ((-points).sigmoid() * points)),
):
    ax.plot(at.tolist(), errors, "o")
    ax.plot(at.tolist(), law.tolist(), "k--")
    ax.set(xlabel=name, yscale="log", xscale="linear" if at is points else "log")
    ax.grid(alpha=0.3)

# %%
# What was rounded to the end of the range is lost for good, and is refused:

try:
    Sigmoid().inverse(Sigmoid()(torch.tensor([[20.0]])))
except ValueError as refused:
    print(refused)

# %%
# Depth multiplies
# ----------------
#
# One coupling with scales near 1 is harmless, but a stack multiplies the slopes of its layers. The true error takes the
# true input, which one seldom has: :meth:`net.inverse(y, estimate=True) <invertible.Sequential.inverse>` estimates it
# without.


def stack(transform: CouplingTransform, depth: int, **options: Any) -> Sequential:
    torch.manual_seed(0)
    couplings = []
    for _ in range(depth):
        last = nn.Linear(32, 4 * transform.parameters_per_element)
        nn.init.normal_(last.weight, std=0.2)
        couplings.append(Coupling(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), last), transform))
    return Sequential(Split(), *couplings, **options)


depths = [1, 2, 4, 8, 16, 32, 64]
transforms: dict[str, CouplingTransform] = {
    "exp(a)": exponential,
    "Affine(scale='sigmoid')": Affine(scale="sigmoid"),
    "Affine()": Affine(),
    "Additive()": Additive(),
}
figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained", facecolor="white")
for i, (name, transform) in enumerate(transforms.items()):
    true, estimated = [], []
    for net in (stack(transform, depth) for depth in depths):
        with torch.no_grad():
            back, estimate = net.inverse(net(x), estimate=True)
        true.append(error(back, x))
        estimated.append(estimate.relative)
    ax.loglog(depths, true, "os^D"[i] + "-", color=f"C{i}", markerfacecolor="white", label=name)
    ax.loglog(depths, estimated, "kx", label=None if i else "estimates")
ax.set_title("error of the inverse against depth")
ax.set(xlabel="couplings", ylabel="relative error of the inverse", xticks=depths, xticklabels=depths)
ax.xaxis.minorticks_off()
ax.legend(frameon=False)
ax.grid(alpha=0.3)

# %%
# Where the error is 1, nothing is left. That a scale is bounded above is not enough: the sigmoid shrinks values at each
# coupling. The default of :class:`~invertible.Affine`, and above all :class:`~invertible.Additive`, stay far below. The
# estimates are close until all is lost.
#
# In training
# -----------
#
# :class:`~invertible.Reconstruct` inverts in each backward pass, and compares what comes back with what went in. That
# is ``net.drift``. Above a limit it raises, before the optimizer can step; ``locate=True`` names the layer.

for transform in (Affine(), exponential):
    net = stack(transform, 48, backprop=Reconstruct(locate=True))
    try:
        torch.cat(net(x)).square().mean().backward()
        print(f"drift {net.drift:.0e} with {transform}")
    except DriftError as refused:
        print(refused)

# %%
# On a grid
# ---------
#
# On a :doc:`grid </grid>` the sums of additive couplings do not round, and there is nothing to multiply. It rests on
# functions that repeat their bits. Here one does not, for it draws from a generator of its own, and
# :func:`~invertible.testing.exactness_report` finds it.


class Noisy(nn.Linear):
    generator = torch.Generator()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1e-6 * torch.randn(input.shape, generator=self.generator)


net = stack(Additive(), 8, grid="exact")
print("exact:", exactness_report(net, x).exact)
net.insert(7, Coupling(Noisy(4, 4)))
report = exactness_report(net, x)
print("exact:", report.exact, "because of", report["again"].first)

# %%
# What helps
# ----------
#
# =========================  ===================================================================
# where                      what helps
# =========================  ===================================================================
# scales of couplings        ``Affine()``; ``Additive()`` where no density is wanted
# trained matrices           ``parametrization="householder"``, whose singular values are all 1
# ``Sigmoid`` and ``Tanh``   small inputs; ``Reconstruct`` keeps them, so that gradients are safe
# depth                      ``Reconstruct(anchor_every=10)``, or ``Store()``, for the gradients
# rounding                   ``grid="exact"``, or float64
# =========================  ===================================================================
#
# Where to go next
# ----------------
#
# * :doc:`/drift`: what to do when drift is reported.
# * :doc:`/couplings` has the errors of all transforms, :doc:`/mixing` the condition numbers of layers.
# * :doc:`/numerics` and :doc:`/grid`: when an inverse is exact.
# * ``python -m zoo.analysis sensitivity``, see :doc:`/analysis`: which block of a trained network amplifies most.

# sphinx_gallery_thumbnail_number = 2
