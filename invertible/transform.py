"""What a coupling does to a stream: the base of all transforms, and the sum."""

import abc
from dataclasses import dataclass

from torch import Tensor, nn

from . import _check
from ._fused import FusedSum
from ._value import zero_log_det
from .grid import Grid

__all__ = ["Additive", "CouplingTransform", "TransformOnGrid"]


class CouplingTransform(nn.Module, abc.ABC):
    r"""What a coupling does to one stream: a bijection, element by element, with parameters that a function produces.

    The parameters are channels of the function's output, parameter-major: for two parameters, a scale and a shift,
    the first half of the channels holds the scales and the second the shifts. They may come in a lower precision than
    the stream, as under autocast.

    Shape:
        - Input: the stream ``(batch, channels, ...)``, and the parameters, with ``parameters_per_element`` times the
          channels
        - Output: as the stream; log-determinants ``(batch,)``

    Example:
        >>> class Negative(CouplingTransform):
        ...     parameters_per_element = 1
        ...     def forward(self, x, parameters): return parameters - x
        ...     def inverse(self, y, parameters): return parameters - y
        ...     def forward_and_log_det(self, x, parameters): return self(x, parameters), x.new_zeros(len(x))
        ...     inverse_and_log_det = forward_and_log_det  # its own inverse
        >>> Coupling(nn.Identity(), Negative())((torch.ones(1, 1), torch.full((1, 1), 5.)))
        (tensor([[5.]]), tensor([[4.]]))
    """

    parameters_per_element: int
    """How many parameters an element takes: the function has this many times the stream's channels."""

    @property
    def keeps_grid(self) -> bool:
        """Whether there is exact arithmetic for it on a :class:`Grid`.

        There is for :class:`Additive` and :class:`VolumePreserving`, but not for what overrides their ``forward`` or
        ``inverse``.
        """
        return False

    def check(self, x: Tensor) -> None:
        """Refuses a stream that it can't transform; called before the function is evaluated."""

    @abc.abstractmethod
    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Transforms ``x``."""

    @abc.abstractmethod
    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        """Undoes :meth:`forward` with the same parameters."""

    @abc.abstractmethod
    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Transforms ``x`` and returns the log-determinant per sample."""

    @abc.abstractmethod
    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes :meth:`forward` and returns the log-determinant of the inverse per sample."""

    def _on_grid(self, grid: Grid, fused: FusedSum | None) -> "TransformOnGrid":
        """Its exact arithmetic on a grid; sums may be ``fused`` where that serves."""
        raise TypeError(f"{_check.name(self)}: there is no exact arithmetic for this transform on a grid.")


class TransformOnGrid(abc.ABC):
    """What a transform does on a grid, without rounding. It keeps the volume: nothing else comes back exactly."""

    @abc.abstractmethod
    def __call__(self, x: Tensor, parameters: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor: ...

    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, parameters), zero_log_det(x)

    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y, parameters), zero_log_det(y)


class Additive(CouplingTransform):
    r"""Adds the function's output: :math:`(x; t) \mapsto x + t`, with log-determinant 0.

    Cost: an addition per element.

    Source: NICE (Dinh et al., 2014), https://arxiv.org/abs/1410.8516

    Example:
        >>> Additive()(torch.ones(1, 1), torch.tensor([[2.]]))
        tensor([[3.]])
    """

    parameters_per_element = 1

    @property
    def keeps_grid(self) -> bool:
        return type(self).forward is Additive.forward and type(self).inverse is Additive.inverse

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        return x + parameters

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        return y - parameters

    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, parameters), zero_log_det(x)

    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y, parameters), zero_log_det(y)

    def _on_grid(self, grid: Grid, fused: FusedSum | None) -> TransformOnGrid:
        return _AdditiveOnGrid(grid, fused)


@dataclass  # without slots and not frozen, or the compiler of torch 2.11 could not make one
class _AdditiveOnGrid(TransformOnGrid):
    grid: Grid
    fused: FusedSum | None = None

    def __call__(self, x: Tensor, parameters: Tensor) -> Tensor:
        if self.fused is not None and self.fused.serves(x, parameters):
            return self.fused(self.grid, x, parameters, 1)
        return self.grid.add(x, parameters)

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        if self.fused is not None and self.fused.serves(y, parameters):
            return self.fused(self.grid, y, parameters, -1)
        return self.grid.subtract(y, parameters)
