"""Solves x = y - F(x) for a contraction F, and differentiates the solution."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
        ...     print(str(error).partition(":")[2][:37])
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
    """The root mean square of each sample."""
    return x.flatten(1).square().mean(1).sqrt()


def solve(
    function: Function, y: Tensor, *, lipschitz: float | None, tolerance: float | Tensor, limit: int
) -> tuple[Tensor, Solved, Tensor]:
    """Iterates x <- y - F(x) from y, each sample until its own error is below the tolerance.

    A sample that is done stays as it is, whatever the others need. Below what rounding leaves, nobody asks for more.

    Returns:
        The solution, the report, and by how much each sample missed its tolerance: 0 if it did not.
    """
    x, previous = y, None
    active = torch.ones(len(y), dtype=torch.bool, device=y.device)
    error = torch.zeros(len(y), dtype=y.dtype, device=y.device)
    left = error
    eps = torch.finfo(y.dtype).eps
    iterations = 0
    while iterations < limit and y.numel() and bool(active.any()):
        new = y - function(x)
        iterations += 1
        change = size_of(new - x)
        if lipschitz is not None:
            rate = torch.full_like(change, lipschitz)
        elif previous is None:
            rate = torch.full_like(change, _UNKNOWN)
        else:
            rate = torch.where(previous > 0, change / previous, 0.0).clamp(0.5, _UNKNOWN)
        factor = rate / (1 - rate)
        previous = change
        x = torch.where(active.view(-1, *[1] * (x.ndim - 1)), new, x)
        error = torch.where(active, factor * change, error)
        floor = 2 * eps * factor.clamp(min=1) * (size_of(x) + size_of(y))
        done = error <= torch.maximum(floor, torch.as_tensor(tolerance, dtype=y.dtype, device=y.device))
        left = torch.where(active, torch.where(done, 0.0, error), left)
        active = active & ~done & error.isfinite()
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
    start = solution.detach().requires_grad_()
    value = function(start)
    x = y - value  # requires gradients if only for the sake of the new start

    def implicit(grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{who}: the inverse has no second derivatives (create_graph=True).")

        def adjoint(g: Tensor) -> Tensor:
            return torch.autograd.grad(value, start, g, retain_graph=True, materialize_grads=True)[0]

        if not value.requires_grad:
            return grad
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
