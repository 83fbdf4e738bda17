"""Flows: densities of data, their samples, and what trains them."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Categorical,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
    constraints,
)
from torch.torch_version import TorchVersion

import invertible as inv
from invertible import (
    ActNorm,
    Affine,
    Augment,
    Budget,
    Conditional,
    Coupling,
    Dequantize,
    Flow,
    Identity,
    Inverse,
    InvertibleLinear,
    Merge,
    PadSplit,
    Parallel,
    PixelUnshuffle,
    RationalQuadraticSpline,
    Recompute,
    Reconstruct,
    Reshape,
    Sequential,
    Sigmoid,
    Split,
    Store,
)
from tests.networks import function


def mlp(inputs, outputs, width=16):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def couplings(depth=3, *, transform=Affine, conditions=0, features=2):
    """Of vectors, each half of them; what is initialised is no identity."""
    half = features // 2
    layers = []
    for _ in range(depth):
        each = transform()
        net = mlp(half + conditions, half * each.parameters_per_element)
        layers.append(Coupling(Conditional(net) if conditions else net, each))
    return Sequential(Split(), *layers, Merge())


def normal(*shape):
    return Normal(torch.zeros(shape), torch.ones(shape))


def grid_of(low, high, count):
    steps = torch.linspace(low, high, count, dtype=torch.float64)
    points = torch.cartesian_prod(steps, steps)
    return points, ((high - low) / (count - 1)) ** 2


@pytest.mark.parametrize("transform", [Affine, RationalQuadraticSpline, inv.Additive])
def test_densities_in_the_plane_sum_to_one(transform):
    net = Sequential(couplings(3, transform=transform), ActNorm(2), InvertibleLinear(2))
    flow = Flow(net, Independent(normal(2), 1)).double().eval()
    points, area = grid_of(-12, 12, 601)
    with torch.no_grad():
        total = flow(value=points).exp().sum() * area
    assert abs(float(total) - 1) < 1e-3


def test_an_affine_map_of_a_normal_distribution_is_one():
    torch.manual_seed(1)
    layer = InvertibleLinear(3).double()
    shift = inv.ConstantAffine(shift=0.5)
    flow = Flow(Sequential(shift, layer), normal(3).expand((3,))).double()
    jacobian = torch.func.jacrev(lambda x: flow.transform(x[None])[0])(torch.zeros(3, dtype=torch.float64))
    back = torch.linalg.inv(jacobian)
    mean = -back @ flow.transform(torch.zeros(1, 3, dtype=torch.float64))[0]
    exact = MultivariateNormal(mean.detach(), (back @ back.mT).detach())
    x = torch.randn(20, 3, dtype=torch.float64)
    assert torch.allclose(flow(value=x), exact.log_prob(x), atol=1e-10)
    many = flow().sample((40_000,))
    assert torch.allclose(many.mean(0), exact.mean, atol=0.05)
    assert torch.allclose(many.T.cov(), exact.covariance_matrix, atol=0.1)


def test_the_change_of_variables_is_that_of_autograd():
    flow = Flow.standard_normal(Sequential(couplings(4, features=4), InvertibleLinear(4)), (4,)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda p: flow.transform(p[None])[0]))(x)
    z = flow.transform(x)
    expected = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + torch.linalg.slogdet(jacobians).logabsdet
    assert torch.allclose(flow(value=x), expected, atol=1e-10)


def test_samples_come_with_the_density_that_values_have():
    flow = Flow.standard_normal(couplings(conditions=2), (2,), condition=torch.zeros(1, 2)).double().eval()
    condition = torch.randn(3, 2, dtype=torch.float64)
    x, log_prob = flow(condition, samples=4)
    assert (x.shape, log_prob.shape) == ((4, 3, 2), (4, 3))
    posterior = flow(condition)
    assert torch.allclose(posterior.log_prob(x), log_prob, atol=1e-9)
    one_by_one = torch.stack([flow(condition, value=each) for each in x])
    assert torch.allclose(one_by_one, log_prob, atol=1e-9)
    again, its = posterior.rsample_and_log_prob((4,))
    assert torch.allclose(posterior.log_prob(again), its, atol=1e-9)


def test_nobody_can_tell_samples_from_the_density():
    """Rosenblatt: in one dimension, what a density says of its samples is uniform."""
    torch.manual_seed(0)
    flow = Flow.standard_normal(Sequential(inv.Elementwise(RationalQuadraticSpline(), channels=1)), (1,)).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(torch.randn_like(p))
        x = flow().sample((4000,)).squeeze(1).sort().values
        grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
        density = flow(value=grid[:, None]).exp()
    cumulative = torch.cumulative_trapezoid(density, grid)
    assert abs(float(cumulative[-1]) - 1) < 1e-3
    ranks = cumulative[torch.searchsorted(grid[1:], x)]
    uniform = (torch.arange(4000) + 0.5) / 4000
    assert float((ranks - uniform).abs().max()) < 1.95 / math.sqrt(4000)  # Kolmogorov and Smirnov's at 0.1 %


def test_shapes_are_those_of_torch():
    flow = Flow.standard_normal(couplings(conditions=3), (2,), condition=torch.zeros(0, 3))
    some = flow(torch.zeros(5, 3))
    assert (some.batch_shape, some.event_shape) == ((5,), (2,))
    assert some.sample().shape == (5, 2)
    assert some.sample((7, 2)).shape == (7, 2, 5, 2)
    assert some.log_prob(torch.zeros(2)).shape == (5,)
    assert some.log_prob(torch.zeros(7, 1, 2)).shape == (7, 5)
    assert some.sample((0,)).shape == (0, 5, 2)
    assert some.expand((4, 5)).sample((3,)).shape == (3, 4, 5, 2)
    assert flow(torch.zeros(0, 3)).sample((2,)).shape == (2, 0, 2)
    assert some.support.event_dim == 1
    plain = Flow.standard_normal(couplings(), (2,))()
    assert (plain.batch_shape, plain.event_shape) == ((), (2,))
    assert plain.sample().shape == (2,)
    assert plain.log_prob(torch.zeros(2)).shape == ()
    assert plain.expand((3,)).rsample((2,)).shape == (2, 3, 2)
    x, log_prob = Flow.standard_normal(couplings(), (2,))(samples=0)
    assert (x.shape, log_prob.shape) == ((0, 2), (0,))
    assert Independent(plain.expand((3,)), 1).log_prob(torch.zeros(3, 2)).shape == ()


def test_many_values_may_have_one_condition():
    flow = Flow.standard_normal(couplings(conditions=3), (2,), condition=torch.zeros(0, 3))
    condition, x = torch.randn(1, 3), torch.randn(4, 7, 2)
    expected = flow(condition.expand(28, 3), value=x.reshape(28, 2)).reshape(4, 7)
    assert torch.allclose(flow(condition).log_prob(x), expected)
    learnt = Flow(Identity(), Learnt(3))
    assert torch.allclose(learnt(condition).log_prob(x[0]), learnt(condition.expand(7, 3), value=x[0]))


def test_a_flow_without_data_has_shapes_and_likelihoods():
    """Its base once looked at values that were not there."""
    with torch.device("meta"):
        flow = Flow.standard_normal(scales(), (1, 4, 4))
    assert flow().event_shape == (1, 4, 4)
    found = flow(value=torch.empty(3, 1, 4, 4, device="meta"))
    assert (found.shape, found.device.type) == ((3,), "meta")


def test_asking_for_a_shape_draws_and_changes_nothing():
    flow = Flow.standard_normal(Sequential(ActNorm(2), couplings()), (2,))
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    seed = torch.get_rng_state()
    assert flow().event_shape == (2,)
    flow().log_prob(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())


@pytest.mark.parametrize(
    "base",
    [
        Independent(Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 1.5])), 1),
        StudentT(torch.tensor([3.0, 4.0])),
        MultivariateNormal(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
        MixtureSameFamily(
            Categorical(torch.tensor([0.3, 0.7])),
            Independent(Normal(torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.ones(2, 2)), 1),
        ),
        TransformedDistribution(normal(2), [AffineTransform(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])).inv]),
        Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1),
    ],
    ids=lambda base: type(base).__name__,
)
def test_torchs_distributions_move_and_save_with_the_flow(base):
    torch.manual_seed(0)
    flow = Flow(Identity(), base)
    x = base.sample((3,))
    expected = base.log_prob(x).reshape(3, -1).sum(1)
    assert torch.allclose(flow(value=x), expected)
    wide = copy.deepcopy(flow).double()
    assert wide(value=x.double()).dtype == torch.float64
    assert all(buffer.dtype == torch.float64 for buffer in wide.buffers() if buffer.is_floating_point())
    other = pickle.loads(pickle.dumps(wide))  # noqa: S301 (its own bytes)
    assert torch.equal(other(value=x.double()), wide(value=x.double()))
    assert flow.to("meta")(value=x.to("meta")).is_meta
    torch.manual_seed(1)
    drawn = Flow(Identity(), base)().sample((4,))
    torch.manual_seed(1)
    assert torch.equal(drawn, base.sample((4,)))
    twin = Flow(Identity(), base)
    for buffer in twin.buffers():
        buffer.zero_()
    twin.load_state_dict(Flow(Identity(), base).state_dict())
    assert torch.allclose(twin(value=x), expected)


@pytest.mark.parametrize(
    ("base", "use"),
    [
        (Independent(VonMises(torch.zeros(2), torch.ones(2)), 1), lambda base: base.sample()),
        (Bernoulli(probs=torch.full((2,), 0.3)), lambda base: base.log_prob(torch.ones(2))),
    ],
    ids=["VonMises", "Bernoulli"],
)
def test_a_base_that_was_used_before_has_the_same_keys(base, use):
    """Torch keeps in a distribution what it computes."""
    fresh = Flow(Identity(), base).state_dict()
    use(base)
    flow = Flow(Identity(), base)
    flow.load_state_dict(fresh)
    x = base.sample((3,))
    assert torch.equal(flow(value=x), base.log_prob(x).reshape(3, -1).sum(1))


class Learnt(nn.Module):
    """A base with parameters, and a mean that depends on a condition."""

    def __init__(self, conditions=0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.mean = nn.Linear(conditions, 2) if conditions else None

    def forward(self, condition):
        mean = self.mean(condition) if self.mean else torch.zeros(2)
        return Normal(mean, self.scale)


def test_a_base_may_be_trained_and_conditional():
    flow = Flow(Identity(), Learnt(3))
    condition = torch.randn(4, 3)
    x, log_prob = flow(condition, samples=5)
    assert torch.allclose(flow(condition).log_prob(x), log_prob)
    log_prob.sum().backward()
    assert flow.base.scale.grad is not None
    unconditional = Flow(Identity(), Learnt())
    unconditional(value=torch.ones(3, 2)).sum().backward()
    assert torch.allclose(unconditional.base.scale.grad, torch.zeros(2))  # x² / s³ - 1 / s, at 1
    with pytest.raises(ValueError, match=r"base must return a distribution of batch shape \(4, ...\) for as many cond"):
        unconditional(condition, value=torch.ones(4, 2))


def scales():
    """Two scales of images of 4 pixels, and the means of the second given the first left alone."""
    step = Coupling(nn.Conv2d(2, 4, 3, padding=1), Affine())
    first = Sequential(PixelUnshuffle(2), ActNorm(4), Split(), step, Merge(), Split(channels=2))
    return Sequential(first, Parallel(Identity(), Sequential(PixelUnshuffle(2), ActNorm(8))))


def test_latent_values_of_several_scales_have_a_base_each():
    flow = Flow.standard_normal(scales(), (1, 4, 4)).double()
    assert [part().event_shape for part in flow.base] == [(2, 2, 2), (8, 1, 1)]
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    z, log_det = flow.transform.forward_and_log_det(x)
    exact = sum(-0.5 * (t.square() + math.log(2 * math.pi)).flatten(1).sum(1) for t in z) + log_det
    assert torch.allclose(flow(value=x), exact)
    assert flow().sample((2,)).shape == (2, 1, 4, 4)
    with pytest.raises(TypeError, match=r"a tuple of bases is for tuples of as many latent values, got a tensor"):
        Flow(Identity(), (normal(2), normal(2)))(value=torch.zeros(1, 2))
    with pytest.raises(TypeError, match="a tuple of bases is for tuples of latent values, and one base for tensors"):
        Flow(Split(), normal(2))(value=torch.zeros(1, 4))


def test_data_may_be_tuples_but_for_the_distribution():
    flow = Flow(Merge(), normal(4))
    pair = torch.zeros(3, 2), torch.zeros(3, 2)
    assert flow(value=pair).shape == (3,)
    (a, b), log_prob = flow(samples=3)
    assert (a.shape, b.shape, log_prob.shape) == ((3, 2), (3, 2), (3,))
    with pytest.raises(TypeError, match=r"data must be tensors, got a tuple of .*flow\(value=...\)"):
        flow().event_shape  # noqa: B018


def strategies():
    return [Store(), Recompute(), Recompute(every=2), Reconstruct(), Budget(40_000)]


def deep(strategy=None, seed=0):
    torch.manual_seed(seed)
    net = Sequential(ActNorm(4), couplings(4, features=4, conditions=2), InvertibleLinear(4), backprop=strategy)
    flow = Flow.standard_normal(net, (4,), condition=torch.zeros(1, 2)).double()
    flow(torch.randn(32, 2).double(), value=torch.randn(32, 4).double())
    return flow


def gradients(flow):
    return {key: p.grad for key, p in flow.named_parameters()}


@pytest.mark.parametrize("strategy", strategies(), ids=repr)
@pytest.mark.parametrize("by", ["value", "samples"])
def test_both_directions_train_under_every_strategy(strategy, by):
    found = []
    for each in (None, strategy):
        flow = deep(each)
        condition = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        if by == "value":
            loss = -flow(condition, value=torch.randn(8, 4, dtype=torch.float64)).mean()
        else:
            x, log_prob = flow(condition, samples=2)
            loss = (log_prob + x.square().sum(-1)).mean()
        loss.backward()
        found.append((loss.detach(), {**gradients(flow), "condition": condition.grad}))
    (loss, expected), (other, grads) = found
    assert torch.allclose(other, loss)
    assert all(torch.allclose(grads[key], grad, rtol=1e-6, atol=1e-9) for key, grad in expected.items())


def test_the_trained_direction_moves_buffers_and_the_distribution_does_not():
    net = Sequential(ActNorm(2), couplings())
    flow = Flow.standard_normal(net, (2,))
    x = 3 + 2 * torch.randn(64, 2)
    flow().log_prob(x)
    flow().sample((64,))
    flow().rsample_and_log_prob((64,))
    assert not net[0].initialized
    flow(value=x)
    assert torch.allclose(net[0].mean, x.mean(0), atol=1e-5)
    backwards = Flow.standard_normal(Sequential(ActNorm(2), couplings()), (2,))
    drawn, _ = backwards(samples=64)
    assert backwards.transform[0].initialized
    assert torch.allclose(drawn.mean(0), torch.zeros(2), atol=1e-5)


def test_sums_are_wide_under_autocast_and_in_half_precision():
    flow = Flow(Identity(), normal(4096)).bfloat16()
    x = torch.ones(2, 4096, dtype=torch.bfloat16)
    found = flow(value=x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.full((2,), -0.5 * 4096 * (1 + math.log(2 * math.pi))), rtol=1e-5)
    flow = deep().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flow(torch.randn(8, 2), value=torch.randn(8, 4)).dtype == torch.float32
        assert flow(torch.randn(8, 2), samples=2)[1].dtype == torch.float32


def test_stochastic_maps_bound_the_probability_of_whole_numbers():
    net = Sequential(Dequantize(4), Inverse(Sigmoid()), inv.Elementwise(Affine(), channels=1))
    flow = Flow.standard_normal(net, (1,)).double()
    levels = torch.arange(4, dtype=torch.float64)[:, None].repeat(4000, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        bound = flow(value=levels).reshape(4000, 4)
    # the mean over noise of p(x + u) is P(x), and the probabilities sum to 1
    assert abs(float(bound.exp().mean(0).sum()) - 1) < 0.05
    assert bool((bound.mean(0) <= bound.exp().mean(0).log()).all())
    drawn = flow().sample((50,))
    assert bool((drawn == drawn.round()).all())
    assert not flow().has_rsample
    with pytest.raises(NotImplementedError, match="expected a base with rsample, and no Dequantize"):
        flow().rsample()
    assert Flow.standard_normal(Sequential(Augment(2), couplings(features=4)), (2,))().sample((3,)).shape == (3, 2)


@pytest.mark.parametrize("grid", ["exact", "exact32"])
def test_a_flow_on_a_grid(grid):
    net = Sequential(Split(), *(Coupling(mlp(1, 1)) for _ in range(3)), Merge(), grid=grid, backprop=Reconstruct())
    flow = Flow.standard_normal(net, (2,))
    flow(value=torch.randn(5, 2)).sum().backward()
    assert net.drift == 0
    x, log_prob = flow(samples=5)
    assert torch.allclose(flow(value=x), log_prob, atol=1e-4)


def test_what_is_wrong_is_refused():
    net = couplings()
    for arguments, error, message in (
        ((nn.Linear(2, 2), normal(2)), TypeError, "Flow: expected an InvertibleModule, got an object of type Linear"),
        (
            (PadSplit(2, 4), normal(2)),
            ValueError,
            "Flow: expected a transform that is bijective, or stochastic, got Pad",
        ),
        (
            (net, "normal"),
            TypeError,
            "Flow: base must be a distribution, a module that returns one, or a tuple of such",
        ),
        ((net, Normal), TypeError, r"got the class Normal. Make one: Normal\(torch.zeros\(2\), torch.ones\(2\)\)"),
        ((net, ()), TypeError, "base must be a distribution"),
        (
            (net, Normal(nn.Parameter(torch.zeros(2)), torch.ones(2))),
            ValueError,
            "a distribution whose parameters are trained must come from a module, got a Normal. Give a module",
        ),
    ):
        with pytest.raises(error, match=message):
            Flow(*arguments)
    flow = Flow(net, normal(2))
    x = torch.zeros(4, 2)
    for call, error, message in (
        (lambda: flow(value=x, samples=2), ValueError, "Flow: expected value or samples, got both."),
        (lambda: flow(samples=-1), ValueError, "Flow: samples must be at least 0, got -1."),
        (lambda: flow(samples=1.5), TypeError, "Flow: samples must be an integer, got 1.5."),
        (
            lambda: flow([1.0], value=x),
            TypeError,
            r"Flow: condition must be a tensor of shape \(batch, ...\), or a tuple of such, got an object of type list",
        ),
        (lambda: flow(()), TypeError, "condition must be .*, got a tuple of nothing"),
        (lambda: flow(torch.zeros(())), TypeError, r"condition must be .*, got a tensor of shape \(\)"),
        (
            lambda: flow((torch.zeros(4, 1), torch.zeros(3, 1)), samples=2),
            ValueError,
            "Flow: all tensors of a condition must have the same batch, got a tuple of a tensor",
        ),
        (lambda: Flow.standard_normal(net, 2), TypeError, "Flow: shape must be that of a datum, a tuple, got 2."),
        (lambda: Flow.standard_normal(net, (2.0,)), TypeError, "Flow: shape must be an integer, got 2.0."),
        (lambda: Flow.standard_normal(net, (-2,)), ValueError, r"shape must have no negative size, got \(-2,\)"),
        (lambda: Flow.standard_normal(net, (2,), condition=[1]), TypeError, "condition must be a tensor"),
        (lambda: flow(value=[1.0]), TypeError, "expected a tensor, or a tuple of tensors, got an object of type list"),
        (
            lambda: flow(torch.zeros(3, 2), value=x),
            ValueError,
            "Flow: expected a condition for each of 4 values, got 3.",
        ),
        (
            lambda: Flow(net, normal(3))(value=x),
            ValueError,
            r"base must have the shape \(2,\) of a latent .* got \(3,\)",
        ),
        (lambda: Flow(net, Normal(0.0, 1.0))(value=x), ValueError, r"base must have the shape \(2,\) .*, got \(\)"),
        (lambda: flow().log_prob(torch.zeros(3)), ValueError, r"expected a value of shape \(..., 2\), got \(3,\)"),
        (lambda: flow().log_prob(torch.zeros(())), ValueError, r"expected a value of shape \(..., 2\), got \(\)"),
        (lambda: flow().log_prob(1.0), TypeError, "FlowDistribution: expected a tensor, got an object of type float"),
        (
            lambda: flow(torch.zeros(5, 1)).log_prob(torch.zeros(3, 2)),
            ValueError,
            r"expected a value of shape \(..., 5, 2\), got \(3, 2\)",
        ),
        (
            lambda: flow(torch.zeros(5, 1)).expand((4,)),
            ValueError,
            r"expected a batch shape that ends with \(5,\), got",
        ),
        (lambda: Flow(Identity(), nn.Linear(2, 2))(torch.zeros(4, 2), value=x), TypeError, "base must return a distr"),
        (
            lambda: Flow(Identity(), Discrete())(samples=2),
            ValueError,
            "samples of a base that is trained must have gradients, got a base without rsample",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


class Discrete(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, condition):
        return Independent(Bernoulli(logits=self.logits), 1)


def test_values_out_of_the_support_are_torchs_own_error():
    base = Uniform(torch.zeros(2), torch.ones(2), validate_args=True)  # torch.compile lets torch look no more
    flow = Flow(Identity(), base, support=constraints.unit_interval)
    assert flow().support is constraints.unit_interval
    assert torch.equal(flow(value=torch.full((1, 2), 0.5)), torch.zeros(1))
    with pytest.raises(ValueError, match="to be within the support"):
        flow(value=torch.full((1, 2), 1.5))


def test_data_may_have_another_number_of_dimensions_than_latent_values():
    flow = Flow.standard_normal(Sequential(Reshape((1, 2, 2), (4,)), couplings(features=4)), (1, 2, 2))
    assert flow().event_shape == (1, 2, 2)
    assert flow().log_prob(torch.zeros(6, 1, 2, 2)).shape == (6,)
    assert flow(samples=3)[0].shape == (3, 1, 2, 2)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch 2.11's compiler looks at what it should not
@pytest.mark.parametrize("by", ["value", pytest.param("samples", marks=pytest.mark.slow)])
def test_a_flow_is_compiled_whole(by):
    net = Sequential(ActNorm(4), couplings(1, features=4, conditions=2), InvertibleLinear(4))
    flow = Flow.standard_normal(net, (4,), condition=torch.zeros(1, 2)).eval()
    condition = torch.randn(4, 2)
    arguments = {"value": torch.randn(4, 4)} if by == "value" else {"samples": 3}
    torch.manual_seed(0)
    expected = flow(condition, **arguments)
    # The compiler of torch 2.11 can't trace how a distribution is copied, and breaks the graph there.
    whole = TorchVersion(torch.__version__) >= (2, 14)
    compiled = torch.compile(flow, backend="aot_eager", fullgraph=whole)
    torch.manual_seed(0)
    found = compiled(condition, **arguments)
    for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_normalised_flow_knows_its_shape_in_training():
    """In which batch norm has no inverse."""
    net = Sequential(inv.BatchNorm(4), couplings(features=4))
    flow = Flow.standard_normal(net, (4,))
    x = torch.randn(8, 4)
    assert torch.allclose(flow().log_prob(x), flow(value=x))
    assert all(part.training for part in flow.modules())


def test_statistics_are_counted_once():
    """One with batch norm: its statistics are counted once per likelihood, and not by samples of the distribution."""
    net = Sequential(Split(), Coupling(function(4)), Coupling(function(4)), Merge(), backprop=Reconstruct())
    flow = Flow.standard_normal(net, (8, 4, 4))
    flow(value=torch.randn(4, 8, 4, 4)).sum().backward()
    flow().sample((3,))
    counts = [int(b) for key, b in flow.named_buffers() if key.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {1}


def test_samples_have_gradients_only_if_asked_for():
    flow = Flow.standard_normal(couplings(), (2,))
    assert flow().has_rsample
    assert not flow().sample((3,)).requires_grad
    assert flow().rsample((3,)).requires_grad


def test_the_shape_is_found_once_but_not_kept_for_another_map():
    net, calls = Sequential(Reshape((2, 2), (4,)), couplings(features=4)), []
    flow, inverse = Flow.standard_normal(net, (2, 2)), net.inverse
    net.inverse = lambda *arguments, **options: calls.append(1) or inverse(*arguments, **options)
    assert [flow().event_shape for _ in range(2)] == [(2, 2)] * 2
    assert len(calls) == 1
    flow.transform = net[1]
    assert flow().event_shape == (4,)
    assert copy.deepcopy(flow)().event_shape == (4,)


def test_asking_for_a_shape_leaves_each_part_in_its_mode():
    net = couplings()
    net[1].eval()
    flow = Flow.standard_normal(net, (2,))
    modes = [part.training for part in flow.modules()]
    assert flow().event_shape == (2,)
    assert [part.training for part in flow.modules()] == modes
    assert not all(modes)
