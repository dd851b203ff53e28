"""RMSNorm with the addition before it, and its backward with the addition behind it: one pass each.

    forward    t = x + delta        n = t / rms(t)        y = w n
    backward   dt = (w dy - n mean(w dy n)) / rms(t)  +  what reached t another way

A layer of a transformer adds to its stream and normalizes the sum; backward, the gradient of the
norm is added to the stream's own. Apart these are four launches that read or write a stream-wide
tensor 12 times; here they are two that do it 8 times. A program has a row.

Of the forward the backward needs t and 1 / rms(t), one float32 a row; n is not kept. The sum t and
n are rounded to the stream's dtype, as the plain layers round them; all else is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from lorax.kernels.launch import empty, launch, power_of_2


@triton.jit
def _norm_kernel(
    x,  # (M, C)
    delta,  # (M, C) or None
    weight,  # (C,)
    total,  # (M, C), where there is a delta
    y,  # (M, C), rows y_stride apart
    scale,  # (M,) float32
    C,
    y_stride,
    eps,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < C
    t = tl.load(x + row * C + column, mask=inside, other=0.0)
    if ADD:
        added = tl.load(delta + row * C + column, mask=inside, other=0.0)
        t = (t.to(tl.float32) + added.to(tl.float32)).to(t.dtype)
        tl.store(total + row * C + column, t, mask=inside)
    wide = t.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / C + eps)
    tl.store(scale + row, inverse)
    n = (wide * inverse).to(t.dtype).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + column, (w * n).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    dy,  # (M, C)
    total,  # (M, C)
    weight,
    scale,
    beside,  # (M, C) or None: the gradient that reached t another way
    dx,  # (M, C)
    C,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < C
    at = row * C + column
    inverse = tl.load(scale + row)
    n = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * inverse
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dn = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * w
    result = (dn - n * (tl.sum(dn * n, 0) / C)) * inverse
    if ADD:
        result += tl.load(beside + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)


def norm(
    x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """t = x + delta, y = weight * t / rms(t), and 1 / rms(t).

    Args:
        x: (M, C), contiguous; delta: the same, or None: t is x itself.
        weight: (C,).
        out: where y goes, (M, C) with whole rows side by side or further apart; None: a new one.

    Returns:
        t (M, C), y (M, C) in x's dtype, and the scale (M,) float32.
    """
    M, C = x.shape
    y = empty((M, C), x.dtype, x.device) if out is None else out
    total = x if delta is None else empty((M, C), x.dtype, x.device)
    scale = empty((M,), float32, x.device)
    options = _options(C)
    at = (x, delta, weight, total, y, scale, C, y.stride(0), eps)
    launch(_norm_kernel, (M,), *at, ADD=delta is not None, **options)
    return total, y, scale


def norm_backward(
    dy: Tensor, total: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None = None
) -> Tensor:
    """The gradient of t, (M, C): through the norm from dy (M, C), plus `beside`."""
    M, C = total.shape
    dx = empty((M, C), total.dtype, total.device)
    at = (dy, total, weight, scale, beside, dx, C)
    launch(_norm_backward_kernel, (M,), *at, ADD=beside is not None, **_options(C))
    return dx


def _options(C: int) -> dict[str, int | bool]:
    width = power_of_2(C)
    warps = min(16, max(4, width // 512))
    return {"WIDTH": width, "num_warps": warps, "enable_fp_fusion": True}
