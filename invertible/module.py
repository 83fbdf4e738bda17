"""The contract that every layer and every container of this library keeps."""

import abc
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ._buffers import buffers_stay
from ._check import is_value, name
from ._compiled import compile_function, with_defaults
from ._fused import FusedSum, fuse_sums
from ._running import METHODS, served
from ._value import Value, describe, leaves, zero_log_det
from .grid import Grid

__all__ = ["Exactness", "InvertibleModule", "Value"]

X = TypeVar("X", bound=Value)
Y = TypeVar("Y", bound=Value)


class Exactness(enum.IntEnum):
    """How close ``inverse(forward(x))`` comes to ``x``; containers take the weakest of their layers.

    Example:
        >>> net = Sequential(Split(), Coupling(nn.Tanh()), Merge())
        >>> PixelUnshuffle(2).exactness.name, net.exactness.name
        ('EXACT', 'ROUNDING')
        >>> net.grid = "exact"
        >>> net.exactness.name
        'EXACT'
    """

    EXACT = 0
    """Bit for bit: nothing is computed, or only what has no rounding, as on a :class:`Grid`."""
    ROUNDING = 1
    """Up to the rounding of floating-point arithmetic."""
    ITERATIVE = 2
    """Up to the tolerance of an iterative solver."""


class InvertibleModule(nn.Module, abc.ABC, Generic[X, Y]):
    r"""A layer that can be run backwards.

    .. math::
        y = \mathrm{forward}(x) \qquad\Longleftrightarrow\qquad x = \mathrm{inverse}(y)

    One value goes in and one value comes out: a tensor, or a (possibly nested) tuple of tensors, batch first and
    channels second. Neither direction writes to what it was given; outputs may share storage with inputs where a
    layer only moves elements.

    A layer of your own defines :meth:`forward` and :meth:`inverse`, and :meth:`forward_and_log_det` if it is to
    serve a density. All other methods follow from these. :func:`invertible.testing.check` tries the laws on it.

    ``inverse`` in training mode uses batch statistics like ``forward``, but moves no buffer; the direction that is
    trained moves them, which is ``forward``, or ``Inverse(net)(x)``.

    Example:
        >>> class Double(InvertibleModule[Tensor, Tensor]):
        ...     def forward(self, x, *, condition=None):
        ...         return 2 * x
        ...
        ...     def inverse(self, y, *, condition=None):
        ...         return y / 2
        >>> Double().inverse(Double()(torch.ones(1, 3)))
        tensor([[1., 1., 1.]])
    """

    _grid: Grid | None = None
    _own_grid: Grid | None = None  # that of a Sequential, if it is not the one around it that decides

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for method in METHODS:  # through the MRO: a mixin that is no InvertibleModule may define it
            function = getattr(cls, method)
            if served(function) is not function:
                setattr(cls, method, served(function))

    @property
    def bijective(self) -> bool:
        """Whether the map is onto. ``False``: it is injective, and ``inverse`` is a left inverse."""
        return True

    @property
    def isometric(self) -> bool:
        """Whether the map only moves elements: a permutation, a reshape or zero padding. It keeps distances."""
        return False

    @property
    def exactness(self) -> Exactness:
        """How close the round trip comes to its input, which must be on the layer's grid if there is one."""
        return Exactness.EXACT if self.isometric or self.grid is not None else Exactness.ROUNDING

    @property
    def grid(self) -> Grid | None:
        """The grid on which the layer's values are: that of the :class:`Sequential` around it."""
        return self._grid

    @property
    def keeps_grid(self) -> bool:
        """Whether the layer, in both directions, maps values on ``self.grid`` to such, exactly.

        What only moves elements does. A layer that computes uses :meth:`Grid.add` and :meth:`Grid.subtract`, and says
        so here.
        """
        return self.isometric

    @property
    def stochastic(self) -> bool:
        """Whether two calls with the same input may differ, as with dropout in training mode."""
        return False

    @property
    def _is_tall(self) -> bool:
        """Whether the log-determinant is that of a Jacobian with more rows than columns: it adds up before isometries.

        A layer that is stochastic and has a left inverse returns minus the log-density of its noise instead, which
        adds up with that of any layer.
        """
        if self.bijective:
            return False
        causes = [layer for _, layer in self._on_grid() if not layer.bijective]
        return any(layer._is_tall for layer in causes) if causes else not self.stochastic

    @abc.abstractmethod
    def forward(self, x: X, *, condition: Value | None = None) -> Y:
        """Maps ``x`` to ``y``. A layer without use for a ``condition`` ignores it."""

    @abc.abstractmethod
    def inverse(self, y: Y, *, condition: Value | None = None) -> X:
        """Maps ``y`` back to ``x``: the inverse, or a left inverse where the layer is not bijective."""

    @served
    def forward_and_log_det(self, x: X, *, condition: Value | None = None) -> tuple[Y, Tensor]:
        r"""Maps ``x`` to ``y`` and returns :math:`\log|\det J|`, of shape ``(batch,)``.

        For an injective layer it is :math:`\tfrac12\log\det J^\top J`. The default serves isometric layers, where
        it is zero.

        Raises:
            NotImplementedError: if the layer is not isometric and does not define this method.
        """
        if not self.isometric:
            message = f"{name(self)}: has no log-determinant. Define forward_and_log_det in {type(self).__name__}."
            raise NotImplementedError(message)
        is_value(self, x)
        y = cast("Y", self(x, condition=condition))
        return y, zero_log_det(x)

    @served
    def inverse_and_log_det(self, y: Y, *, condition: Value | None = None) -> tuple[X, Tensor]:
        r"""Maps ``y`` to ``x`` and returns :math:`\log|\det J^{-1}|`, of shape ``(batch,)``.

        The default evaluates the layer in both directions and returns the negative of the forward one.
        """
        is_value(self, y)
        x = self.inverse(y, condition=condition)
        if self.isometric:
            return x, zero_log_det(x)
        with buffers_stay(self):
            _, log_det = self.forward_and_log_det(x, condition=condition)
        return x, -log_det

    def fused_rule(
        self, method: str, y: Any, grad: Any, grad_log_det: Tensor | None, *, condition: Value | None
    ) -> tuple[Any, Sequence[Tensor], Sequence[Tensor | None]]:
        """For memory-free training: gives input and gradients from one evaluation of what is costly.

        Without it, :class:`~invertible.Reconstruct` runs ``inverse`` and then the method again. It is called with
        gradients enabled and everything else as it was in the first run, random numbers too. A class that overrides
        one of the four methods must override this one again, or its own is not used.

        Args:
            method: ``"forward"``, ``"inverse"``, ``"forward_and_log_det"`` or ``"inverse_and_log_det"``.
            y: what the method returned, detached.
            grad: the gradients of ``y``; ``None`` in place of those that are zero.
            grad_log_det: that of the log-determinant; ``None`` if it is zero.
            condition: the condition, detached, and requiring gradients.

        Returns:
            The method's input, detached, and requiring gradients; tensors whose graphs lead to it, the condition and
            the parameters (the input may be among them); and for each of them the cotangent, such that their
            vector-Jacobian product is the gradient.
        """
        raise NotImplementedError

    def compile_functions(self, **options: Any) -> None:
        """Compiles the functions of all couplings inside, each by itself, in place.

        A function runs by the same graph in forward, in the replay for the gradients and in the inverse, so that they
        agree to the last bit: one graph for each kind of function, shape, mode, kind of autocast and set of trained
        parameters, and another one under ``inference_mode``. Functions are of one kind if they are built alike: of the
        same ``repr`` and shapes. (Torch keeps 8 graphs per kind, and then runs the rest uncompiled.) Compiling a
        network as a whole, ``torch.compile(net)``, is for networks that store their activations, and for inference.
        On a grid, what needs no gradient is rounded, added and checked in one compiled pass over memory.

        Layers of your own are left alone. Copies made by ``copy.deepcopy`` or pickling are not compiled.

        Args:
            **options: those of ``torch.compile``. ``dynamic`` is ``False`` unless given: a graph for any size may
                replace that of one size between forward and backward, and round differently.

        Raises:
            ValueError: if the options ask for CUDA graphs, which reuse the memory of an output at the next call.

        Example:
            >>> net = Sequential(Split(), *(Coupling(nn.Tanh()) for _ in range(3)), Merge(), backprop=Reconstruct())
            >>> net.compile_functions(backend="aot_eager")
            >>> net(torch.rand(2, 4, requires_grad=True)).sum().backward()
        """
        kinds: dict[Any, Callable[..., Any]] = {}
        options = with_defaults(options)
        fused = FusedSum(options)
        for part in self.modules():
            if isinstance(part, InvertibleModule):
                for function in part._functions():
                    compile_function(function, kinds, **options)
                    fuse_sums(function, fused)

    def _on_grid(self) -> Iterator[tuple[str, "InvertibleModule[Any, Any]"]]:
        """The layers inside that work on the values of this one, and so on its grid, with their keys."""
        for key, part in self.named_children():
            if isinstance(part, InvertibleModule):
                yield key, cast("InvertibleModule[Any, Any]", part)

    def _functions(self) -> Sequence[nn.Module]:
        """What a layer evaluates by :func:`._compiled.evaluate`, in both directions."""
        return ()

    def _keeps_input(self, method: str) -> bool:
        """Whether ``Reconstruct`` keeps what enters a method: from the output it does not come back, or not well."""
        own = not self.bijective or self.exactness is Exactness.ITERATIVE
        return own or any(  # a coupling's S, for one
            cast("InvertibleModule[Any, Any]", part)._keeps_input(each)
            for part in self.children()
            if isinstance(part, InvertibleModule)
            for each in METHODS
        )

    def off_range(self, y: Y, *, condition: Value | None = None) -> Tensor:
        r"""Returns :math:`\lVert y - \mathrm{forward}(\mathrm{inverse}(y))\rVert` per sample, of shape ``(batch,)``.

        It is zero, up to rounding, where ``y`` is an output of the layer: everywhere for a bijective layer, and on
        the layer's range for an injective one.
        """
        is_value(self, y)
        with buffers_stay(self):
            projected = cast("Y", self(self.inverse(y, condition=condition), condition=condition))
        parts = [_difference(a, b).flatten(1) for a, b in zip(leaves(y), leaves(projected), strict=True)]
        return torch.linalg.vector_norm(torch.cat(parts, dim=1), dim=1)  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]


def _difference(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() or a.is_complex():
        return a - b
    return a.to(torch.get_default_dtype()) - b.to(torch.get_default_dtype())


def check_layer(container: str, layer: object) -> None:
    """Refuses to put into a container what has no inverse."""
    if not isinstance(layer, InvertibleModule):
        fix = " A function without an inverse goes into a Coupling." if isinstance(layer, nn.Module) else ""
        raise TypeError(f"{container}: expected an InvertibleModule, got {describe(layer)}.{fix}")
