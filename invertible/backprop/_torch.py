"""What the engine needs of torch that has no public name; each is used by torch's own DDP, FSDP or checkpoint."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportPrivateImportUsage=false, reportUnknownArgumentType=false

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from invertible._tracing import transformed

__all__ = [
    "at_end_of_backward",
    "backward_keeps_graph",
    "backward_number",
    "buffers_of",
    "children_of",
    "compiler_stance",
    "compiler_stance_as",
    "hooks_of",
    "parameters_of",
    "parametrizations_cached",
    "sharded_modules",
    "tape_serves",
    "without_cached_parametrizations",
    "without_global_hooks",
    "without_modes",
]


def backward_number() -> int:
    """A number of the backward pass that runs in this thread; nested ones have their own."""
    return torch._C._current_graph_task_id()


def backward_keeps_graph() -> bool:
    """Whether the running backward pass was called with ``retain_graph``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def parametrizations_cached() -> bool:
    """Whether ``torch.nn.utils.parametrize.cached`` is on: what is computed without a graph would be taken again."""
    return bool(parametrize._cache_enabled)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Calls back when the running backward pass has ended; what it raises, ``backward`` raises."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore[reportAttributeAccessIssue]


def tape_serves() -> bool:
    """Whether there will be a backward pass of the usual kind; elsewhere plain autograd is right.

    Not without gradients, while exporting or tracing, under ``torch.func``, in forward-mode differentiation, nor while
    parametrisations are cached, for these would be computed without a graph.
    """
    return (
        torch.is_grad_enabled() and not transformed() and not torch.jit.is_tracing() and not parametrizations_cached()
    )


@contextmanager
def without_cached_parametrizations() -> Generator[None]:
    """Lets the calls inside compute every parametrization anew and remember none."""
    before, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


@contextmanager
def without_global_hooks() -> Generator[None]:
    """Lets no hook that was registered for all modules fire in the calls inside."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    every: list[dict[Any, Any]] = [getattr(nn.modules.module, f"_global_{kind}") for kind in kinds]
    before = [dict(hooks) for hooks in every]
    try:
        for hooks in every:
            hooks.clear()
        yield
    finally:
        for hooks, true in zip(every, before, strict=True):
            hooks.update(true)


def without_modes() -> AbstractContextManager[Any]:
    """Lets no mode around, such as a counter of operations, see the calls inside."""
    return _disable_current_modes()


def compiler_stance() -> Any:
    """What ``torch.compiler.set_stance`` has set: whether compiled functions run as such."""
    from torch._dynamo import eval_frame  # slow to import, and there already where anything is compiled

    return eval_frame._stance


def compiler_stance_as(stance: Any) -> AbstractContextManager[Any]:
    """Sets it again for the calls inside."""
    if stance.stance == "default" and stance.backend is not None:
        return torch.compiler.set_stance("default", force_backend=stance.backend)
    return torch.compiler.set_stance(stance.stance, skip_guard_eval_unsafe=stance.skip_guard_eval_unsafe)


def sharded_modules() -> tuple[type, ...]:
    """The class of what ``fully_shard`` was applied to, for ``isinstance``; none if nobody has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)  # another thread may be importing it
    return () if kind is None else (kind,)


def children_of(part: nn.Module) -> dict[str, nn.Module | None]:
    """The modules directly in this one: the dictionary that it uses, not a copy."""
    return part._modules


def parameters_of(part: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of this module itself: the dictionary that it uses."""
    return part._parameters


def buffers_of(part: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of this module itself: the dictionary that it uses."""
    return part._buffers


def hooks_of(tensor: Tensor) -> dict[int, Callable[[Tensor], Tensor | None]] | None:
    """The hooks on a tensor's gradient: the dictionary that autograd reads, if there is one."""
    return tensor._backward_hooks
