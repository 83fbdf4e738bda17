"""Solves x = y - F(x) for a contraction F, and differentiates the solution."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._range import is_unread
from ._value import graph_leaves

__all__ = ["ConvergenceError", "Solved", "differentiable", "solve"]

Function = Callable[[Tensor], Tensor]

_UNKNOWN = 0.9999
"""What is taken for the contraction of a function of which nothing is known, until two steps can be compared."""


class ConvergenceError(RuntimeError):
    """An iteration has not come to its tolerance, or has met values that are not finite.

    Example:
        >>> step = Residual(nn.Linear(2, 2), max_iterations=1)
        >>> try:
        ...     step.inverse(torch.ones(1, 2))
        ... except ConvergenceError as error:
        ...     print(str(error).split(": ")[1])
        inverse did not converge in 1 iteration
    """


@dataclass(frozen=True)
class Solved:
    r"""What the last inverse of a batch took.

    ``iterations`` is the number of evaluations of the function, that of the slowest sample. ``error`` is how far off
    the result is at most, as the root mean square over the elements of the worst sample, in the input's unit; rounding
    comes on top. It is proved if ``guaranteed``: with the Lipschitz constant L of the function,
    :math:`\lVert x_k - x \rVert \le \frac{L}{1 - L} \lVert x_k - x_{k-1} \rVert`. Else L is that of the last two steps.

    Example:
        >>> step = Residual(nn.Linear(2, 2))
        >>> x = step.inverse(torch.ones(1, 2))
        >>> step.solved.error < 1e-5, step.solved.guaranteed
        (True, True)
    """

    iterations: int
    error: float
    guaranteed: bool


def size_of(x: Tensor) -> Tensor:
    """The root mean square of each sample, of large and small numbers, too, whose squares are none."""
    x = x.flatten(1)
    if not x.numel():
        return x.new_zeros(len(x))
    largest = x.abs().amax(1)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return unit * (x / unit[:, None]).square().mean(1).sqrt()


def solve(
    function: Function, y: Tensor, *, lipschitz: float | None, tolerance: float | Tensor, limit: int
) -> tuple[Tensor, Solved, Tensor]:
    """Iterates x <- y - F(x) from y, each sample until its own error is below the tolerance.

    A sample that is done stays as it is, whatever the others need. Below what rounding leaves, nobody asks for more.

    Returns:
        The solution, the report, and by how much each sample missed its tolerance: 0 if it did not.
    """
    x, previous = y, None
    shape = (-1, *[1] * (x.ndim - 1))
    active = torch.ones(len(y), dtype=torch.bool, device=y.device)
    error = left = torch.zeros(len(y), dtype=y.dtype, device=y.device)
    factor = None if lipschitz is None else lipschitz / (1 - lipschitz)
    size = size_of(y)
    iterations = 0
    while iterations < limit and y.numel() and bool(active.any()):
        new = y - function(x)
        iterations += 1
        change = size_of(new - x)
        rounding = 4 * torch.finfo(y.dtype).eps * (size_of(new) + size)
        if factor is None:
            rate = _UNKNOWN if previous is None else torch.where(previous > 0, change / previous, 0.0)
            rate = torch.as_tensor(rate, dtype=y.dtype).clamp(0.5, _UNKNOWN)
            previous = change
            times = rate / (1 - rate)
            least = (times * rounding).clamp(min=tolerance)
        else:
            times = factor
            least = (max(factor, 1.0) * rounding).clamp(min=tolerance)
        x = torch.where(active.view(shape), new, x)
        error = torch.where(active, times * change, error)
        left = torch.where(active, torch.where(error <= least, 0.0, error), left)
        active = active & (left > 0) & left.isfinite()
    worst = float(error.amax()) if len(error) else 0.0
    return x, Solved(iterations, worst, lipschitz is not None), left


def differentiable(
    function: Function, y: Tensor, solution: Tensor, *, tolerance: float, limit: int, who: str, lipschitz: float | None
) -> Tensor:
    r"""Returns the solution of x = y - F(x) with its derivatives, from one more evaluation of F.

    A cotangent v becomes :math:`g = (I + J^T)^{-1} v`, by the same iteration, :math:`g \leftarrow v - J^T g`.
    """
    if not torch.is_grad_enabled():
        return solution
    if y.requires_grad:
        # Where the function is differentiated hangs on y, for a tensor of its own would be a stranger in the graph; but
        # no gradient goes that way.
        nothing = y - y.detach()
        nothing.register_hook(_stopped)  # pyright: ignore[reportUnknownMemberType]
        start = solution.detach() + nothing
    else:
        start = solution.detach().requires_grad_()
    value = function(start)
    if not (y.requires_grad or any(t is not start for t in graph_leaves([value]))):
        return solution  # nothing is trained
    x = y - value

    def implicit(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        if torch.is_grad_enabled():
            raise RuntimeError(f"{who}: the inverse has no second derivatives (create_graph=True).")

        def adjoint(g: Tensor) -> Tensor:
            return torch.autograd.grad(value, start, g, retain_graph=True, materialize_grads=True)[0]

        if not value.requires_grad:
            return grad
        if is_unread() or grad.is_meta:  # nobody can say when to stop
            return grad - adjoint(grad)
        found, solved, left = solve(
            adjoint, grad, lipschitz=lipschitz, tolerance=tolerance * size_of(grad), limit=limit
        )
        # What was not finite before goes through, for a gradient scaler to find.
        if bool(((left != 0) & size_of(grad).isfinite()).any()):
            raise ConvergenceError(
                f"{who}: the gradient of inverse did not converge in {solved.iterations} iterations. Raise "
                "max_iterations, or lower lipschitz."
            )
        return found

    x.register_hook(implicit)  # pyright: ignore[reportUnknownMemberType]
    return solution.detach() + (x - x.detach())


def _stopped(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else torch.zeros_like(grad)
