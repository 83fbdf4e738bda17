"""Hypothesis strategies for inputs of invertible layers.

Values come from a drawn seed, not element by element: it is shapes, sizes and layouts that find bugs here, and a
seed shrinks well. This module alone needs Hypothesis; nothing imports it.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["pairs", "tensors"]


def tensors(
    *,
    channels: st.SearchStrategy[int] | None = None,
    dims: st.SearchStrategy[int] | None = None,
    multiple_of: int = 1,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[Tensor]:
    """Draws normal noise of shape ``(batch, channels, *size)``.

    Args:
        channels: by default 1 to 6.
        dims: the number of spatial dimensions, by default 1 to 3.
        multiple_of: what every spatial size is a multiple of.
        dtype: of the tensor.

    Example:
        >>> from hypothesis import given
        >>> @given(tensors(channels=st.just(3), dims=st.just(2)))
        ... def test(x):
        ...     assert x.shape[1] == 3
        >>> test()
    """

    @st.composite
    def draw_tensor(draw: st.DrawFn) -> Tensor:
        batch = draw(st.integers(1, 3), label="batch")
        width = draw(channels if channels is not None else st.integers(1, 6), label="channels")
        count = draw(dims if dims is not None else st.integers(1, 3), label="dims")
        largest = {0: 1, 1: 4, 2: 3, 3: 2}[count]
        size = [multiple_of * draw(st.integers(1, largest), label="size") for _ in range(count)]
        seed = draw(st.integers(0, 2**31 - 1), label="seed")
        noise = torch.randn(batch, width, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return noise.to(dtype)

    return draw_tensor()


def pairs(
    *,
    channels: st.SearchStrategy[int] | None = None,
    dims: st.SearchStrategy[int] | None = None,
    multiple_of: int = 1,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Draws two tensors of one shape; the arguments are those of :func:`tensors`.

    Example:
        >>> from hypothesis import given
        >>> @given(pairs(channels=st.just(3)))
        ... def test(x):
        ...     x1, x2 = x
        ...     assert x1.shape == x2.shape and x1.shape[1] == 3
        >>> test()
    """

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.flip(0).sin() + 0.5 * x

    return tensors(channels=channels, dims=dims, multiple_of=multiple_of, dtype=dtype).map(pair)
