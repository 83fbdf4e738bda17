"""The grid's sum as a kernel of our own, in Triton: widen, round, add and find the range in one pass over memory.

A contender, not a part of the library: whether it is faster than what the compiler makes (``invertible._fused``) is not
known without a GPU, and ``python -m benchmarks.gpu --only grid`` says so where there is one. The eager twin is
:meth:`invertible.Grid.add`; the bits are the same, whatever the values. ``TRITON_INTERPRET=1``, set before this is
imported, runs the kernels on the CPU. Where there is no Triton, or it can't serve, the eager twin does.

    put(net)  # all sums of a network's couplings
"""

# pyright: basic, reportMissingImports=false

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from invertible import Coupling, Grid
from invertible._fused import FusedSum, fuse_sums
from invertible._range import note_range
from invertible._tracing import transformed
from invertible._value import is_channels_last, laid_out

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch on Linux alone
    triton = None

__all__ = ["TritonSum", "gradient", "put", "ready_for", "total"]

BLOCK = 1024
"""Elements of a program. Not tuned: there was no GPU to tune it on."""

if triton is not None:

    @triton.jit
    def _add(
        x, shift, y, least, greatest, blocks, n, x_stride, shift_stride,
        scale: tl.constexpr, step: tl.constexpr, integers: tl.constexpr, wide: tl.constexpr, bits: tl.constexpr,
        block: tl.constexpr,
    ):  # fmt: skip
        """``y = x + step * round(scale * shift)``; of each block, the least and the greatest element."""
        program = tl.program_id(0).to(tl.int64)
        sample = program // blocks
        at = (program % blocks) * block + tl.arange(0, block)
        inside = at < n
        steps = tl.load(shift + sample * shift_stride + at, inside, other=0).to(wide) * scale
        # To the nearest integer, ties to even, by the addition's own rounding: from integers = 2^(p - 1) on, all
        # numbers of p significant bits are integers. No libdevice, which the interpreter does not have.
        size = tl.abs(steps)
        nearest = tl.where(size < integers, (size + integers) - integers, size)
        nearest = tl.where(steps.to(bits, bitcast=True) < 0, nearest * -1.0, nearest)  # "-" has no minus zero in 3.6
        own = tl.load(x + sample * x_stride + at, inside, other=0)
        result = own + nearest.to(own.dtype) * step  # the product is exact, so that to fuse it changes nothing
        tl.store(y + sample * n + at, result, inside)
        # The reductions pass over what is no number: it is said apart.
        wrong = tl.max((inside & (result != result)).to(tl.int32), 0) != 0
        low = tl.min(tl.where(inside, result, float("inf")), 0)
        high = tl.max(tl.where(inside, result, float("-inf")), 0)
        tl.store(least + program, tl.where(wrong, float("nan"), low))
        tl.store(greatest + program, tl.where(wrong, float("nan"), high))

    @triton.jit
    def _turn(grad, out, n, sign: tl.constexpr, kind: tl.constexpr, block: tl.constexpr):
        """``out = sign * grad`` in the dtype of ``out``; to 16 bits by way of float32, as torch goes."""
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < n
        value = tl.load(grad + at, inside, other=0) * sign
        if kind == "bfloat16":  # to the nearest by hand, as the interpreter of Triton 3.8 cuts the digits off
            bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
            upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            upper = tl.where(value != value, 0x7FC0, upper)
            tl.store(out + at, upper.to(tl.uint16), inside)
        elif kind == "float16":
            tl.store(out + at, value.to(tl.float32).to(tl.float16), inside)
        else:
            tl.store(out + at, value.to(out.dtype.element_ty), inside)


def _interpreted() -> bool:
    return triton is not None and not isinstance(_add, triton.JITFunction)


def ready_for(*tensors: Tensor) -> bool:
    """Whether there is a Triton for these tensors' devices."""
    return triton is not None and all(t.is_cuda or (_interpreted() and t.device.type == "cpu") for t in tensors)


def _strides(t: Tensor) -> tuple[int, ...]:
    """Those that matter, of a sample."""
    return tuple(stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True) if size > 1)


