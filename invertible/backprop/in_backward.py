"""An optimiser whose steps are taken inside the backward pass, so that gradients don't pile up."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["StepInBackward"]


class StepInBackward:
    r"""Updates each parameter as soon as its gradient is there, and frees the gradient at once.

    With :class:`~invertible.Reconstruct`, the gradients of one layer are gone before the layer before it is
    reconstructed, so that a step needs room for those of one layer, not of all parameters. The optimiser stays as it
    is: its state, groups, ``state_dict`` and schedulers serve as ever, and ``step`` and ``zero_grad`` after the
    backward pass may stay in the loop, where they find nothing to do. Weights, moments and all are those of the
    ordinary loop, bit for bit where the optimiser treats each parameter alone.

    Source: the hooks are torch's, https://pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html

    What can't be had with it, for it needs all gradients before the first update:

    * accumulation: each backward pass is a step of its own;
    * clipping by the norm of all gradients, ``GradScaler``, and to skip a step because a gradient is not finite;
    * ``DistributedDataParallel``, which would average the gradients after they were used. (With ``fully_shard`` it is
      not tested.)
    * hooks of the optimiser's ``step``, which see none of these;
    * parameters that are frozen now and trained later: their gradients stay for ``step`` after the backward pass;
    * to undo: a :class:`~invertible.DriftError` is raised at the end of the backward pass, when the weights have been
      updated by wrong gradients. Go back to a copy then.

    Args:
        optimizer: any that updates each parameter by its own gradient and state, as all in ``torch.optim`` but
            ``LBFGS`` do.

    Raises:
        TypeError: for what is no optimiser, for ``LBFGS``, and in the first step of an optimiser that counts or adapts
            for a whole group.
        ValueError: if a parameter has a gradient already.

    Example:
        >>> net = Sequential(Split(), *(Coupling(nn.Linear(2, 2)) for _ in range(9)), Merge(), backprop=Reconstruct())
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        >>> inside = StepInBackward(optimizer)
        >>> net(torch.rand(3, 4)).square().sum().backward()
        >>> [p.grad for p in net.parameters() if p.grad is not None]
        []
        >>> inside.remove()
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"StepInBackward: optimizer must be one of torch.optim, got {type(optimizer).__name__}.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("StepInBackward: the optimizer must update each parameter alone, got LBFGS.")
        groups = [(i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
        if any(p.grad is not None for _, p in groups):
            raise ValueError("StepInBackward: no parameter may have a gradient yet. Call optimizer.zero_grad() first.")
        self._optimizer, self._one = optimizer, copy.copy(optimizer)
        self._torchs = {*vars(self._one), "step"}  # what a copy has, and what a scheduler has put there
        self._group = {p: i for i, p in groups}
        self._flags: dict[Tensor, dict[str, bool]] = {p: {} for p in self._group}  # "has begun", of each alone
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._update) for p in self._group if p.requires_grad
        ]

    def remove(self) -> None:
        """Leaves the gradients where they are from now on."""
        for handle in self._handles:
            handle.remove()
        for flags in self._flags.values():
            vars(self._optimizer).update(flags)

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        """Steps of this parameter alone, by the options that its group has now."""
        whole = self._optimizer.param_groups[self._group[parameter]]
        group: dict[str, Any] = {**whole, "params": [parameter]}
        attributes = {key: value for key, value in vars(self._optimizer).items() if key not in self._torchs}
        one = vars(self._one)  # a copy of an optimiser has no attributes of its own, and they may have changed
        one.update(attributes | self._flags[parameter])
        own = {key: (value, _writes(value)) for key, value in one.items() if key not in self._torchs}
        self._one.param_groups, self._one.state = [group], self._optimizer.state  # loading a state replaces both
        self._one.step()
        for key, value in group.items():
            if key != "params" and value is not whole.get(key):
                raise self._changed(f"{key!r} of the whole group")
        for key, (value, writes) in own.items():
            now = one.get(key)
            if isinstance(value, bool) and isinstance(now, bool):
                if now is not value:
                    self._flags[parameter][key] = now
            elif _writes(value) != writes or _counts(value, now):
                raise self._changed(f"its attribute {key!r}")
        parameter.grad = None

    def _changed(self, what: str) -> TypeError:
        return TypeError(
            f"StepInBackward: the optimizer must update each parameter alone, but {type(self._one).__name__} changes "
            f"{what} at each step."
        )


def _writes(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _counts(before: Any, now: Any) -> bool:
    """Whether an attribute that had a value has another one; what is neither a number nor a tensor may be a cache."""
    if now is before or not (before is None or isinstance(before, int | float | Tensor)):
        return False
    return isinstance(before, Tensor) or isinstance(now, Tensor) or now != before
