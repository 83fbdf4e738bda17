"""Functions of couplings that see a condition."""

from typing import cast

import torch
from torch import Tensor, nn

from . import _check
from ._tracing import transformed
from ._value import Value, describe, is_channels_last, laid_out, map_value

__all__ = ["Conditional"]


class Conditional(nn.Module):
    r"""Lets the function of a coupling see a condition: :math:`(x, c) \mapsto F(x \mathbin\Vert e(c))`.

    The condition, as it is or as the encoder e makes it, is joined to the stream's channels, and the function reads
    both: its input has the channels of the stream plus those of the condition. A condition of shape
    ``(batch, channels)`` is the same at every pixel; one with space must have the stream's, so that an encoder serves
    conditions of any other shape: labels, a smaller image, a tuple of several things.

    It is no layer: it goes into a :class:`Coupling`, ``Coupling(Conditional(F))``, and the condition comes by
    ``net(x, condition=c)`` through all containers. Its gradient and that of the encoder are those of any input and
    parameter, under every strategy. What is joined has the stream's dtype; floating-point conditions reach the encoder
    in the dtype of its parameters.

    The encoder runs whenever the function does, once per coupling and direction. One that is costly and serves many
    couplings is better run once before the network, which then gets what it made.

    Source: joined on channels as in FrEIA and in conditional invertible networks (Ardizzone et al., 2019),
    https://arxiv.org/abs/1907.02392, where the shapes must agree.

    Args:
        function: maps the stream and the condition, joined, to what the coupling needs.
        encoder: maps the condition to a tensor ``(batch, channels)`` or one with the stream's space; ``None`` where
            it has such a shape already.

    Shape:
        - Input: the stream ``(batch, channels, ...)``, and a condition
        - Output: that of the function

    Raises:
        TypeError: if ``function`` or ``encoder`` is not a module, the condition is not made of tensors, or, encoded, is
            not a tensor or complex.
        ValueError: if it has another batch than the stream or neither no space nor the stream's, or is on another
            device; the function has not run then.

    Example:
        >>> from invertible import Coupling
        >>> coupling = Coupling(Conditional(nn.Linear(2 + 3, 2), encoder=nn.Embedding(10, 3)))
        >>> x = torch.ones(4, 2), torch.zeros(4, 2)
        >>> label = torch.tensor([1, 7, 0, 7])
        >>> y = coupling(x, condition=label)
        >>> torch.allclose(coupling.inverse(y, condition=label)[0], x[0])
        True
    """

    def __init__(self, function: nn.Module, *, encoder: nn.Module | None = None) -> None:
        super().__init__()
        for option, module in (("function", function), ("encoder", encoder)):
            if not isinstance(module, nn.Module) and (module is not None or option == "function"):
                raise TypeError(f"Conditional: {option} must be of type Module, got {describe(module)}.")
        self.function = function
        self.encoder = encoder

    def forward(self, x: Tensor, condition: Value) -> Tensor:
        """Returns ``function`` of the stream and the condition, joined."""
        encoded, space = self._encode(condition), x.shape[2:]
        if encoded.is_complex() and not x.is_complex():
            raise TypeError(f"{_check.name(self)}: {self._what()} must not be complex, got dtype {encoded.dtype}.")
        if encoded.device != x.device:
            rule = f"{self._what()} must be on the device of the stream, {x.device}"
            raise ValueError(f"{_check.name(self)}: {rule}, got {encoded.device}.")
        if encoded.ndim < 2 or encoded.shape[0] != x.shape[0] or encoded.shape[2:] not in (torch.Size(), space):
            raise self._fault(x, encoded)
        encoded = encoded.to(x.dtype)
        if encoded.ndim < x.ndim:
            encoded = encoded.reshape(*encoded.shape, *(1 for _ in space)).expand(-1, -1, *space)
        if not transformed():  # or the joined tensor would not have the layout of the stream
            encoded = laid_out(encoded, dtype=x.dtype, channels_last=is_channels_last(x))
        return self.function(torch.cat((x, encoded), dim=1))

    def _fault(self, x: Tensor, encoded: Tensor) -> ValueError:
        """The error for a condition that can't be joined to a stream."""
        whole = ", ".join(map(str, (x.shape[0], "channels", *x.shape[2:])))
        shapes = f"({x.shape[0]}, channels)" + (f" or ({whole})" if x.ndim > 2 else "")
        rule = f"{self._what()} must have the shape {shapes} for a stream of shape {tuple(x.shape)}"
        fix = " An encoder may change its shape: Conditional(function, encoder=...)."
        return _check.value_error(self, rule, encoded, fix if self.encoder is None else "")

    def _what(self) -> str:
        return "the condition" if self.encoder is None else "the encoded condition"

    def _encode(self, condition: Value) -> Tensor:
        """The condition as a tensor."""
        encoded: object = condition
        if self.encoder is not None:
            self._refuse_other_kinds(condition)
            dtype = next((p.dtype for p in self.encoder.parameters() if p.is_floating_point()), None)

            def cast_to_parameters(t: Tensor) -> Tensor:
                return t.to(dtype) if dtype is not None and t.is_floating_point() else t

            encoded = self.encoder(map_value(cast_to_parameters, condition))
        if not isinstance(encoded, Tensor):
            many = isinstance(condition, tuple) and self.encoder is None
            fix = " An encoder may take several: Conditional(function, encoder=...)." if many else ""
            raise _check.type_error(self, f"{self._what()} must be a tensor", encoded, fix)
        return encoded

    def _refuse_other_kinds(self, condition: object) -> None:
        """Refuses what is neither a tensor nor a tuple of such: a list, a dictionary, a number."""
        if isinstance(condition, tuple):
            for part in cast("tuple[object, ...]", condition):
                self._refuse_other_kinds(part)
        elif not isinstance(condition, Tensor):
            rule = "the condition must be a tensor, or a tuple of tensors"
            raise _check.type_error(self, rule, condition)
