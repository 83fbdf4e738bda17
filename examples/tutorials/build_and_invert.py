"""
Build and invert a network
==========================

A network of couplings, forwards and backwards, on a photograph.
"""

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_sample_image
from torch import nn

from invertible import Coupling, Merge, PixelUnshuffle, Sequential, Split

image = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None, :, :424, :640] / 255


# %%
# Any function that keeps the shape of one stream will do: it is never inverted, see :class:`~invertible.Coupling`.
def function(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())


net = Sequential(PixelUnshuffle(2), Split(), *(Coupling(function(6)) for _ in range(10)), Merge())
with torch.no_grad():
    back = net.inverse(net(image))
print(f"largest difference: {(back - image).abs().max():.1e}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for ax, picture, title in zip(axes, (image, back), ("image", "net.inverse(net(image))"), strict=True):
    ax.imshow(picture[0].permute(1, 2, 0).clamp(0, 1).numpy())
    ax.set(title=title, xticks=[], yticks=[])
