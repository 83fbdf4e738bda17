"""
Your own invertible layer and its laws
======================================

A layer is a class with two methods. This page writes one, asks the library's laws whether it is right, sees what they
say of two wrong versions, and trains it without stored activations.
"""

import math

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import softplus

from invertible import ActNorm, Coupling, Flow, InvertibleModule, Merge, Reconstruct, Sequential, Split, Value
from invertible.testing import check, check_backprop

# sphinx_gallery_thumbnail_number = 2
generator = torch.manual_seed(0)


# %%
# The layer
# ---------
# The sinh-arcsinh transformation bends the real line: it makes tails heavier or lighter, and one of them longer than
# the other. For a channel with the trained numbers a and b,
#
# .. math::
#     y = \sinh\left(e^a (\operatorname{arsinh} x + b)\right)
#
#     x = \sinh\left(e^{-a} \operatorname{arsinh} y - b\right)
#
#     \frac{dy}{dx} = e^a \, \frac{\cosh\left(e^a (\operatorname{arsinh} x + b)\right)}{\sqrt{1 + x^2}}.
#
# (Jones and Pewsey, `Sinh-arcsinh distributions <https://doi.org/10.1093/biomet/asp053>`_, Biometrika 2009; the
# parameters are those of TensorFlow Probability, with the exponential added.)
#
# ``forward`` and ``inverse`` are enough. ``forward_and_log_det`` is for densities: it also returns the logarithm of
# how much the layer stretches the space around each sample, which is the sum over the elements of log dy/dx.
class SinhArcsinh(InvertibleModule[Tensor, Tensor]):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tails = nn.Parameter(torch.zeros(channels))  # a
        self.skew = nn.Parameter(torch.zeros(channels))  # b

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        return self.bent(x).sinh()

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        return (y.asinh() * (-self.tails).exp() - self.skew).sinh()

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        u = self.bent(x)
        log_cosh = u.abs() + softplus(-2 * u.abs()) - math.log(2)  # does not overflow
        return u.sinh(), (self.tails + log_cosh - 0.5 * (1 + x * x).log()).sum(1)

    def bent(self, x: Tensor) -> Tensor:
        return self.tails.exp() * (x.asinh() + self.skew)


# %%
# Three channels with numbers of their own, and what each makes of x:
layer = SinhArcsinh(3)
layer.tails.data, layer.skew.data = torch.tensor([0.4, -0.4, 0.0]), torch.tensor([0.0, 0.0, 0.8])
x = torch.linspace(-3, 3, 301)[:, None].expand(-1, 3)
figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
lines = ax.plot(x.numpy(), layer(x).detach().numpy())
ax.set(title="sinh-arcsinh transformations", xlabel="x", ylabel="y")
legend = ax.legend(lines, ["a = 0.4, b = 0", "a = -0.4, b = 0", "a = 0, b = 0.8"], frameon=False)

# %%
# Its laws
# --------
# :func:`~invertible.testing.check` tries each law of :doc:`the contract </contract>` on the layer: that the inverse is
# one, that the log-determinant is that of autograd's Jacobian, that nothing writes to what it was given, and so on.
# The input is small and in double precision, for Jacobians are compared. The parameters are away from 0, where the
# layer is the identity, and much that is wrong would not show.


def perturbed(layer: InvertibleModule) -> InvertibleModule:
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.2, 0.6)
    return layer.double()


x = torch.randn(4, 3, dtype=torch.float64)
check(perturbed(SinhArcsinh(3)), x)  # returns nothing: all is well


# %%
# What a law says of a wrong version
# ----------------------------------
# Two mistakes that are easily made: the first subtracts before it divides, the second forgets one term of the
# derivative.
class WrongOrder(SinhArcsinh):
    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        return ((y.asinh() - self.skew) * (-self.tails).exp()).sinh()


class ForgottenTerm(SinhArcsinh):
    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_and_log_det(x)
        return y, log_det - self.tails.sum()


for wrong in (WrongOrder(3), ForgottenTerm(3)):
    try:
        check(perturbed(wrong), x)
    except AssertionError as error:
        law = error.__notes__[0].split(":")[1].strip()
        print(f"{type(wrong).__name__} breaks {law}: {str(error).splitlines()[0]}")

# %%
# What such a mistake costs, a density shows. :class:`~invertible.Flow` puts the layer, between two that shift and
# scale, on a standard normal distribution, and both versions are fitted by maximum likelihood to measured sizes: of
# cell nuclei, from the breast cancer data of scikit-learn. The wrong one claims to be far better. But its "density" is
# none, for the area below it, here from -4 to 8, is not 1, and further training makes it larger. Mind the logarithmic
# scale.
data, _ = load_breast_cancer(return_X_y=True)
sizes = torch.tensor(data[:, 3:4], dtype=torch.float32)
sizes = (sizes - sizes.mean()) / sizes.std()
places = torch.linspace(-4, 8, 2401)[:, None]
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.hist(sizes[:, 0].numpy(), bins=50, density=True, color="0.8", label="569 samples")
for kind, style in ((SinhArcsinh, "-"), (ForgottenTerm, "--")):
    flow = Flow.standard_normal(Sequential(ActNorm(1), kind(1), ActNorm(1)), (1,))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -flow(value=sizes).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        mean, density = flow.eval()(value=sizes).mean(), flow(value=places).exp()
    area = float(density.sum() * (places[1] - places[0]))
    print(f"{kind.__name__}: mean log-density {mean:.2f} nats, area {area:.1f}")
    ax.plot(places[:, 0].numpy(), density.numpy(), style, label=f"{kind.__name__}, area {area:.1f}")
ax.set(
    title="a density, and what is none",
    xlabel="area of cell nuclei, mean of a sample (standard deviations from the average)",
    ylabel="density",
    xlim=(-2.5, 5.5),
    ylim=(1e-3, 100),
    yscale="log",
)
legend = ax.legend(frameon=False)

# %%
# Gradients
# ---------
# There is nothing to write for them. Under :class:`~invertible.Reconstruct` the engine takes the layer's input from
# ``inverse`` and runs ``forward`` again for the graph. That trains rightly if the inverse is right, and
# :func:`~invertible.testing.check_backprop` compares a step with one of ordinary autograd. (A network keeps the input
# of its first layer that computes, so the layer that is tried has another before it.)


def network(layer: InvertibleModule) -> Sequential:
    parts = [Split(), Coupling(nn.Tanh()), Merge(), perturbed(layer), Split(), Coupling(nn.Tanh()), Merge()]
    return Sequential(*parts).double()


x = torch.randn(64, 6, dtype=torch.float64)
print(check_backprop(network(SinhArcsinh(6)), x, strategies=[Reconstruct()]))
try:
    check_backprop(network(WrongOrder(6)), x, strategies=[Reconstruct()])
except AssertionError as error:
    print(str(error).splitlines()[0])
plt.show()

# %%
# It names the layer. In training, without this check, the drift would have told that something is wrong, and would
# have stopped.
#
# Where to go next
# ----------------
# * :doc:`/new_layer`: what else a layer may declare, a rule of its own for its gradients, and its way into the
#   library.
# * :doc:`/testing`: the laws as tests of your own, with inputs drawn by Hypothesis, and what they find in other
#   libraries.
# * :doc:`/flows`: densities of more than one dimension; next here is one, :doc:`conditional_flow`.
