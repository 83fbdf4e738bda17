"""Runs a layer again as it ran: its modes, autocast, random numbers and buffers, whatever has changed since."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from invertible import _check
from invertible._buffers import copy_of, on_copies, one_at_a_time, replaced_buffers, said_of_buffers, say_of_buffers
from invertible._compiled import compiled_call, is_compiled, set_compiled_call
from invertible._random import draws
from invertible._running import engine_runs, running

from ._torch import buffers_of, children_of, compiler_stance, compiler_stance_as, parameters_of, sharded_modules

__all__ = ["Replay", "Survey", "is_replaying"]

_NORM: type[nn.Module] = nn.modules.batchnorm._NormBase  # pyright: ignore[reportPrivateUsage]

_CPU, _META = torch.device("cpu"), torch.device("meta")

_replaying: ContextVar[bool] = ContextVar("invertible_replaying", default=False)


def is_replaying() -> bool:
    """Whether a function is being evaluated again for the backward pass, and not for the first time.

    A hook on a module inside a coupling's function fires in the replay too and can ask this.

    Example:
        >>> from invertible.backprop import is_replaying
        >>> is_replaying()
        False
    """
    return _replaying.get()


class Survey:
    """All that is found in some layers in one walk through their modules, which is done once per run."""

    __slots__ = ("compiled", "held", "modes", "norms", "others", "random", "sharded")

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.modes: list[tuple[nn.Module, bool, Callable[..., Any] | None]] = []
        """Every module, whether it is in training, and what it runs if it was compiled in place."""
        self.compiled = False
        """Whether any was compiled."""
        self.random = False
        """Whether any draws random numbers, as far as is known."""
        self.sharded: list[nn.Module] = []
        """Those that gather their parameters when they are called: ``fully_shard`` was applied to them."""
        self.held: dict[nn.Parameter, tuple[dict[str, Any], str]] = {}
        """Every parameter, and where it is."""
        self.norms: list[nn.Module] = []
        """Norms in training that count statistics but do not read them."""
        self.others: list[tuple[nn.Module, str, Tensor]] = []
        """All other buffers: a run may depend on their values."""
        shards_itself = sharded_modules()
        seen: set[nn.Module] = set()
        todo = list(layers)
        while todo:
            part = todo.pop()
            if part in seen:
                continue
            seen.add(part)
            todo += [child for child in children_of(part).values() if child is not None]
            self.modes.append((part, part.training, compiled_call(part)))
            self.compiled = self.compiled or is_compiled(part)
            self.random = self.random or draws(part)
            if isinstance(part, shards_itself):
                self.sharded.append(part)
            own = parameters_of(part)
            for key, parameter in own.items():
                if parameter is not None:
                    self.held[parameter] = (own, key)
            buffers = buffers_of(part)
            if buffers:
                if part.training and _counts_only(part):
                    self.norms.append(part)
                else:
                    self.others += [(part, key, buffer) for key, buffer in buffers.items() if buffer is not None]


class Replay:
    """What a run depends on apart from its arguments and parameters: taken before it, set again for each replay.

    ``record(run)`` runs; ``with again()`` is around a replay.
    """

    __slots__ = (
        "after", "autocast", "devices", "entry", "kinds", "may_write", "moving", "random", "read", "stance", "survey",
    )  # fmt: skip

    def __init__(self, survey: Survey, inputs: Sequence[Tensor], *, moving: bool = True) -> None:
        self.survey = survey
        self.may_write = moving
        self.devices = list({t.device for t in inputs} - {_CPU, _META})
        self.kinds = ["cpu", *{d.type for d in self.devices}]
        self.autocast = {kind: torch.get_autocast_dtype(kind) for kind in self.kinds if torch.is_autocast_enabled(kind)}
        self.moving = said_of_buffers()
        self.random: list[tuple[torch.device, Tensor]] = []  # the states before the run, if it drew random numbers
        self.after: list[int] = []  # digests of those after it
        # Buffers that the run wrote, or that were copies, as they were before it; those that it wrote before it used
        # them, as it left them.
        self.entry: list[tuple[nn.Module, str, Tensor]] = []
        self.read: list[tuple[nn.Module, str, Tensor, int]] = []  # those that it did not write, with their versions
        self.stance = compiler_stance() if survey.compiled else None

    @property
    def drew(self) -> bool:
        """Whether the run moved the random stream."""
        return bool(self.random)

    def record(self, run: Callable[[], Any]) -> Any:
        """Returns ``run()``, the run that is to be replayed."""
        copies = {id(buffer): copy_of(buffer) for _, _, buffer in self.survey.others}  # one for all that share it
        before = [(part, key, b, b._version, copies[id(b)]) for part, key, b in self.survey.others]
        with one_at_a_time if self.survey.random else nullcontext():
            random = self._random_state()
            with running(None):
                if self.autocast:
                    with ExitStack() as stack:
                        self._enter_autocast(stack)
                        result = run()
                else:
                    result = run()
            after = self._random_state()
        if any(not torch.equal(a, b) for (_, a), (_, b) in zip(random, after, strict=True)):
            self.random, self.after = random, _digest(after)
        for part, key, buffer, version, copy in before:
            # What is a copy itself, as in a function whose inverse runs or that is replayed, is gone by then.
            same = buffers_of(part).get(key) is buffer and buffer._version == version and not on_copies()
            if not same or (self.may_write and _writes(part, key, copy)):
                now = buffers_of(part).get(key) if key in getattr(part, "_written_before_use", ()) else None
                self.entry.append((part, key, copy if now is None else now.clone()))
            else:
                self.read.append((part, key, buffer, version))
        return result

    @contextmanager
    def again(self, *, random: bool = True) -> Generator[None]:
        """Around a replay; without the random numbers, if it is of the other direction."""
        self._refuse_changed_buffers()
        token = _replaying.set(True)
        try:
            with ExitStack() as stack:  # of what differs from now: a context that changes nothing costs time, too
                for part, mode, compiled in self.survey.modes:
                    if part.training != mode:
                        stack.callback(setattr, part, "training", part.training)
                        part.training = mode
                    if compiled_call(part) is not compiled:
                        stack.callback(set_compiled_call, part, compiled_call(part))
                        set_compiled_call(part, compiled)
                if engine_runs():
                    stack.enter_context(running(None))
                if self.stance is not None and compiler_stance() != self.stance:
                    stack.enter_context(compiler_stance_as(self.stance))
                if said_of_buffers() != self.moving:
                    stack.enter_context(say_of_buffers(self.moving))
                if self.entry:
                    self._refuse_shared_memory()
                    stack.enter_context(_copied(self.entry))
                if self.survey.compiled:  # without statistics the norms would be compiled anew
                    stack.enter_context(_on_copies(self.survey.norms))
                elif self.survey.norms:
                    stack.enter_context(_uncounted(self.survey.norms))
                self._enter_autocast(stack)
                if random and self.random:
                    stack.enter_context(self._random())
                yield
        except Exception as error:
            if self.survey.norms and not self.survey.compiled:
                error.add_note(
                    "in the replay for the backward pass, where norms in training have no statistics: does a hook or "
                    "the function read them? invertible.backprop.is_replaying() tells, and Store() has no replay"
                )
            raise
        finally:
            _replaying.reset(token)

    def _refuse_shared_memory(self) -> None:
        """Buffers that are views of one another are copied apart, so that one would not see what another is given."""
        written = {id(buffers_of(part).get(key)) for part, key, _ in self.entry}
        for part, key, buffer in self.survey.others:
            if id(buffer) in written:
                for other_part, other, view in self.survey.others:
                    if view is not buffer and view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                        raise RuntimeError(
                            f"{_check.name(part)}: its buffer {key!r} was written and shares memory with the buffer "
                            f"{other!r} of {type(other_part).__name__}, so that the layer cannot be run again as it "
                            "ran. Use Store() here."
                        )

    def _refuse_changed_buffers(self) -> None:
        for part, key, buffer, version in self.read:
            if buffers_of(part).get(key) is not buffer or buffer._version != version:
                raise RuntimeError(
                    f"{_check.name(part)}: its buffer {key!r} was changed between forward and backward (by a hook on "
                    "the layer?), so that what it did cannot be done again. Call backward first, or use Store()."
                )

    def _enter_autocast(self, stack: ExitStack) -> None:
        # Without autocast's cache: a weight cast here, without a graph, must not be reused where there is one.
        for kind in self.kinds:
            if kind in self.autocast or torch.is_autocast_enabled(kind):
                on, dtype = kind in self.autocast, self.autocast.get(kind)
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False))

    @contextmanager
    def _random(self) -> Generator[None]:
        with one_at_a_time:  # all threads share the generators
            now = self._random_state()
            try:
                _set_random_state(self.random)
                yield
                if self.survey.random and _digest(self._random_state()) != self.after:
                    raise RuntimeError(
                        "The replay for the backward pass did not draw the random numbers of the forward pass: does "
                        "another thread draw from torch's global generator meanwhile, or a hook in one of the passes "
                        "only? Give these a generator of their own, or use Store()."
                    )
            finally:
                _set_random_state(now)

    def _random_state(self) -> list[tuple[torch.device, Tensor]]:
        states = [(_CPU, torch.get_rng_state())]
        for device in self.devices:
            where = () if device.type == "mps" else (device,)  # there is one of these only
            states.append((device, torch.get_device_module(device).get_rng_state(*where)))
        return states


@contextmanager
def _uncounted(norms: Sequence[nn.Module]) -> Generator[None]:
    """Lets norms in training run without statistics: they don't read them, and have counted this batch already.

    Instance norm looks at the buffers alone, and synchronised batch norm at the flag alone.
    """
    with one_at_a_time:
        kept = [(norm, norm.__dict__["track_running_stats"], dict(buffers_of(norm))) for norm in norms]
        try:
            for norm, _, buffers in kept:
                norm.__dict__["track_running_stats"] = False
                buffers_of(norm).update(dict.fromkeys(buffers))
            yield
        finally:
            for norm, tracks, buffers in kept:
                norm.__dict__["track_running_stats"] = tracks
                buffers_of(norm).update(buffers)


def _on_copies(norms: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Lets norms in training count this batch again where it does not matter."""
    return _copied([(norm, key, b) for norm in norms for key, b in buffers_of(norm).items() if b is not None])


