"""From data to data and noise: more channels for what follows."""

import math
from typing import Any, cast

import torch
from torch import Tensor

from . import _check
from ._base import unvalidated
from ._range import is_unread, note
from ._value import Value, is_channels_last
from .module import Exactness, InvertibleModule, zero_log_det

__all__ = ["Augment"]


class Augment(InvertibleModule[Tensor, Tensor]):
    r"""Adds channels of noise, which the inverse drops: a stochastic map.

    .. math::
        x \mapsto y = (x \mathbin\Vert e), \qquad e \sim q, \qquad
        \text{log-determinant: } -\log q(e)

    More channels let the layers after it do more, as zero padding does; but noise fills the whole space, so that a
    density on it gives one of the data: :math:`\log p(x) \ge \mathrm{E}_q [\log p(y) - \log q(e)]`. The
    log-determinant of ``forward`` is the second term, per sample, and that of ``inverse`` is :math:`\log q` of the
    channels it drops. They are no Jacobian's, and add up in a :class:`Sequential` whatever follows.

    In ``eval``, too, noise is drawn, from torch's global generator, and it is the same in the replay of every strategy
    of backpropagation. Of the laws of the contract, those that compare two outputs of one input are not claimed, as
    the noise is another one each time: ``projects_if_injective``, ``treats_samples_alone`` and
    ``log_det_matches_autograd``. ``inverse(forward(x))`` is ``x``, bit for bit, so the layer is exact;
    ``forward(inverse(y))`` holds other noise than ``y``, so it is not bijective; any ``y`` could have been drawn, so
    ``off_range`` is 0.

    Cost: a draw for each element of the new channels; with the log-determinant their density, too.

    Source: augmented normalizing flows (Huang et al., 2020), https://arxiv.org/abs/2002.07101; VFlow (Chen et al.,
    2020), https://arxiv.org/abs/2002.09741; in the vocabulary of SurVAE Flows (Nielsen et al., 2020),
    https://arxiv.org/abs/2007.02731, it is the stochastic right inverse of slicing, a generative surjection. Their
    :math:`q` may depend on :math:`x`; here it does not.

    Args:
        channels: of noise.
        distribution: what the noise is drawn from, element by element: an object with ``sample(shape)`` and
            ``log_prob(noise)``, both of that shape, such as ``torch.distributions.Laplace(0.0, 1.0)``. ``None`` for
            the standard normal one. It is not trained. Those of torch compute in the dtype of their parameters, and
            must be built with ``validate_args=False`` to be compiled.

    Shape:
        - Input: ``(batch, data_channels, ...)``
        - Output: ``(batch, data_channels + channels, ...)``

    Raises:
        TypeError: if ``channels`` is not an integer, the distribution lacks a method or is a class, or the input is
            not a floating-point tensor.
        ValueError: if ``channels`` is below 1, the distribution returns another shape, or what is to be inverted has
            no more channels than the noise.

    Example:
        >>> layer = Augment(2)
        >>> x = torch.ones(1, 3)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> y.shape, torch.equal(layer.inverse(y), x)
        (torch.Size([1, 5]), True)
    """

    stochastic = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride] (always; for _random)

    def __init__(self, channels: int, *, distribution: Any = None) -> None:
        super().__init__()
        self.channels = _check.integer("Augment", "channels", channels)
        self.distribution = distribution
        if self.channels < 1:
            raise ValueError(f"{_check.name(self)}: channels must be at least 1, got {channels}.")
        methods = all(hasattr(distribution, name) for name in ("sample", "log_prob"))
        if distribution is not None and (not methods or isinstance(distribution, type)):
            fix = " Make one: distribution=Normal(0.0, 1.0)." if methods else ""
            raise TypeError(f"Augment: distribution must have methods sample and log_prob, got {distribution!r}.{fix}")

    @property
    def bijective(self) -> bool:
        return False

    @property
    def exactness(self) -> Exactness:
        return Exactness.EXACT

    @property
    def keeps_grid(self) -> bool:
        return True

    def forward(self, x: Tensor, *, condition: Value | None = None) -> Tensor:
        x = self._checked(x)
        return _joined(x, self._noise(x))

    def inverse(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        return self._parts(y)[0]

    def forward_and_log_det(self, x: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        y = self(x)
        return y, -self._log_density(self._parts(y)[1])

    def inverse_and_log_det(self, y: Tensor, *, condition: Value | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), self._log_density(self._parts(y)[1])

    def off_range(self, y: Tensor, *, condition: Value | None = None) -> Tensor:
        """Returns 0 per sample: whatever the noise, it could have been drawn."""
        self._parts(y)
        return zero_log_det(y)

    def _checked(self, x: Tensor) -> Tensor:
        x = _check.is_tensor(self, x)
        _check.is_floating(self, x)
        if self.grid is not None:
            _check.is_on_grid(self, self.grid.dtype, x)
        return x

    def _parts(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise."""
        data = self._checked(y).shape[1] - self.channels
        if data < 1:
            raise _check.value_error(self, f"expected more than {self.channels} channels", y)
        return y.narrow(1, 0, data), y.narrow(1, data, self.channels)

    def _noise(self, x: Tensor) -> Tensor:
        shape = torch.Size((x.shape[0], self.channels, *x.shape[2:]))
        if self.distribution is None:
            noise = torch.randn(shape, dtype=x.dtype, device=x.device)
        else:
            with torch.no_grad():
                noise = cast("Tensor", self.distribution.sample(shape))
            if noise.shape != shape:
                raise _check.value_error(self, f"the distribution must return a tensor of shape {tuple(shape)}", noise)
            noise = noise.to(x)
        if self.grid is not None:
            noise = self.grid.round(noise)
            note((noise,))
        return noise

    def _log_density(self, noise: Tensor) -> Tensor:
        wide = noise.to(torch.promote_types(noise.dtype, torch.float32))
        if self.distribution is None:
            density = -0.5 * (wide.square() + math.log(2 * math.pi))
        else:
            distribution = unvalidated(self.distribution) if is_unread() else self.distribution
            density = cast("Tensor", distribution.log_prob(wide))
            if density.shape != noise.shape:
                rule = f"the distribution's log_prob must be a tensor of shape {tuple(noise.shape)}"
                raise _check.value_error(self, rule, density)
        return density.flatten(1).sum(1).to(noise.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}" + ("" if self.distribution is None else f", distribution={self.distribution}")


def _joined(x: Tensor, noise: Tensor) -> Tensor:
    if is_channels_last(x):  # joined in its own layout, so that it keeps it
        return torch.cat((x.movedim(1, -1), noise.movedim(1, -1)), -1).movedim(-1, 1)
    return torch.cat((x, noise), 1)
