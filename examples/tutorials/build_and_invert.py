"""
Build and invert a network
==========================

A network of this library is a list of layers, each of which has an inverse. This page builds one, sends a photograph
through it, looks at what is inside, and gets the photograph back from the output.
"""

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from invertible import Coupling, Merge, PixelUnshuffle, Sequential, Split

torch.manual_seed(0)
photograph = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None] / 255
print(f"batch, channels, height, width: {tuple(photograph.shape)}, values from 0 to 1")


# %%
# The layers
# ----------
# Four kinds of layers are enough. :class:`~invertible.PixelUnshuffle` moves each square of 2 × 2 pixels into channels:
# of 3 channels it makes 12, at half the height and width. :class:`~invertible.Split` makes a pair of two streams of
# it, of 6 channels each, and :class:`~invertible.Merge` joins them again. These three only move numbers.
#
# What computes is :class:`~invertible.Coupling`. It adds a function of one stream to the other, and swaps the two:
#
# .. math:: (x_1, x_2) \mapsto (x_2,\; x_1 + F(x_2)), \qquad (y_1, y_2) \mapsto (y_2 - F(y_1),\; y_1).
#
# The second formula undoes the first, whatever F is: to go back, F is computed again and subtracted, but never
# inverted. So F may be any module that returns as many channels as the other stream has.
def function() -> nn.Module:
    first, last = nn.Conv2d(6, 32, 5, padding=2), nn.Conv2d(32, 6, 5, padding=2)
    return nn.Sequential(nn.InstanceNorm2d(6), first, nn.ReLU(), last)


net = Sequential(PixelUnshuffle(2), Split(), *(Coupling(function()) for _ in range(8)), Merge())
print(f"{len(net)} layers, bijective: {net.bijective}, inverse: {net.exactness.name.lower()}")

# %%
# What a layer cannot undo it refuses, before anything is computed. This photograph is 427 pixels high, and an odd
# number of rows does not make squares. The notes of the error say in which layer of which container it happened:
try:
    net(photograph)
except ValueError as error:
    print(error, *error.__notes__, sep="\n")

# %%
# One row less will do. (:class:`~invertible.Pad` adds rows instead, and takes them away on the way back.)
image = photograph[:, :, :426]

# %%
# Forwards and backwards
# ----------------------
# ``net(image)`` runs the layers in order, ``net.inverse(features)`` from the last to the first. The output has as many
# numbers as the input: nothing was thrown away, or there would be no way back.
with torch.no_grad():
    features = net(image)
    back = net.inverse(features)
print(f"{image.numel()} numbers in, {features.numel()} out, of shape {tuple(features.shape)}")
print(f"largest difference after the way back: {(back - image).abs().max():.1e}")

# %%
# That difference is rounding: each coupling adds and subtracts in single precision, and what one has lost in the last
# bit, the next ones enlarge. Below it is drawn at a scale of its own.
difference = (back - image).abs().amax(1)[0]
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
for ax, picture, title in zip(axes, (image, back), ("image", "net.inverse(net(image))"), strict=False):
    ax.imshow(picture[0].permute(1, 2, 0).clamp(0, 1).numpy())
    ax.set(title=title, xticks=[], yticks=[])
shown = axes[2].imshow((difference / 1e-6).numpy(), cmap="magma_r")
axes[2].set(title="absolute difference", xticks=[], yticks=[])
colours = figure.colorbar(shown, ax=axes[2], label="in millionths of the range of values")


# %%
# Inside
# ------
# A network is indexed and sliced like a list, and a slice is a network again: ``net[:4].inverse`` undoes the first
# four layers. ``net.trace(x)`` yields the output of each layer on the way forwards, and ``net.trace_inverse(y)`` the
# input of each layer on the way backwards. Here is one channel of the second stream on both ways: the upper row is to
# be read from the left to the right, the lower row from the right to the left, and they show the same.
def channel(value: tuple[Tensor, Tensor]) -> Tensor:
    return value[1][0, 0]


with torch.no_grad():
    forwards = dict(net.trace(image))  # by layer: what came out
    backwards = dict(net.trace_inverse(features))  # by layer: what had gone in
depths = (0, 2, 4, 6, 8)  # how many couplings have run
figure, axes = plt.subplots(2, len(depths), figsize=(10, 3.2), layout="constrained")
for column, depth in zip(axes.T, depths, strict=True):
    after, before = channel(forwards[f"{1 + depth}"]), channel(backwards[f"{2 + depth}"])
    column[0].set_title(f"after {depth} couplings")
    for ax, values in zip(column, (after, before), strict=True):
        ax.imshow(values.numpy(), cmap="gray", vmin=float(after.min()), vmax=float(after.max()))
        ax.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("forwards →")
axes[1, 0].set_ylabel("← backwards")
plt.show()

# %%
# The features are not trained, and look like the photograph seen through random filters; trained or not, the
# photograph is in them.
#
# Where to go next
# ----------------
# * :doc:`deeper_than_memory`: because the input of each layer comes back from its output, training need not store it.
# * :doc:`exact_in_bf16`: an inverse without even the rounding.
# * :doc:`own_layer`: a layer that is not in the library.
# * :doc:`/contract` says what every layer promises, :doc:`/layers` lists them all, and :doc:`/couplings` is about what
#   else a coupling can do than add.