def _copied(buffers: Sequence[tuple[nn.Module, str, Tensor]]) -> AbstractContextManager[None]:
    """Lets modules work on copies of these buffers, one for all that share it."""
    copies = {id(buffer): copy_of(buffer) for _, _, buffer in buffers}
    return replaced_buffers([(part, key, copies[id(buffer)]) for part, key, buffer in buffers])


_written: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], bool]] = WeakKeyDictionary()


def _writes(part: nn.Module, key: str, before: Tensor) -> bool:
    """Whether a part writes this buffer without counting it in the version, as ``batch_norm`` does.

    To compare values waits for the device, so it is done after the part's first run in each mode only.
    """
    if isinstance(part, _NORM) and part.training:
        return True
    known = _written.setdefault(part, {})
    question = (key, part.training)
    if question not in known:
        buffer = buffers_of(part)[key]
        known[question] = buffer is not None and not buffer.is_meta and not torch.equal(buffer, before)
    return known[question]


def _counts_only(part: nn.Module) -> bool:
    """Whether this is a norm of torch that in training writes its statistics and does not read them."""
    return isinstance(part, _NORM) and type(part).__module__.startswith("torch.nn.")


def _digest(states: Sequence[tuple[torch.device, Tensor]]) -> list[int]:
    """A number for each state: a sum in which each byte has its own weight. A state itself is 5 KiB on the CPU."""
    return [int((state.long() * torch.arange(1, len(state) + 1, device=_CPU)).sum()) for _, state in states]


def _set_random_state(states: Sequence[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            where = () if device.type == "mps" else (device,)
            torch.get_device_module(device).set_rng_state(state, *where)