def _dense(t: Tensor) -> bool:
    """Whether the elements of each sample lie without gaps, in any order of the dimensions."""
    step = 1
    for stride, size in sorted((r, n) for n, r in zip(t.shape[1:], t.stride()[1:], strict=True) if n > 1):
        if stride != step:
            return False
        step *= size
    return True


def serves(x: Tensor, shift: Tensor) -> bool:
    """Whether the kernel takes these: of one shape, samples without gaps, and both laid out alike.

    Halves of an image are; halves of one in ``channels_last`` are not.
    """
    alike = x.ndim > 0 and x.shape == shift.shape and _strides(x) == _strides(shift)
    return alike and x.numel() > 0 and _dense(x) and ready_for(x, shift) and not transformed()


def total(grid: Grid, x: Tensor, shift: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``x`` plus ``sign`` times the rounded ``shift``, and the least and the greatest element.

    For tensors that :func:`serves` accepts; the range is of all blocks' own, a second pass over a thousandth.
    """
    samples, n = len(x), math.prod(x.shape[1:])
    y = torch.empty_strided(x.shape, (n, *x.stride()[1:]), dtype=x.dtype, device=x.device)
    strides = x.stride(0), shift.stride(0)
    if samples == 1 or strides == (n, n):
        samples, n = 1, x.numel()
    blocks = math.ceil(n / BLOCK)
    least, greatest = x.new_empty(2, samples * blocks)
    double = torch.float64 in (x.dtype, shift.dtype)  # to narrow a shift first would round twice
    cast("Any", _add)[(samples * blocks,)](
        x, shift, y, least, greatest, blocks, n, *strides,
        scale=2.0**grid.bits, step=sign * 2.0**-grid.bits, integers=2.0 ** (52 if double else 23),
        wide=tl.float64 if double else tl.float32, bits=tl.int64 if double else tl.int32, block=BLOCK,
    )  # fmt: skip
    return y, least.amin(), greatest.amax()  # these don't pass over what is no number


def gradient(grad: Tensor, like: Tensor, sign: int) -> Tensor:
    """Returns ``sign`` times the gradient, in the dtype and the layout of the shift that it is of."""
    if grad.dtype == like.dtype and sign == 1 and grad.stride() == like.stride():
        return grad
    out = torch.empty_like(like, device=grad.device)
    if not (ready_for(grad) and grad.numel() and grad.stride() == out.stride() and _whole(grad)):
        return laid_out(sign * grad, dtype=like.dtype, channels_last=is_channels_last(like))
    blocks = math.ceil(grad.numel() / BLOCK)
    kind = str(like.dtype).removeprefix("torch.")
    target = out.view(torch.uint16) if kind == "bfloat16" else out
    cast("Any", _turn)[(blocks,)](grad, target, grad.numel(), sign=sign, kind=kind, block=BLOCK)
    return out


def _whole(t: Tensor) -> bool:
    return _dense(t) and (len(t) == 1 or t.stride(0) == math.prod(t.shape[1:]))


class _Sum(torch.autograd.Function):
    """The sum where gradients go through it: straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, grid: Grid, x: Tensor, shift: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
        y, least, greatest = total(grid, x, shift, sign)
        ctx.mark_non_differentiable(least, greatest)
        ctx.sign, ctx.like = sign, torch.empty_like(shift, device="meta")  # no memory, but dtype and layout
        return y, least, greatest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        return None, grad, gradient(grad, ctx.like, ctx.sign) if ctx.needs_input_grad[2] else None, None


class TritonSum(FusedSum):
    """Takes the place of the compiler's sums, and of the eager ones where gradients are taken."""

    def __init__(self) -> None:
        super().__init__({})

    def serves(self, x: Tensor, shift: Tensor) -> bool:
        """Whether the kernel takes these tensors."""
        return serves(x, shift)

    def __call__(self, grid: Grid, x: Tensor, shift: Tensor, sign: int) -> Tensor:
        """Returns ``x`` plus ``sign`` times the rounded ``shift``."""
        y, least, greatest = cast("Any", _Sum).apply(grid, x, shift, sign)
        note_range(least, greatest)
        return y


def put(net: nn.Module) -> None:
    """Lets all couplings of a network sum by the kernel, where it serves."""
    kernel = TritonSum()
    for part in net.modules():
        if isinstance(part, Coupling):
            fuse_sums(part.function, kernel)
