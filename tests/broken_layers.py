"""Layers with the bugs that peers have shipped, and what each law says of them. The page on testing shows these."""

from dataclasses import dataclass

import torch
from torch import nn

from invertible import Exactness, InvertibleModule, PixelUnshuffle
from invertible import testing as laws
from invertible.testing import Law


class Layer(InvertibleModule):
    """Doubles its input, correctly; each layer below breaks one thing."""

    def forward(self, x, *, condition=None):
        return x * 2

    def inverse(self, y, *, condition=None):
        return y / 2

    def forward_and_log_det(self, x, *, condition=None):
        return self(x), x.new_full((len(x),), 2.0).log() * x[0].numel()


class WritesToItsArgument(Layer):  # FrEIA HaarDownsampling, inverse
    def inverse(self, y, *, condition=None):
        y *= 0.5
        return y


class FreesItsArgument(Layer):  # MemCNN InvertibleModuleWrapper
    def forward(self, x, *, condition=None):
        y = x * 2
        x.untyped_storage().resize_(0)
        return y


class AsksForGradients(Layer):  # FrEIA IResNetLayer
    def forward(self, x, *, condition=None):
        return x.requires_grad_() * 2


class IsOffByALittle(Layer):
    def inverse(self, y, *, condition=None):
        return y / 2 - 1e-6


class AddsEpsilon(Layer):  # InvertibleNetworks.jl coupling layers
    def inverse(self, y, *, condition=None):
        return y / (2 + 1e-6)


class CallsItselfBijective(Layer):  # zero padding that forgot to say so
    def forward(self, x, *, condition=None):
        return torch.cat((x, torch.zeros_like(x)), dim=1)

    def inverse(self, y, *, condition=None):
        return y[:, : y.shape[1] // 2]


class ForgetsItsRange(CallsItselfBijective):
    bijective = False

    def inverse(self, y, *, condition=None):
        return y[:, : y.shape[1] // 2] + y[:, y.shape[1] // 2 :]

    def off_range(self, y, *, condition=None):
        return y.new_zeros(len(y))


class ProjectsTwice(CallsItselfBijective):
    bijective = False

    def forward(self, x, *, condition=None):
        return torch.cat((x / 2, torch.zeros_like(x)), dim=1)


class CallsItselfExact(Layer):
    exactness = Exactness.EXACT

    def forward(self, x, *, condition=None):
        return x * 0.1

    def inverse(self, y, *, condition=None):
        return y / 0.1


class DropsPrecision(Layer):
    def forward(self, x, *, condition=None):
        return x.float() * 2

    def inverse(self, y, *, condition=None):
        return y.double() / 2


class LosesTheLayout(Layer):
    def forward(self, x, *, condition=None):
        return (x * 2).contiguous()


class HardCodesFactorTwo(PixelUnshuffle):  # nflows SqueezeTransform
    def inverse(self, y, *, condition=None):
        if y.shape[1] % 4:
            raise ValueError("Invalid number of channel dimensions.")
        return super().inverse(y)


class DropsARow(Layer):  # FrEIA IRevNetDownsampling on odd sizes
    def forward(self, x, *, condition=None):
        return x[..., : x.shape[-1] // 4 * 4]

    def inverse(self, y, *, condition=None):
        return y


class Normalised(Layer):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def shift(self, x):
        return self.norm(torch.ones_like(x[:, :3]) * torch.arange(len(x)).view(-1, 1, 1, 1))

    def forward(self, x, *, condition=None):
        return x + self.shift(x)

    def inverse(self, y, *, condition=None):  # MemCNN and revlib: statistics move in the replay too
        return y - self.shift(y)


class InitialisesInEval(Layer):  # FrEIA and normflows ActNorm
    def __init__(self):
        super().__init__()
        self.register_buffer("ready", torch.zeros(()))

    def forward(self, x, *, condition=None):
        self.ready.fill_(1)
        return x * 2


class Reseeds(Layer):  # RevTorch, HF Reformer
    def forward(self, x, *, condition=None):
        torch.manual_seed(0)
        return x * 2


class HidesItsNoise(Layer):
    def forward(self, x, *, condition=None):
        torch.rand(1)
        return x * 2


class DrawsAnotherMask(Layer):  # MemCNN: the replay draws its own dropout mask
    def forward(self, x, *, condition=None):
        return x + nn.functional.dropout(torch.ones_like(x))

    def inverse(self, y, *, condition=None):
        return y - nn.functional.dropout(torch.ones_like(y))


class MixesTheBatch(Layer):
    def forward(self, x, *, condition=None):
        return x + x.mean(0).detach() * 0 + len(x)

    def inverse(self, y, *, condition=None):
        return y - len(y)


class CannotBePickled(Layer):
    def __init__(self):
        super().__init__()
        self.function = lambda x: x


class KeepsItsStateAside(Layer):  # the order of a permutation that no checkpoint carries
    def __init__(self):
        super().__init__()
        self.order = torch.randperm(3)

    def forward(self, x, *, condition=None):
        return x[:, self.order] * 2

    def inverse(self, y, *, condition=None):
        return y[:, torch.argsort(self.order)] / 2


class SameSignBothWays(Layer):  # FrEIA LearnedElementwiseScaling
    def inverse_and_log_det(self, y, *, condition=None):
        return self.inverse(y), self.forward_and_log_det(y)[1]


class LogDetMovesABuffer(Layer):  # ActNorm that initialises in the density path
    def __init__(self):
        super().__init__()
        self.register_buffer("ready", torch.zeros(()))

    def forward_and_log_det(self, x, *, condition=None):
        self.ready.fill_(1)
        return super().forward_and_log_det(x)


class CallsItselfIsometric(Layer):
    isometric = True
    exactness = Exactness.ROUNDING


class KeepsAListAside(Layer):
    def __init__(self):
        super().__init__()
        self.scales = [torch.ones(3)]


class SumsOverChannelsOnly(Layer):  # FrEIA InvertibleSigmoid
    def forward_and_log_det(self, x, *, condition=None):
        return self(x), torch.full_like(x, 2.0).log().sum(1)


class Scales(Layer):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x, *, condition=None):
        return x * self.scale

    def inverse(self, y, *, condition=None):
        return y / self.scale

    def forward_and_log_det(self, x, *, condition=None):
        return self(x), self.scale.log() * x[0].numel() * x.new_ones(len(x))


class LogDetWithoutGradient(Scales):  # FrEIA IResNetLayer
    def forward_and_log_det(self, x, *, condition=None):
        y, log_det = super().forward_and_log_det(x)
        return y, log_det.detach()


class InverseLogDetWithoutGradient(Scales):
    def inverse_and_log_det(self, y, *, condition=None):
        x, log_det = super().inverse_and_log_det(y)
        return x, log_det.detach()


class GradientIsWrong(Scales):
    def forward(self, x, *, condition=None):
        return x * self.scale.detach()


class HasNoLogDet(Layer):
    forward_and_log_det = InvertibleModule.forward_and_log_det


class ReturnsATuple(Layer):
    def forward(self, x, *, condition=None):
        return (x * 2,)

    def inverse(self, y, *, condition=None):
        return y[0] / 2


class KeepsItsOrderAsAParameter(Layer):
    def __init__(self):
        super().__init__()
        self.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)

    def forward(self, x, *, condition=None):
        return x[:, self.order] * 2

    def inverse(self, y, *, condition=None):
        return y[:, torch.argsort(self.order)] / 2


class InvertsByRunningStatistics(Layer):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False).double()

    def forward(self, x, *, condition=None):
        return self.norm(x)

    def inverse(self, y, *, condition=None):
        mean, var = (t.view(-1, 1, 1) for t in (self.norm.running_mean, self.norm.running_var))
        return y * (var + self.norm.eps).sqrt() + mean


