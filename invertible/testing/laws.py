"""The laws, one function each. The first line of a law's docstring is the law."""

import copy
import io
import pickle
from collections.abc import Collection, Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from invertible._value import Value, describe, leaves, map_value
from invertible.module import InvertibleModule
from invertible.testing._compare import (
    as_channels_last,
    assert_close,
    assert_near,
    assert_same_state,
    describe_form,
    directions,
    distance,
    equal,
    fail,
    fingerprint,
    gradcheck,
    has_layout,
    is_channels_last,
    moved,
    part_of,
    slogdet,
    snapped,
    tensors_of,
    under_one_seed,
)

__all__ = [
    "LAWS",
    "Law",
    "check",
    "derivatives_are_right",
    "inverse_moves_no_buffer",
    "is_deterministic",
    "is_onto_if_bijective",
    "keeps_distances_if_isometric",
    "keeps_form",
    "keeps_state_in_eval",
    "leaves_its_argument_alone",
    "log_det_matches_autograd",
    "projects_if_injective",
    "recovers_its_input",
    "survives_copying",
    "treats_samples_alone",
]

Layer = InvertibleModule[Any, Any]


class Law(Protocol):
    """A law: raises ``AssertionError`` if ``module`` breaks it at ``x``."""

    __name__: str

    def __call__(
        self, module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
    ) -> None: ...


def check(
    module: Layer,
    x: Value,
    *,
    condition: Value | None = None,
    atol: float | None = None,
    exempt: Collection[Law] = (),
) -> None:
    """Tries every law on a layer at one input, and raises at the first that it breaks.

    The layer, the input and the random number generators are left as they were. Small inputs of dtype float64 with a
    batch of two or more are best: ``log_det_matches_autograd`` builds dense Jacobians, derivatives are compared with
    finite differences in float64 alone, and ``treats_samples_alone`` needs others in the batch.

    Args:
        module: the layer.
        x: an input of ``forward``.
        condition: the condition, if the layer takes one.
        atol: the absolute tolerance in the input's unit; ``None`` for ``torch.testing.assert_close``'s by dtype.
            Layers whose ``exactness`` is ``EXACT`` are compared bit for bit in any case.
        exempt: laws that the layer does not claim to keep, such as ``log_det_matches_autograd``.

    Raises:
        AssertionError: if a law is broken. A note names the law.

    Example:
        >>> check(PixelUnshuffle(2), torch.rand(2, 3, 4, 4, dtype=torch.float64))
    """
    for law in LAWS:
        if law in exempt:
            continue
        try:
            with cast("Any", torch.random).fork_rng():
                law(copy.deepcopy(module), x, condition=condition, atol=atol)
        except Exception as error:
            words = (law.__doc__ or "").splitlines()[0].replace("``", "")
            error.add_note(f"law: {law.__name__}: {words}")
            raise


