"""Rotary positions in place: the query and key heads of a row, in one launch.

    (x_i, x_{i + D/2})  ->  (x_i cos - x_{i + D/2} sin,  x_{i + D/2} cos + x_i sin)

The backward is the same turn the other way round: sin changes its sign. The plain path makes two
products, a concatenation and a sum of whole tensors for queries and as much for keys; here each
value is read and written once. A program has a row (a token) with all its heads; behind the heads
that turn may stand others (the values), which are not touched.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels.launch import cdiv, launch, power_of_2


@triton.jit
def _rope_kernel(
    x,  # (M, ...), rows row_stride apart; the first heads * D values of a row turn
    cos,  # (T, D)
    sin,
    T,
    row_stride,
    heads,
    D,
    DIRECTION: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    half = D // 2
    turn = (row % T) * D + pair
    c = tl.load(cos + turn, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + turn, mask=pair < half, other=0.0).to(tl.float32)[None, :] * DIRECTION
    at = x + row * row_stride + head[:, None] * D + pair[None, :]
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * c - second * s).to(x.dtype.element_ty), mask=inside)
    tl.store(at + half, (second * c + first * s).to(x.dtype.element_ty), mask=inside)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, heads: int, back: bool = False) -> Tensor:
    """Turn the first `heads` heads of each row of x, in place.

    Args:
        x: (M, at least heads * D), whole rows side by side or further apart; row m is the token
            at place m % T.
        cos, sin: (T, D), contiguous; the second half of a row repeats the first.
        back: turn the other way, as gradients do.
    """
    T, D = cos.shape
    half, together = power_of_2(D // 2), 16
    launch(
        _rope_kernel,
        (x.shape[0], cdiv(heads, together)),
        x,
        cos,
        sin,
        T,
        x.stride(0),
        heads,
        D,
        DIRECTION=-1 if back else 1,
        HEADS=together,
        HALF=half,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return x
