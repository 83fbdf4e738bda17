r"""
Interpolate between two photographs
===================================

An invertible network makes an image of *any* features. So one can walk along the straight line between the features of
two photographs and look at what lies there, as :cite:t:`jacobsen2018` do in their Figure 5. Here it is done with a
network that is trained for seconds. The pictures show how it is done, and what training changes; what ImageNet teaches
a network, they do not show.
"""

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_sample_images
from torch.nn.functional import avg_pool2d, cross_entropy

import zoo
from zoo.analysis import equal_steps, interpolate

torch.set_num_threads(1)  # on images as small as these, threads cost more than they gain

# %%
# The images and the network
# --------------------------
#
# scikit-learn comes with two photographs. Scaled to a quarter, a square of each, of 96 pixels, is an end of the line.
# The network is the small i-RevNet of :doc:`the zoo </zoo>`, with two classes: *temple* and *flower*. On the
# :doc:`grid </grid>` ``"exact"`` its inverse has no error, so that all we shall see is the map, and not its rounding.

photographs = [avg_pool2d(torch.tensor(image).permute(2, 0, 1) / 255, 4) for image in load_sample_images().images]
temple, flower = (image[:, 4:100, 30:126] for image in photographs)

net = zoo.irevnet_small(num_classes=2)
net.grid = "exact"

# %%
# The line
# --------
#
# With :math:`\Phi` the map from an image to its features, the images on the line are
#
# .. math:: x_t = \Phi^{-1}\bigl(t\,\Phi x_0 + (1 - t)\,\Phi x_1\bigr), \qquad 0 \le t \le 1.

net.eval()
with torch.no_grad():
    first, second = net.features(torch.stack([temple, flower])).split(1)
    middle = net.inverse(0.5 * first + 0.5 * second)
print("features", tuple(first.shape), "image", tuple(middle.shape))

# %%
# :func:`zoo.analysis.interpolate` does this for several steps at once, and mixes the pixels, too, for comparison. Equal
# steps of t need not be equal steps between the images: :func:`zoo.analysis.equal_steps` finds some that are.

untrained = interpolate(net, temple, flower, equal_steps(net, temple, flower, 7, rounds=2))

# %%
# Train it
# --------
#
# Let it tell squares of 32 pixels of one photograph from those of the other. So it learns two photographs by heart,
# which is no achievement; but with it the functions in the couplings begin to do something.

squares = [image.unfold(1, 32, 4).unfold(2, 32, 4).flatten(1, 2).movedim(1, 0) for image in photographs]
images, labels = torch.cat(squares), torch.arange(2).repeat_interleave(len(squares[0]))
optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
strips = {"untrained": untrained}

net.train()
for step in range(1, 101):
    batch = torch.randint(len(images), (16,))
    loss = cross_entropy(net(images[batch]), labels[batch], label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in {20, 100}:
        steps = equal_steps(net, temple, flower, 7, rounds=2)
        strips[f"{step} steps"] = interpolate(net, temple, flower, steps)

# %%
# What lies on the line
# ---------------------

rows = {"mixed pixels": untrained.pixels} | {f"features,\n{name}": found.images for name, found in strips.items()}
figure, axes = plt.subplots(len(rows), 7, figsize=(9, 5.4), layout="constrained", facecolor="white")
figure.suptitle("from the temple to the flower, by pixels and by features")
axes[0, 0].set_title("t = 1")
axes[0, -1].set_title("t = 0")
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    row[0].set_ylabel(name)
    for ax, picture in zip(row, pictures, strict=True):
        ax.imshow(picture.float().clamp(0, 1).permute(1, 2, 0).numpy())
        ax.set(xticks=[], yticks=[])

# %%
# As torch initialises convolutions, the functions in the couplings add little: untrained, the network does hardly more
# than move pixels about, and the line between its features is nearly the cross-fade of the images.
#
# Training leads the line elsewhere. The images in between fill with coloured noise, and both photographs shine through.
# Nothing forbids the noise: training asked for features that tell the photographs apart, never for likely images
# between them. Of a network trained on ImageNet the paper says, too, that "intermediary images are noisy, even for
# small deformations, yet they mostly remain recognizable" (section 4.2). There some rotations of faces become straight
# lines, which two photographs can't show.
#
# The ends are the photographs, bit for bit. In between we measure how far an image is from the mixed pixels at the same
# t: the root mean square (RMS) over its values, where black and white are 1 apart.

print("ends bit for bit:", torch.equal(strips["100 steps"].images[[0, -1]].float(), torch.stack([temple, flower])))
figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained", facecolor="white")
for (name, found), style in zip(strips.items(), ("o--", "^-.", "s-"), strict=True):
    apart = (found.images - found.pixels).square().flatten(1).mean(1).sqrt()
    ax.plot(found.steps, apart.tolist(), style, label=name)
    beyond = ((found.images < 0) | (found.images > 1)).double().mean()
    print(f"{name:9}  path {sum(found.distances):.2f}, {100 * beyond:.0f} % of the values beyond [0, 1]")
ax.set_title("features against mixed pixels")
ax.set(xlabel="t, share of the temple's features", ylabel="distance from mixed pixels\n(RMS of a value in [0, 1])")
ax.legend(frameon=False)
ax.grid(alpha=0.3)

# %%
# The path is the sum of the steps, in the same unit. Values beyond [0, 1] are clipped in the pictures.
#
# How far the line leads depends on the training. Run this with another ``weight_decay``: with 0.001 the path is more
# than twice as long, with 0.05 it is nearly the cross-fade again.
#
# Where to go next
# ----------------
#
# * :doc:`/analysis` has the command that draws this of a network and images of your own, and more analyses.
# * :doc:`/irevnet` reads the paper, and says what we chose where it is silent.
# * :doc:`/tutorials/where_inverses_blow_up`: why a small step between features can be a large one between images.