def recovers_its_input(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """``inverse(forward(x))`` is ``x``: bit for bit if ``EXACT``, else within the tolerance.

    Example:
        >>> recovers_its_input(Sigmoid(), torch.full((2, 3), 16.0))  # saturated # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: inverse(forward(x)) is not x...
    """
    y = module(x, condition=condition)
    assert_close(module, module.inverse(y, condition=condition), x, atol, "inverse(forward(x)) is not x")


def is_onto_if_bijective(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """``forward(inverse(y))`` is ``y`` if the layer is bijective, for outputs near those that ``forward`` returned.

    Example:
        >>> is_onto_if_bijective(InvertibleLinear(3), torch.randn(2, 3))
    """
    if module.bijective:
        y = snapped(module, moved(module(x, condition=condition)))
        back = module(module.inverse(y, condition=condition), condition=condition)
        assert_close(module, back, y, atol, "forward(inverse(y)) is not y, though the layer calls itself bijective")
        zero = torch.zeros_like(module.off_range(y, condition=condition))
        assert_close(module, module.off_range(y, condition=condition), zero, atol, "off_range is not 0")


def projects_if_injective(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """``forward(inverse(y))`` is a projection onto the range if the layer is injective: twice is once.

    Example:
        >>> projects_if_injective(Pad(5, multiple_of=2), torch.randn(2, 3, 5, 5))
    """
    if not module.bijective:

        def project(y: Value) -> Value:
            return module(module.inverse(y, condition=condition), condition=condition)

        y = snapped(module, moved(module(x, condition=condition)))
        once = project(y)
        assert_close(module, project(once), once, atol, "forward(inverse(y)) is not a projection")
        residual = torch.cat([(a - b).flatten(1) for a, b in zip(leaves(y), leaves(once), strict=True)], dim=1)
        expected = residual.abs().square().sum(dim=1).sqrt()
        off_range = module.off_range(y, condition=condition)
        assert_near(off_range, expected, atol, "off_range is not the distance to the projection")


def keeps_form(module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None) -> None:
    """Dtype, device, batch and channels-last layout pass through; ``inverse`` gives back the input's shape.

    Example:
        >>> keeps_form(Haar(), torch.randn(2, 3, 4, 4))
    """
    for form in (x, map_value(as_channels_last, x)):
        y = module(form, condition=condition)
        if isinstance(form, Tensor) and _is_tuple_of_one(y):
            fail("one stream came out as a tuple of one, not as a tensor")
        back = module.inverse(y, condition=condition)
        given = list(leaves(form))
        for result in (*leaves(y), *leaves(back)):
            if (result.dtype, result.device, len(result)) not in {(t.dtype, t.device, len(t)) for t in given}:
                fail(f"dtype, device or batch changed: {describe_form(form)} became {describe_form(result)}")
        if describe(back) != describe(form):
            fail(f"inverse gives back {describe(back)}, expected {describe(form)}")
        if all(is_channels_last(t) for t in given):
            # One pixel or one channel has no layout to pass on; what comes back from it is not asked.
            results = (*leaves(y), *leaves(back)) if all(is_channels_last(t) for t in leaves(y)) else leaves(y)
            lost = [t for t in results if has_layout(t) and not is_channels_last(t)]
            if lost:
                fail(f"channels_last was lost: strides {[t.stride() for t in lost]}")


def _is_tuple_of_one(value: object) -> bool:
    return isinstance(value, tuple) and len(cast("tuple[object, ...]", value)) == 1


def keeps_distances_if_isometric(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """Two outputs are as far apart as their inputs, if the layer calls itself isometric.

    Example:
        >>> keeps_distances_if_isometric(PixelUnshuffle(2), torch.randn(2, 3, 4, 4))
    """
    if module.isometric:
        other = moved(x)
        y, far = module(x, condition=condition), module(other, condition=condition)
        assert_near(
            distance(y, far), distance(x, other), atol, "the distance changed, though the layer calls itself isometric"
        )


def leaves_its_argument_alone(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """Neither direction changes its argument: not its values, version counter, storage or ``requires_grad``.

    Example:
        >>> leaves_its_argument_alone(Coupling(nn.Tanh()), (torch.randn(2, 3), torch.randn(2, 3)))
    """
    x = map_value(lambda t: t.detach().clone(), x)
    y = map_value(lambda t: t.detach().clone(), module(map_value(torch.clone, x), condition=condition))
    for name, call in directions(module, x, condition):
        argument = map_value(torch.clone, x if name.startswith("forward") else y)
        before = [(fingerprint(t), t.clone()) for t in leaves(argument)]
        call(argument, condition=condition)
        for (before_call, value), t in zip(before, leaves(argument), strict=True):
            if before_call != fingerprint(t):  # before the values are read: the storage may be gone
                fail(f"{name} wrote to its argument, freed it, or changed its form or requires_grad")
            if not equal(t, value):
                fail(f"{name} changed the values of its argument")


def keeps_state_in_eval(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """In ``eval`` no direction changes parameters or buffers.

    Example:
        >>> keeps_state_in_eval(BatchNorm(3), torch.randn(2, 3))
    """
    module = copy.deepcopy(module).eval()
    before = tensors_of(module)
    y = module(x, condition=condition)
    for name, call in directions(module, x, condition):
        call(x if name.startswith("forward") else y, condition=condition)
    module.off_range(y, condition=condition)
    assert_same_state(module, before, "state changed in eval")


def inverse_moves_no_buffer(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """In ``train`` the state after any number of inverses is that after one ``forward``.

    Example:
        >>> inverse_moves_no_buffer(ActNorm(3), torch.randn(2, 3))
    """
    module = copy.deepcopy(module).train()
    y = module(x, condition=condition)
    before, versions = tensors_of(module), [b._version for b in module.buffers()]
    for name, _ in directions(copy.deepcopy(module), x, condition):
        if name.startswith("inverse"):
            getattr(module, name)(y, condition=condition)
    module.off_range(y, condition=condition)
    assert_same_state(module, before, "inverse or off_range moved the state in train")
    if versions != [b._version for b in module.buffers()]:
        fail("inverse or off_range wrote to a buffer in train, which breaks a backward pass still to come")


def is_deterministic(module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None) -> None:
    """Under one seed both directions repeat their bits; the random stream moves only if the layer is stochastic.

    Example:
        >>> is_deterministic(Augment(2), torch.randn(2, 3))  # draws noise, and says so
    """
    start = torch.get_rng_state()
    y = module(x, condition=condition)
    for name, call in directions(module, x, condition):
        results: list[Value] = []
        states: list[Tensor] = []
        for _ in range(2):
            torch.set_rng_state(start)
            results.append(call(x if name.startswith("forward") else y, condition=condition))
            states.append(torch.get_rng_state())
        if not all(equal(a, b) for a, b in zip(leaves(results[0]), leaves(results[1]), strict=True)):
            fail("two runs under one seed differ")
        if not torch.equal(states[0], states[1]):
            fail("two runs under one seed leave the random stream in different states")
        if not module.stochastic and not torch.equal(states[0], start):
            fail("the layer moved the caller's random stream, though it does not call itself stochastic")


def treats_samples_alone(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """In ``eval`` a sample's output does not depend on the others in its batch, in both directions.

    Example:
        >>> treats_samples_alone(BatchNorm(3), torch.randn(2, 3))
    """
    module = copy.deepcopy(module).eval()
    y = module(x, condition=condition)
    batch = len(next(leaves(x)))
    for i in range(batch):
        own = None if condition is None else map_value(lambda t, i=i: part_of(t, i, batch), condition)
        one_x, one_y = (map_value(lambda t, i=i: t[i : i + 1], value) for value in (x, y))
        assert_close(module, module(one_x, condition=own), one_y, atol, f"sample {i} differs when alone")
        back = map_value(lambda t, i=i: t[i : i + 1], module.inverse(y, condition=condition))
        assert_close(module, module.inverse(one_y, condition=own), back, atol, f"sample {i} differs when alone")


def survives_copying(module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None) -> None:
    """``deepcopy``, pickling and a ``state_dict`` through a file give the same outputs; it holds every tensor.

    Each copy runs under one seed, so that it draws the same random numbers if it draws any.

    Example:
        >>> survives_copying(ActNorm(3), torch.randn(2, 3))
    """
    module = copy.deepcopy(module).eval()
    for part in cast("Iterable[nn.Module]", module.modules()):
        for key, value in vars(part).items():
            parts = cast("Collection[object]", value) if isinstance(value, (list, tuple, set)) else [value]
            if any(isinstance(part, Tensor) for part in parts):  # lost with the checkpoint, left behind by .to(device)
                fail(f"{type(part).__name__}.{key} holds a tensor that is neither parameter nor buffer")
    for key, parameter in module.named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()):  # an average of the weights would round it
            fail(f"{key} is a parameter of integers: constants are buffers")
    y = under_one_seed(lambda: module(x, condition=condition))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    reloaded = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in reloaded.parameters():
            parameter.zero_()
    reloaded.load_state_dict(torch.load(file, weights_only=True))
    copies = {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),  # noqa: S301 (our own bytes)
        "state_dict": reloaded,
    }
    for how, other in copies.items():
        found = under_one_seed(lambda other=other: other(x, condition=condition))
        for a, b in zip(leaves(found), leaves(y), strict=True):
            if not equal(a, b):
                fail(f"the output differs after {how}")


def log_det_matches_autograd(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """The log-determinants equal those of autograd's Jacobian, with opposite signs, and have right derivatives.

    Example:
        >>> log_det_matches_autograd(Sigmoid(), torch.randn(2, 3, dtype=torch.float64))
    """
    module = copy.deepcopy(module).eval()
    y, log_det = module.forward_and_log_det(x, condition=condition)
    back, inverse_log_det = module.inverse_and_log_det(y, condition=condition)
    assert_close(module, y, module(x, condition=condition), atol, "forward_and_log_det gives another value")
    assert_close(module, back, module.inverse(y, condition=condition), atol, "inverse_and_log_det: another value")
    batch = len(next(leaves(x)))
    if log_det.shape != (batch,) or inverse_log_det.shape != (batch,):
        fail(f"log-determinants of shapes {tuple(log_det.shape)} and {tuple(inverse_log_det.shape)}, not ({batch},)")
    expected = torch.tensor([float(slogdet(module, x, i, condition)) for i in range(batch)]).to(log_det)
    assert_near(log_det, expected, atol, "the forward log-determinant is off")
    assert_near(inverse_log_det, -expected, atol, "the inverse log-determinant is off")
    if all(t.dtype == torch.float64 for t in leaves(x)):
        gradcheck(module, lambda value: module.forward_and_log_det(value, condition=condition)[1], x)
        gradcheck(module, lambda value: module.inverse_and_log_det(value, condition=condition)[1], y)


def derivatives_are_right(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """In float64, autograd's derivatives in both directions agree with finite differences (``gradcheck``).

    Each run is under one seed, so that random numbers are the same at all points.

    Example:
        >>> derivatives_are_right(InvertibleLinear(3).double(), torch.randn(2, 3, dtype=torch.float64))
    """
    if any(t.dtype != torch.float64 for t in leaves(x)):
        return
    module = copy.deepcopy(module).eval()
    y = map_value(Tensor.detach, module(x, condition=condition))
    gradcheck(module, lambda value: under_one_seed(lambda: module(value, condition=condition)), x)
    gradcheck(module, lambda value: under_one_seed(lambda: module.inverse(value, condition=condition)), y)


LAWS: tuple[Law, ...] = (
    recovers_its_input,
    is_onto_if_bijective,
    projects_if_injective,
    keeps_form,
    keeps_distances_if_isometric,
    leaves_its_argument_alone,
    keeps_state_in_eval,
    inverse_moves_no_buffer,
    is_deterministic,
    treats_samples_alone,
    survives_copying,
    log_det_matches_autograd,
    derivatives_are_right,
)
"""All laws, in the order in which :func:`check` tries them."""
