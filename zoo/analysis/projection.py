"""The nearest values of which a head sees what it should."""

import torch
from torch import Tensor

__all__ = ["nearest_sums", "rectified_projection"]


def rectified_projection(z: Tensor, total: Tensor) -> Tensor:
    r"""The nearest values to these whose rectified ones have a given sum.

    .. math::
        \arg\min_{y} \lVert y - z \rVert \quad\text{with}\quad \sum_i \max(y_i, 0) = s

    In closed form, by whether the sum of z is too large, or too small:

    * too large: the set :math:`\sum_i \max(y_i, 0) \le s` is convex, and its nearest point is
      :math:`y_i = \max(z_i - \tau, 0)` where :math:`z_i > 0`, and :math:`z_i` elsewhere: the projection onto a simplex,
      by a threshold :math:`\tau \ge 0` that gives the sum.
    * too small: the k largest values rise by :math:`\delta_k = (s - S_k) / k`, with :math:`S_k` their sum; all others,
      which are not positive, stay. Of the k from the number of positive values on (1 at least) for which none of the
      values that rise ends below 0, the one of the least :math:`k \delta_k^2`. This set is not convex, but for each
      choice of those that end above 0 the k largest cost least, and to leave a positive value out costs more.

    Args:
        z: values, ``(..., n)``.
        total: the sums s, at least 0, ``(...)``.

    Shape:
        - Output: that of ``z``

    Raises:
        ValueError: if a sum is negative.

    Example:
        >>> z = torch.tensor([3.0, 1.0, -2.0])
        >>> rectified_projection(z, torch.tensor(2.0))
        tensor([ 2.,  0., -2.])
        >>> rectified_projection(z, torch.tensor(6.0))
        tensor([ 4.,  2., -2.])
    """
    if not bool((total >= 0).all()):
        raise ValueError("rectified_projection: a sum of rectified values is 0 at least.")
    missing = total - z.relu().sum(-1)
    order = z.sort(dim=-1, descending=True).values
    counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    shift = (total[..., None] - order.cumsum(-1)) / counts  # of the k largest, so that they sum up to the total
    lowered = _lowered(z, order, shift)
    raised = _raised(z, order, shift, counts)
    return torch.where((missing < 0)[..., None], lowered, torch.where((missing > 0)[..., None], raised, z))


def _lowered(z: Tensor, order: Tensor, shift: Tensor) -> Tensor:
    """By the threshold of the simplex: the largest k whose values all stay positive."""
    last = (order + shift > 0).sum(-1, keepdim=True).clamp(min=1) - 1
    return torch.where(z > 0, (z + shift.gather(-1, last)).relu(), z)


def _raised(z: Tensor, order: Tensor, shift: Tensor, counts: Tensor) -> Tensor:
    """By the cheapest number of values."""
    least = (z > 0).sum(-1, keepdim=True).clamp(min=1)
    fits = (counts >= least) & ((order + shift >= 0) | (counts == least))
    cost = torch.where(fits, counts * shift.square(), torch.inf)
    best = cost.argmin(-1, keepdim=True)
    ranks = z.argsort(dim=-1, descending=True).argsort(dim=-1)  # equal values share no rank
    return torch.where(ranks <= best, z + shift.gather(-1, best), z)


def nearest_sums(sums: Tensor, wanted: Tensor, matrix: Tensor, ease: Tensor, *, rounds: int = 100) -> Tensor:
    r"""The nearest sums to these that are not negative and have the same logits as others.

    .. math::
        \arg\min_{s \ge 0} \sum_c \frac{(s_c - \sigma_c)^2}{2 w_c} \quad\text{with}\quad W s = W \sigma'

    It is :math:`s_c = \max(\sigma_c + w_c (W^\top \lambda)_c, 0)`, whose :math:`\lambda` Newton's method finds: it is
    where the convex function :math:`\sum_c s_c^2 / (2 w_c) - \lambda^\top W \sigma'` is least.

    Args:
        sums: σ, not negative, ``(batch, channels)``.
        wanted: σ', with equal sums where w is 0, ``(batch, channels)``.
        matrix: W, ``(classes, channels)``.
        ease: w, how easily a sum is changed; where 0, it stays, ``(batch, channels)``.
        rounds: at most so many steps.

    Shape:
        - Output: that of ``sums``

    Example:
        >>> sums, wanted, ease = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]], dtype=torch.float64)
        >>> nearest_sums(sums, wanted, torch.ones(1, 2, dtype=torch.float64), ease)
        tensor([[1., 0.]], dtype=torch.float64)
    """
    target = wanted @ matrix.mT
    found = torch.zeros_like(target)

    def at(multipliers: Tensor) -> tuple[Tensor, Tensor]:
        s = (sums + ease * (multipliers @ matrix)).relu()
        free = torch.where(ease > 0, s.square() / (2 * ease), 0).sum(1)
        return s, free + (multipliers * (_fixed(sums, ease) @ matrix.mT - target)).sum(1)

    scale = float(target.abs().amax()) + float((sums @ matrix.mT).abs().amax())
    unit = torch.eye(len(matrix), dtype=sums.dtype, device=sums.device)
    for _ in range(rounds):
        s, value = at(found)
        slope = s @ matrix.mT - target
        if float(slope.abs().amax()) <= 1e-13 * scale:
            break
        curvature = torch.einsum("kc,bc,jc->bkj", matrix, ease * (s > 0), matrix)
        size = curvature.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + torch.finfo(s.dtype).tiny
        step = torch.linalg.solve(curvature + 1e-12 * size * unit, slope)
        length = torch.ones_like(value)
        for _ in range(30):  # halved where the function would not fall
            higher = at(found - length[:, None] * step)[1] > value + 1e-13 * value.abs()
            if not bool(higher.any()):
                break
            length = torch.where(higher, length / 2, length)
        found = found - length[:, None] * step
    return at(found)[0]


def _fixed(sums: Tensor, ease: Tensor) -> Tensor:
    return torch.where(ease > 0, 0, sums)
