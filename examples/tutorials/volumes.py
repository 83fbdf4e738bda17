r"""
A 3-D volume
============

Scans and simulations are volumes, and volumes are large: twice the side is eight times the voxels, and eight times the
memory of every activation. Here an invertible network of 3-D convolutions finds shapes in noise, and we count what its
training keeps.
"""

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from invertible import Coupling, Inverse, Merge, PadSplit, PixelUnshuffle, Reconstruct, Sequential, Store
from invertible.testing import measure_memory

torch.set_num_threads(1)  # on volumes as small as these, threads cost more than they gain

# %%
# Volumes with known shapes
# -------------------------
#
# A ball and a cube in each, of brightness 1 in noise of standard deviation 1: no threshold finds them. We put them
# there, so that we know the truth of each voxel.

SIDE = 24
grid = torch.stack(torch.meshgrid(*[torch.arange(SIDE)] * 3, indexing="ij"))


def volumes(count: int) -> tuple[Tensor, Tensor]:
    truth = torch.zeros(count, 1, SIDE, SIDE, SIDE)
    for each in truth:
        for norm in (2, torch.inf):  # a ball and a cube are all that is near a point, by two norms
            centre, radius = 5 + (SIDE - 10) * torch.rand(3, 1, 1, 1), 3 + 2 * torch.rand(())
            each[0][torch.linalg.vector_norm(grid - centre, ord=norm, dim=0) < radius] = 1
    return truth + torch.randn(truth.shape), truth


# %%
# The network
# -----------
#
# The layers are those for images. ``PixelUnshuffle(2)`` makes eight channels of each cube of eight voxels; couplings
# take any function, here one with ``torch.nn.Conv3d``. At the end a convolution makes eight logits for each cube,
# and the inverse of a second ``PixelUnshuffle(2)`` puts them where their voxels are.


def function(channels: int) -> nn.Module:
    convolution = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(nn.BatchNorm3d(channels), nn.ReLU(), convolution)


class Segmenter(nn.Module):
    def __init__(self, depth: int = 8, channels: int = 16) -> None:
        super().__init__()
        self.body = Sequential(
            PixelUnshuffle(2),
            PadSplit(8, 2 * channels),
            *(Coupling(function(channels)) for _ in range(depth)),
            Merge(),
        )
        self.head = nn.Sequential(nn.Conv3d(2 * channels, 8, 1), Inverse(PixelUnshuffle(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


# %%
# Training
# --------
#
# As ever, but for one line: :class:`~invertible.Reconstruct` keeps nothing between the couplings.

net = Segmenter()
net.body.backprop = Reconstruct()
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
for _ in range(60):
    images, truth = volumes(2)
    loss = binary_cross_entropy_with_logits(net(images), truth)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"relative error of a recovered input in the last step: {net.body.drift:.0e}")

# %%
# The Dice coefficient is the share that what was found and the truth have in common: 1 if they are the same.


def dice(found: Tensor, truth: Tensor) -> float:
    return (2 * (found * truth).sum() / (found.sum() + truth.sum())).item()


images, truth = volumes(8)
with torch.no_grad():
    found = (net.eval()(images) > 0).float()
best = max(dice((images > level).float(), truth) for level in torch.linspace(-1, 3, 41))
print(f"Dice on 8 new volumes: {dice(found, truth):.2f}, of the best threshold {best:.2f}")

figure, axes = plt.subplots(2, 3, figsize=(7, 5), layout="constrained", facecolor="white")
for i, row in enumerate(axes):
    slice_ = int(truth[i, 0].sum((1, 2)).argmax())  # the one with most of the shapes
    for ax, volume, title in zip(row, (images, truth, found), ("volume", "truth", "found"), strict=True):
        ax.imshow(volume[i, 0, slice_].numpy(), cmap="gray")
        ax.set(title=f"{title} {i + 1}", xlabel="x (voxels)", ylabel="y (voxels)")
        ax.label_outer()

# %%
# Memory against size
# -------------------
#
# The most that a training step of one volume takes at any time, for a network of 32 couplings. On ``"meta"``
# :func:`~invertible.testing.measure_memory` adds up bytes and computes nothing, so that we can try what would not fit.

sides = [64, 128, 256]
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained", facecolor="white")
for strategy, style in ((Store(), "o--"), (Reconstruct(), "s-")):
    peaks = []
    for side in sides:
        with torch.device("meta"):
            net, volume = Segmenter(depth=32), torch.zeros(1, 1, side, side, side)
        net.body.backprop = strategy
        peaks.append(measure_memory(lambda: net(volume).sum().backward(), "meta")[1].peak / 2**30)  # noqa: B023
    name = type(strategy).__name__
    ax.loglog(sides, peaks, style, label=f"{name}()")
    print(f"{name:11}", ", ".join(f"{side}³: {peak:.3g} GiB" for side, peak in zip(sides, peaks, strict=True)))
ax.set_title("memory against the size of a volume")
ax.set(xlabel="side of the volume (voxels)", ylabel="peak of a step (GiB)", xticks=sides, xticklabels=sides)
ax.xaxis.minorticks_off()
ax.legend(frameon=False)
ax.grid(alpha=0.3)

# %%
# The lines are parallel: both grow with the number of voxels, as the input does. Reconstruction divides by a constant,
# which is larger for deeper networks; by its cube root the side may grow.
#
# Where to go next
# ----------------
#
# * :func:`zoo.iunet` with ``dimensions=3``: an invertible U-Net, whose lower levels see further. So do the i-RevNets,
#   :func:`zoo.irevnet_small`, for classes of whole volumes.
# * ``python examples/volume_segmentation.py`` trains under a limit of 96 MiB, where stored activations do not fit.
# * :doc:`/budget`: to keep as much as fits.
