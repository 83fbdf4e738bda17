r"""
From your ResNet to a reversible one
====================================

A residual unit :math:`y = x + F(x)` has to keep its input for the gradients, since it can't be recovered from the output.
Cut the stream in two, and it can: :math:`(x, \tilde x) \mapsto (\tilde x, x + F(\tilde x))` is undone by subtracting
:math:`F(\tilde x)`, whatever F is. Here a small ResNet becomes such a network, step by step.
"""

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from invertible import Coupling, Merge, PadSplit, PixelUnshuffle, Reconstruct, Sequential
from invertible.testing import measure_memory
from zoo.digits import split_digits

torch.set_num_threads(1)  # on images as small as these, threads cost more than they gain
training, held_out = split_digits()  # scikit-learn's digits, 8 by 8 pixels, from 0 to 16

# %%
# The ResNet
# ----------
#
# A stem, two stages of three units, and a head. Between the stages a stride halves height and width.


def function(channels: int, out: int, stride: int = 1) -> nn.Module:
    first = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)]
    return nn.Sequential(*first, nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1, bias=False))


def head(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )


class Unit(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.function = function(channels, out, stride)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.function(x)


def resnet(units: int = 3) -> nn.Module:
    stem = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
    stage_1 = [Unit(16, 16) for _ in range(units)]
    stage_2 = [Unit(16, 32, stride=2), *(Unit(32, 32) for _ in range(units - 1))]
    return nn.Sequential(stem, *stage_1, *stage_2, head(32))


# %%
# What must change
# ----------------
#
# * **The units.** Each becomes a :class:`~invertible.Coupling` with the same kind of F. A coupling changes one stream and
#   swaps them, so that the next one changes the other. Inside, F may be as wide as you like.
# * **Widths.** A stream has half of the channels. Nothing may be lost, so that they never become fewer.
# * **Strides.** Where F has a stride, both streams are downsampled without loss: ``PixelUnshuffle(2)`` moves each square
#   of four pixels into four channels. So a stage has four times the channels of the one before, where ResNets double them.
# * **The stem.** A convolution of 1 channel into 16 is not invertible. ``PixelUnshuffle(2)`` and
#   :class:`~invertible.PadSplit` take its place: four channels, then zeros, as a pair of streams of eight.
# * **The head** stays. It loses information, and it may: it comes last.


def reversible(units: int = 3) -> nn.Module:
    body = Sequential(
        PixelUnshuffle(2),
        PadSplit(4, 16),
        *(Coupling(function(8, 8)) for _ in range(units)),
        Coupling(function(8, 32, stride=2), downsample=PixelUnshuffle(2)),
        *(Coupling(function(32, 32)) for _ in range(units - 1)),
        Merge(),
    )
    return nn.Sequential(body, head(64))


# %%
# Does it still learn?
# --------------------
#
# Both networks see the 1,442 training digits eight times. The reversible one trains by
# :class:`~invertible.Reconstruct`: it keeps its input and its output, and recovers what lies between from the output.


def train(net: nn.Module, epochs: int = 8) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=epochs, steps_per_epoch=23)
    accuracies = []
    for _ in range(epochs):
        net.train()
        for batch in torch.randperm(len(training.images)).split(64):
            loss = cross_entropy(net(training.images[batch] / 16), training.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            hits = net(held_out.images / 16).argmax(1) == held_out.labels
        accuracies.append(100 * hits.float().mean().item())
    return accuracies


nets = {"ResNet": resnet(), "reversible": reversible()}
nets["reversible"][0].backprop = Reconstruct()
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", facecolor="white")
for (name, net), style in zip(nets.items(), ("o--", "s-"), strict=True):
    accuracies = train(net)
    left.plot(range(1, 9), accuracies, style, label=name)
    size = sum(p.numel() for p in net.parameters())
    print(f"{name}: {size:,} parameters, {accuracies[-1]:.1f} % of {len(held_out.labels)} digits held out")
print(f"largest error of a recovered input in the last step: {nets['reversible'][0].drift:.0e}")
for units in (3,6,12,24): pass
