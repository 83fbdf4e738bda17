"""The laws, one function each. The first line of a law's docstring is the law."""

import copy
import io
import pickle
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from invertible._value import Value, describe, is_channels_last, leaves, map_value
from invertible.module import Exactness, InvertibleModule

__all__ = [
    "LAWS",
    "Law",
    "check",
    "derivatives_are_right",
    "inverse_moves_no_buffer",
    "is_deterministic",
    "is_onto_if_bijective",
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
        >>> from invertible import PixelUnshuffle
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
    """``inverse(forward(x))`` is ``x``: bit for bit if ``EXACT``, else within the tolerance."""
    y = module(x, condition=condition)
    _assert_close(module, module.inverse(y, condition=condition), x, atol, "inverse(forward(x)) is not x")


def is_onto_if_bijective(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """``forward(inverse(y))`` is ``y`` if the layer is bijective, for outputs near those that ``forward`` returned."""
    if module.bijective:
        y = _off_range(module(x, condition=condition))
        back = module(module.inverse(y, condition=condition), condition=condition)
        _assert_close(module, back, y, atol, "forward(inverse(y)) is not y, though the layer calls itself bijective")
        zero = torch.zeros_like(module.off_range(y, condition=condition))
        _assert_close(module, module.off_range(y, condition=condition), zero, atol, "off_range is not 0")


def projects_if_injective(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """``forward(inverse(y))`` is a projection onto the range if the layer is injective: twice is once."""
    if not module.bijective:

        def project(y: Value) -> Value:
            return module(module.inverse(y, condition=condition), condition=condition)

        y = _off_range(module(x, condition=condition))
        once = project(y)
        _assert_close(module, project(once), once, atol, "forward(inverse(y)) is not a projection")
        residual = torch.cat([(a - b).flatten(1) for a, b in zip(leaves(y), leaves(once), strict=True)], dim=1)
        expected = residual.abs().square().sum(dim=1).sqrt()
        off_range = module.off_range(y, condition=condition)
        _assert_near(off_range, expected, atol, "off_range is not the distance to the projection")


def keeps_form(module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None) -> None:
    """Dtype, device, batch and channels-last layout pass through; ``inverse`` gives back the input's shape."""
    for form in (x, map_value(_channels_last, x)):
        y = module(form, condition=condition)
        back = module.inverse(y, condition=condition)
        given = list(leaves(form))
        for result in (*leaves(y), *leaves(back)):
            if {(result.dtype, result.device, len(result))} != {(t.dtype, t.device, len(t)) for t in given}:
                _fail(f"dtype, device or batch changed: {_form(form)} became {_form(result)}")
        if describe(back) != describe(form):
            _fail(f"inverse gives back {describe(back)}, expected {describe(form)}")
        if all(is_channels_last(t) for t in given):
            # One pixel or one channel has no layout to pass on; what comes back from it is not asked.
            results = (*leaves(y), *leaves(back)) if all(is_channels_last(t) for t in leaves(y)) else leaves(y)
            lost = [t for t in results if _has_layout(t) and not is_channels_last(t)]
            if lost:
                _fail(f"channels_last was lost: strides {[t.stride() for t in lost]}")


def leaves_its_argument_alone(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """Neither direction changes its argument: not its values, version counter, storage or ``requires_grad``."""
    x = map_value(lambda t: t.detach().clone(), x)
    y = map_value(lambda t: t.detach().clone(), module(map_value(torch.clone, x), condition=condition))
    calls: dict[str, tuple[Callable[..., Any], Value]] = {"forward": (module, x), "inverse": (module.inverse, y)}
    for name, (call, argument) in calls.items():
        before = [(_identity(t), t.clone()) for t in leaves(argument)]
        call(argument, condition=condition)
        for (identity, value), t in zip(before, leaves(argument), strict=True):
            if identity != _identity(t):  # before the values are read: the storage may be gone
                _fail(f"{name} wrote to its argument, freed it, or changed its form or requires_grad")
            if not _equal(t, value):
                _fail(f"{name} changed the values of its argument")


def keeps_state_in_eval(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """In ``eval`` no direction changes parameters or buffers."""
    module = copy.deepcopy(module).eval()
    before = _state(module)
    y = module(x, condition=condition)
    module.inverse(y, condition=condition)
    module.off_range(y, condition=condition)
    _assert_same_state(module, before, "state changed in eval")


def inverse_moves_no_buffer(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """In ``train`` the state after any number of inverses is that after one ``forward``."""
    module = copy.deepcopy(module).train()
    y = module(x, condition=condition)
    before, versions = _state(module), [b._version for b in module.buffers()]
    module.inverse(y, condition=condition)
    module.off_range(y, condition=condition)
    _assert_same_state(module, before, "inverse or off_range moved the state in train")
    if versions != [b._version for b in module.buffers()]:
        _fail("inverse or off_range wrote to a buffer in train, which breaks a backward pass still to come")


def is_deterministic(module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None) -> None:
    """Under one seed both directions repeat their bits; the random stream moves only if the layer is stochastic."""
    directions: list[Callable[[Value], Value]] = [
        lambda value: module(value, condition=condition),
        lambda value: module.inverse(module(value, condition=condition), condition=condition),
    ]
    for direction in directions:
        results: list[Value] = []
        states: list[Tensor] = []
        start = torch.get_rng_state()
        for _ in range(2):
            torch.set_rng_state(start)
            results.append(direction(x))
            states.append(torch.get_rng_state())
        if not all(_equal(a, b) for a, b in zip(leaves(results[0]), leaves(results[1]), strict=True)):
            _fail("two runs under one seed differ")
        if not torch.equal(states[0], states[1]):
            _fail("two runs under one seed leave the random stream in different states")
        if not module.stochastic and not torch.equal(states[0], start):
            _fail("the layer moved the caller's random stream, though it does not call itself stochastic")


def treats_samples_alone(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """In ``eval`` a sample's output does not depend on the others in its batch, in both directions."""
    module = copy.deepcopy(module).eval()
    y = module(x, condition=condition)
    batch = len(next(leaves(x)))
    for i in range(batch):
        own = None if condition is None else map_value(lambda t, i=i: t[i : i + 1], condition)
        one_x, one_y = (map_value(lambda t, i=i: t[i : i + 1], value) for value in (x, y))
        _assert_close(module, module(one_x, condition=own), one_y, atol, f"sample {i} differs when alone")
        back = map_value(lambda t, i=i: t[i : i + 1], module.inverse(y, condition=condition))
        _assert_close(module, module.inverse(one_y, condition=own), back, atol, f"sample {i} differs when alone")


def survives_copying(module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None) -> None:
    """``deepcopy``, pickling and a ``state_dict`` through a file give the same outputs; it holds every tensor."""
    module = copy.deepcopy(module).eval()
    for part in cast("Iterable[nn.Module]", module.modules()):
        for key, value in vars(part).items():
            if isinstance(value, Tensor):  # such a tensor is lost with the checkpoint and stays behind on .to(device)
                _fail(f"{type(part).__name__}.{key} is a tensor, but neither parameter nor buffer")
    y = module(x, condition=condition)
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
        for a, b in zip(leaves(other(x, condition=condition)), leaves(y), strict=True):
            if not _equal(a, b):
                _fail(f"the output differs after {how}")


def log_det_matches_autograd(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """The log-determinants equal those of autograd's Jacobian, with opposite signs, and have right derivatives."""
    module = copy.deepcopy(module).eval()
    y, log_det = module.forward_and_log_det(x, condition=condition)
    back, inverse_log_det = module.inverse_and_log_det(y, condition=condition)
    _assert_close(module, y, module(x, condition=condition), atol, "forward_and_log_det gives another value")
    _assert_close(module, back, module.inverse(y, condition=condition), atol, "inverse_and_log_det: another value")
    batch = len(next(leaves(x)))
    if log_det.shape != (batch,) or inverse_log_det.shape != (batch,):
        _fail(f"log-determinants of shapes {tuple(log_det.shape)} and {tuple(inverse_log_det.shape)}, not ({batch},)")
    expected = torch.stack([_slogdet(module, x, i, condition) for i in range(batch)]).to(log_det)
    _assert_near(log_det, expected, atol, "the forward log-determinant is off")
    _assert_near(inverse_log_det, -expected, atol, "the inverse log-determinant is off")
    if all(t.dtype == torch.float64 for t in leaves(x)):
        _gradcheck(module, lambda value: module.forward_and_log_det(value, condition=condition)[1], x)


def derivatives_are_right(
    module: Layer, x: Value, /, *, condition: Value | None = None, atol: float | None = None
) -> None:
    """In float64, autograd's derivatives in both directions agree with finite differences (``gradcheck``)."""
    if any(t.dtype != torch.float64 for t in leaves(x)):
        return
    module = copy.deepcopy(module).eval()
    y = map_value(Tensor.detach, module(x, condition=condition))
    _gradcheck(module, lambda value: module(value, condition=condition), x)
    _gradcheck(module, lambda value: module.inverse(value, condition=condition), y)


LAWS: tuple[Law, ...] = (
    recovers_its_input,
    is_onto_if_bijective,
    projects_if_injective,
    keeps_form,
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


def _fail(message: str) -> None:
    raise AssertionError(message)


def _assert_close(module: Layer, actual: Value, expected: Value, atol: float | None, message: str) -> None:
    if describe(actual) != describe(expected):
        _fail(f"{message}: {describe(actual)}, expected {describe(expected)}")
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        _assert_near(a, b, 0.0 if module.exactness is Exactness.EXACT else atol, message)


def _assert_near(actual: Tensor, expected: Tensor, atol: float | None, message: str) -> None:
    rtol = None if atol is None else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda detail: f"{message}\n{detail}"
    )


def _gradcheck(module: nn.Module, call: Callable[[Value], Value], value: Value) -> None:
    """Compares autograd with finite differences, for the input and for the parameters inside."""
    value = map_value(lambda t: t.detach().clone().requires_grad_(), value)
    inputs = list(leaves(value))

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:  # gradcheck moves the parameters in place
        given = iter(tensors)
        return tuple(leaves(call(map_value(lambda _: next(given), value))))

    parameters = [p for p in module.parameters() if p.requires_grad and p.dtype == torch.float64]
    torch.autograd.gradcheck(flat, (*inputs, *parameters), fast_mode=True)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _off_range(y: Value) -> Value:
    """An output as nobody computed it: each element moved by up to a tenth, integers by one."""

    def move(t: Tensor) -> Tensor:
        t = t.detach()
        return t + 0.1 * torch.rand_like(t) if t.is_floating_point() or t.is_complex() else t ^ 1

    return map_value(move, y)


def _form(value: Value) -> str:
    return "; ".join(f"{t.dtype} on {t.device} with batch {len(t)}" for t in leaves(value))


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


def _has_layout(x: Tensor) -> bool:
    """Whether contiguous and channels-last are two layouts: not with one channel, nor with one pixel."""
    return x.ndim in (4, 5) and x.shape[1] > 1 and x.shape[2:].numel() > 1


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x._version, x.data_ptr(), x.untyped_storage().nbytes(), x.requires_grad, x.shape, x.stride()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in (*module.named_parameters(), *module.named_buffers())}


def _assert_same_state(module: nn.Module, before: dict[str, Tensor], message: str) -> None:
    for key, value in _state(module).items():
        if not _equal(value, before[key]):
            _fail(f"{message}: {key}")


def _slogdet(module: Layer, x: Value, sample: int, condition: Value | None) -> Tensor:
    """Half of log det JᵀJ for one sample, by autograd: log|det J| where J is square."""
    one = map_value(lambda t: t[sample : sample + 1].detach(), x)
    own = None if condition is None else map_value(lambda t: t[sample : sample + 1], condition)

    def flat(vector: Tensor) -> Tensor:
        rest = [vector]

        def take(t: Tensor) -> Tensor:
            head, rest[0] = rest[0][: t.numel()], rest[0][t.numel() :]
            return head.view_as(t)

        return torch.cat([t.flatten() for t in leaves(module(map_value(take, one), condition=own))])

    start = torch.cat([t.flatten() for t in leaves(one)])
    if not start.is_floating_point():
        return torch.zeros((), device=start.device)  # a map between integers has no Jacobian; by convention 0
    jacobian = cast("Tensor", cast("Any", torch.autograd.functional).jacobian(flat, start))
    if jacobian.shape[0] == jacobian.shape[1]:
        return jacobian.slogdet()[1]
    return (jacobian.T @ jacobian).slogdet()[1] / 2
