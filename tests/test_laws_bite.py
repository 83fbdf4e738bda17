"""The laws refuse layers with the bugs that peers have shipped."""

import pytest
import torch
from torch import nn

from invertible import Exactness, InvertibleModule, PixelUnshuffle
from invertible import testing as laws


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


BROKEN = [
    (WritesToItsArgument(), laws.leaves_its_argument_alone, "inverse wrote to its argument"),
    (FreesItsArgument(), laws.leaves_its_argument_alone, "forward wrote to its argument, freed it"),
    (AsksForGradients(), laws.leaves_its_argument_alone, "or changed its form or requires_grad"),
    (IsOffByALittle(), laws.recovers_its_input, r"inverse\(forward\(x\)\) is not x"),
    (AddsEpsilon(), laws.recovers_its_input, r"inverse\(forward\(x\)\) is not x"),
    (CallsItselfExact(), laws.recovers_its_input, r"inverse\(forward\(x\)\) is not x"),
    (HardCodesFactorTwo(3), laws.recovers_its_input, "Invalid number of channel dimensions"),
    (DropsARow(), laws.recovers_its_input, r"expected a tensor of shape \(2, 3, 6, 6\)"),
    (DrawsAnotherMask(), laws.recovers_its_input, r"inverse\(forward\(x\)\) is not x"),
    (CallsItselfBijective(), laws.is_onto_if_bijective, "though the layer calls itself bijective"),
    (ForgetsItsRange(), laws.projects_if_injective, "off_range is not the distance"),
    (ProjectsTwice(), laws.projects_if_injective, "is not a projection"),
    (DropsPrecision(), laws.keeps_form, "dtype, device or batch changed"),
    (LosesTheLayout(), laws.keeps_form, "channels_last was lost"),
    (InitialisesInEval(), laws.keeps_state_in_eval, "state changed in eval: ready"),
    (Normalised().double(), laws.inverse_moves_no_buffer, "moved the state in train: norm.running"),
    (Reseeds(), laws.is_deterministic, "moved the caller's random stream"),
    (HidesItsNoise(), laws.is_deterministic, "moved the caller's random stream"),
    (MixesTheBatch(), laws.treats_samples_alone, "differs when alone"),
    (CannotBePickled(), laws.survives_copying, "pickle"),
    (KeepsAListAside(), laws.survives_copying, "scales holds a tensor that is neither parameter nor buffer"),
    (LogDetMovesABuffer(), laws.keeps_state_in_eval, "state changed in eval: ready"),
    (InverseLogDetWithoutGradient(), laws.log_det_matches_autograd, "Numerical gradient"),
    (CallsItselfIsometric(), laws.keeps_distances_if_isometric, "the distance changed"),
    (KeepsItsStateAside(), laws.survives_copying, "order holds a tensor that is neither parameter nor buffer"),
    (SameSignBothWays(), laws.log_det_matches_autograd, "inverse log-determinant is off"),
    (SumsOverChannelsOnly(), laws.log_det_matches_autograd, "log-determinants of shapes"),
    (LogDetWithoutGradient(), laws.log_det_matches_autograd, "Numerical gradient for function expected to be zero"),
    (HasNoLogDet(), laws.log_det_matches_autograd, "has no log-determinant. Define forward_and_log_det"),
    (GradientIsWrong(), laws.derivatives_are_right, "Jacobian mismatch"),
]


@pytest.mark.parametrize(("layer", "law", "words"), BROKEN, ids=[type(layer).__name__ for layer, *_ in BROKEN])
def test_law_refuses(layer, law, words):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(Exception, match=words):
        law(layer, x)


def test_every_law_is_seen_to_bite():
    assert {law for _, law, _ in BROKEN} == set(laws.LAWS)


def test_the_layers_that_are_broken_are_right_otherwise():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    laws.check(Layer(), x)
    laws.check(Scales(), x)