class LogDetAtTheOutput(Layer):
    def forward(self, x, *, condition=None):
        return x.exp()

    def inverse(self, y, *, condition=None):
        return y.log()

    def forward_and_log_det(self, x, *, condition=None):
        return self(x), x.flatten(1).sum(1)

    def inverse_and_log_det(self, y, *, condition=None):
        return self.inverse(y), -y.flatten(1).sum(1)


class RootOfANegative(Layer):
    def forward(self, x, *, condition=None):
        return x**2 * x.sign()

    def inverse(self, y, *, condition=None):
        return (y.abs() - 1e-3).sqrt() * y.sign()


@dataclass(frozen=True)
class Broken:
    """A layer, the law that it breaks, and words of what the law says."""

    layer: InvertibleModule
    law: Law
    words: str
    peer: str | None = None
    """Who shipped the bug, and in what."""
    bug: str = ""


BROKEN = (
    Broken(
        WritesToItsArgument(),
        laws.leaves_its_argument_alone,
        "inverse wrote to its argument",
        "FrEIA, Haar transform",
        "its inverse scales its argument in place",
    ),
    Broken(
        FreesItsArgument(),
        laws.leaves_its_argument_alone,
        "forward wrote to its argument, freed it",
        "MemCNN, InvTorch",
        "frees the storage of the caller's input",
    ),
    Broken(
        AsksForGradients(),
        laws.leaves_its_argument_alone,
        "or changed its form or requires_grad",
        "FrEIA, IResNetLayer",
        "sets requires_grad on the caller's tensor",
    ),
    Broken(IsOffByALittle(), laws.recovers_its_input, r"inverse\(forward\(x\)\) is not x"),
    Broken(
        AddsEpsilon(),
        laws.recovers_its_input,
        r"inverse\(forward\(x\)\) is not x",
        "InvertibleNetworks.jl, Glow coupling",
        "adds an epsilon in the inverse",
    ),
    Broken(CallsItselfExact(), laws.recovers_its_input, r"inverse\(forward\(x\)\) is not x"),
    Broken(
        HardCodesFactorTwo(3),
        laws.recovers_its_input,
        "Invalid number of channel dimensions",
        "nflows, SqueezeTransform(3)",
        "has a factor of 2 built into its inverse",
    ),
    Broken(
        DropsARow(),
        laws.recovers_its_input,
        r"expected a tensor of shape \(2, 3, 6, 6\)",
        "FrEIA, i-RevNet downsampling",
        "drops a row of images of odd size",
    ),
    Broken(
        DrawsAnotherMask(),
        laws.recovers_its_input,
        r"inverse\(forward\(x\)\) is not x",
        "MemCNN",
        "draws another dropout mask when it runs again",
    ),
    Broken(CallsItselfBijective(), laws.is_onto_if_bijective, "though the layer calls itself bijective"),
    Broken(ForgetsItsRange(), laws.projects_if_injective, "off_range is not the distance"),
    Broken(ProjectsTwice(), laws.projects_if_injective, "is not a projection"),
    Broken(DropsPrecision(), laws.keeps_form, "dtype, device or batch changed"),
    Broken(LosesTheLayout(), laws.keeps_form, "channels_last was lost"),
    Broken(
        InitialisesInEval(),
        laws.keeps_state_in_eval,
        "state changed in eval: ready",
        "FrEIA and normflows, ActNorm",
        "takes its statistics from the first batch in eval, too",
    ),
    Broken(
        Normalised().double(),
        laws.inverse_moves_no_buffer,
        "moved the state in train: norm.running",
        "MemCNN, RevTorch, revlib",
        "counts a batch two or three times in the running statistics",
    ),
    Broken(
        Reseeds(),
        laws.is_deterministic,
        "moved the caller's random stream",
        "RevTorch, Reformer of Hugging Face",
        "seeds the caller's random generator",
    ),
    Broken(HidesItsNoise(), laws.is_deterministic, "moved the caller's random stream"),
    Broken(MixesTheBatch(), laws.treats_samples_alone, "differs when alone"),
    Broken(CannotBePickled(), laws.survives_copying, "pickle"),
    Broken(KeepsAListAside(), laws.survives_copying, "scales holds a tensor that is neither parameter nor buffer"),
    Broken(LogDetMovesABuffer(), laws.keeps_state_in_eval, "state changed in eval: ready"),
    Broken(InverseLogDetWithoutGradient(), laws.log_det_matches_autograd, "Numerical gradient"),
    Broken(CallsItselfIsometric(), laws.keeps_distances_if_isometric, "the distance changed"),
    Broken(KeepsItsStateAside(), laws.survives_copying, "order holds a tensor that is neither parameter nor buffer"),
    Broken(
        SameSignBothWays(),
        laws.log_det_matches_autograd,
        "inverse log-determinant is off",
        "FrEIA, LearnedElementwiseScaling",
        "the log-determinant of the inverse has the wrong sign",
    ),
    Broken(
        SumsOverChannelsOnly(),
        laws.log_det_matches_autograd,
        "log-determinants of shapes",
        "FrEIA, InvertibleSigmoid",
        "sums the log-determinant over channels only",
    ),
    Broken(
        LogDetWithoutGradient(),
        laws.log_det_matches_autograd,
        "Numerical gradient for function expected to be zero",
        "FrEIA, IResNetLayer",
        "the log-determinant has no gradient, so that nothing trains it",
    ),
    Broken(HasNoLogDet(), laws.log_det_matches_autograd, "has no log-determinant. Define forward_and_log_det"),
    Broken(
        ReturnsATuple(), laws.keeps_form, "a tuple of one", "FrEIA, InvertibleSigmoid(jac=False)", "returns a 1-tuple"
    ),
    Broken(
        KeepsItsOrderAsAParameter(),
        laws.survives_copying,
        "order is a parameter of integers",
        "FrEIA, fixed permutations and Haar kernels",
        "keeps constants as parameters, which optimizers, averages and FSDP take for weights",
    ),
    Broken(
        InvertsByRunningStatistics(),
        laws.recovers_its_input,
        r"inverse\(forward\(x\)\) is not x",
        "ibinn_imagenet",
        "trains forwards by the batch's statistics, and inverts by the running ones",
    ),
    Broken(
        LogDetAtTheOutput(),
        laws.log_det_matches_autograd,
        "inverse log-determinant is off",
        "FrEIA, IResNetLayer",
        "takes the log-determinant of the inverse at the output, not at the input",
    ),
    Broken(
        RootOfANegative(),
        laws.recovers_its_input,
        r"inverse\(forward\(x\)\) is not x",
        "nflows, rational-quadratic spline",
        "takes the root of a discriminant that rounding has made negative",
    ),
    Broken(GradientIsWrong(), laws.derivatives_are_right, "Jacobian mismatch"),
)
"""Every law is in it once or more."""
