"""SwiGLU, forward and backward, over gate and up side by side in one tensor.

    [ g | u ]  (M, 2 I)          a = silu(g) u                           (M, I)
    backward   dg = da u s (1 + g (1 - s))        du = da g s            s = 1 / (1 + exp(-g))

The backward makes a again, which the gradient of down_proj's B needs: so a is not kept. It reads
three tensors of width I and writes three; with autograd's pieces it would be eight and five.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels.launch import cdiv, empty, launch

TILE = 1024  # columns a program


@triton.jit
def _swiglu_kernel(both, a, width, both_stride, a_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    at = both + row * both_stride + column
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    value = g * (1.0 / (1.0 + tl.exp(-g))) * u  # as the backward makes it again, to the bit
    tl.store(a + row * a_stride + column, value.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    da, both, dboth, a, width, da_stride, both_stride, dboth_stride, a_stride, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    at = both + row * both_stride + column
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(da + row * da_stride + column, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    silu = g * s
    at = dboth + row * dboth_stride + column
    tl.store(at, (d * u * s * (1.0 + g * (1.0 - s))).to(a.dtype.element_ty), mask=inside)
    tl.store(at + width, (d * silu).to(a.dtype.element_ty), mask=inside)
    at = a + row * a_stride + column
    tl.store(at, (silu * u).to(a.dtype.element_ty), mask=inside)


def swiglu(both: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of both (M, 2 I): (M, I), into `out` if given; rows may lie further apart."""
    M, width = both.shape[0], both.shape[1] // 2
    a = empty((M, width), both.dtype, both.device) if out is None else out
    strides = both.stride(0), a.stride(0)
    launch(
        _swiglu_kernel,
        (M, cdiv(width, TILE)),
        *(both, a, width, *strides),
        TILE=TILE,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return a


def swiglu_backward(da: Tensor, both: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of both (M, 2 I), and a (M, I) again.

    out: where the gradient goes, (M, 2 I); it may be `both` itself.
    """
    M, width = da.shape
    dboth = empty((M, 2 * width), both.dtype, both.device) if out is None else out
    a = empty((M, width), both.dtype, both.device)
    strides = da.stride(0), both.stride(0), dboth.stride(0), a.stride(0)
    launch(
        _swiglu_backward_kernel,
        (M, cdiv(width, TILE)),
        *(da, both, dboth, a, width, *strides),
        TILE=TILE,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dboth, a
