"""
Exact inversion in bf16
=======================

A number in bfloat16 has 8 significant bits, one in single precision has 24. If the functions of a network run in
bfloat16, its inverse is off, and more so with depth. This page shows by how much, and how ``grid="exact"`` makes the
inverse and the gradients right to the last bit.
"""

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from invertible import Coupling, Merge, PixelUnshuffle, Reconstruct, Sequential, Split, Store
from invertible.testing import exactness_report

# sphinx_gallery_thumbnail_number = 2
torch.manual_seed(0)
torch.set_num_threads(1)  # on an image as small as this, threads cost more than they gain
photograph = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None]
image = photograph[:, :, 110:302, 240:432] / 255


def function() -> nn.Module:
    return nn.Sequential(nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 3, padding=1))


net = Sequential(PixelUnshuffle(4), Split(), *(Coupling(function()) for _ in range(120)), Merge())
bf16 = torch.autocast("cpu", torch.bfloat16)  # convolutions in bfloat16, sums in float32

# %%
# Why it goes wrong
# -----------------
# A coupling adds F(x₂) to x₁, and its inverse subtracts F(x₂) again. In floating point the sum is rounded, so that x₁
# comes back off in its last bit. The next coupling on the way back reads this x₁, and a function in bfloat16 may
# return a value that is off by a whole step then, which is 2⁻⁷ of its size. Each step is an error for all couplings
# before it.
with torch.no_grad(), bf16:
    back = net.inverse(net(image))
print(f"120 couplings in bf16: off by {(back - image).abs().max():.2f}, where values are from 0 to 1")

# %%
# On a grid
# ---------
# With ``grid="exact"`` the values between the layers are multiples of 2⁻⁴⁰, held in double precision: sums of such
# numbers are not rounded at all. F still runs in bfloat16; what it returns is rounded to the grid before it is added,
# and the inverse subtracts the same number. An 8-bit image is left as it is by the rounding at the entry.
net.grid = "exact"
with torch.no_grad(), bf16:
    exact = net.inverse(net(image))
print(f"the same on a grid: all bits are the image's: {torch.equal(exact.float(), image)}")

figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), layout="constrained")
axes[0].imshow(back[0].permute(1, 2, 0).clamp(0, 1).numpy())
axes[0].set_title("back from bf16")
for ax, found, title in zip(axes[1:], (back, exact), ("its error", "the error on a grid"), strict=True):
    ax.imshow((found - image).abs().amax(1)[0].numpy(), cmap="magma_r", vmin=0, vmax=0.05)
    ax.set_title(title)
for ax in axes:
    ax.set(xticks=[], yticks=[])
colours = figure.colorbar(axes[1].images[0], ax=axes[1:], label="absolute error", extend="max")

# %%
# Error against depth
# -------------------
# A slice of the network is a network of its own, on the same grid. In single precision the error grows with depth as
# well, from a lower start. On a grid there is none at any depth.
depths = [2, 5, 10, 20, 40, 80, 120]


@torch.no_grad()
def error(depth: int, *, in_bf16: bool) -> float:
    part = net[: 2 + depth]
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        return float((part.inverse(part(image)).double() - image.double()).abs().max())


figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for label, style, on_grid, in_bf16 in (
    ("bf16", "C0o-", False, True),
    ("float32", "C1s-", False, False),
    ('bf16, grid="exact"', "C2D-", True, True),
):
    net.grid = "exact" if on_grid else None
    ax.plot(depths, [error(depth, in_bf16=in_bf16) for depth in depths], style, label=label)
ax.set_yscale("symlog", linthresh=1e-8)
ax.set_title("error of the inverse against depth")
ax.set(
    xlabel="depth (couplings)", ylabel="largest error of the image", ylim=(-5e-9, 1), yticks=[0, 1e-7, 1e-5, 1e-3, 1e-1]
)
ax.grid(alpha=0.3)
legend = ax.legend(frameon=False)

# %%
# Gradients to the bit
# --------------------
# :class:`~invertible.Reconstruct` takes the input of each layer from its inverse, so that gradients are as good as the
# inverse is. Here are those of the first convolution of each coupling, against the gradients by stored activations.


def gradients(backprop: Store | Reconstruct) -> tuple[Tensor, ...]:
    net.backprop = backprop
    with bf16:
        features = net(image)
    loss = (features.float() - 1).square().mean()
    return torch.autograd.grad(loss, [p for name, p in net.named_parameters() if name.endswith("function.0.weight")])


figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for label, style, on_grid in (("bf16", "C0o", False), ('bf16, grid="exact"', "C2D", True)):
    net.grid = "exact" if on_grid else None
    stored = gradients(Store())
    found = gradients(Reconstruct(on_drift="record"))  # without a grid it would warn, or stop
    same = sum(map(torch.equal, stored, found))
    print(f"{label}: {same} of {len(stored)} gradients have the same bits, drift {net.drift:.0e}")
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(stored, found, strict=True)]
    ax.plot(range(1, 121), errors, style, markersize=3, label=label)
ax.set_yscale("symlog", linthresh=1e-4)
ax.set_title("reconstructed against stored gradients")
ax.set(xlabel="coupling, from the input", ylabel="relative error of the gradient", ylim=(-5e-5, 1))
ax.grid(alpha=0.3)
legend = ax.legend(frameon=False, loc="upper right")

# %%
# What it rests on
# ----------------
# The inverse must get the same bits from F as forward got. The library sees to what it can, and
# :func:`~invertible.testing.exactness_report` tries the rest on your network: the first rows must hold, the others say
# what must not change between the two ways.
with bf16:
    print(exactness_report(net[:6], torch.rand(4, 3, 32, 32)))
plt.show()

# %%
# Under :class:`~invertible.Reconstruct` a function that doesn't repeat its bits is found in the backward pass, and
# raises. The bits of two strategies may differ in gradients that are sums over several layers: of a condition, or of a
# parameter that layers share. Values that are doubled in size cost memory traffic; :doc:`/grid` has what was measured.
#
# Where to go next
# ----------------
# * :doc:`/grid`: which layers keep a grid, its range, and what must be repeated.
# * :doc:`/numerics`: when an inverse is exact and when it is not.
# * :doc:`where_inverses_blow_up`: errors that no precision cures.
# * :doc:`deeper_than_memory`: why gradients by reconstruction are worth it.
