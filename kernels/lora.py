"""A LoRA linear over a four-bit base, forward and backward, with x kept once.

    forward                               backward, from dy
    h  = x A^T               (M, r)       dh = s dy B                 (M, r)
    y  = x W^T + b + s h B^T              dx = dy W + dh A            W gets no gradient
                                          dA = dh^T x     dB = s dy^T h

Of x nothing but x itself is kept, and h, which is r wide. What is fused, and what is not:

- up to the crossover s h B^T and dh A are added inside the base product, before its one rounding:
  y and dx are written once and never read;
- above it the base product is cuBLAS, and so is addmm for the path: fusing would not pay, the path
  costs r / K of the product;
- dA and dB are products of two tall matrices, one of them r wide: one kernel, float32 sums straight
  into float32 gradients, without a rounding to 16 bits on the way.

The rank is cut into tiles, each a program's: shared memory and registers do not grow with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorax.kernels import matmul, tuning
from lorax.kernels.common import sum_of_splits
from lorax.kernels.drop import Drop
from lorax.kernels.dropout import kept
from lorax.kernels.launch import capability, cdiv, empty, launch, split_buffers
from lorax.kernels.weight import PackedWeight

TILE = 64  # rows of a product's left operand: what a Hopper warp group multiplies at once
STEPS = {4: 16, 2: 64}  # of the sum, by a value's bytes: short steps sum float32 more exactly


@triton.jit
def _down_kernel(
    x,  # (M, C), rows x_stride apart
    A,  # (RANK, C), any strides
    h,  # (M, RANK), rows h_stride apart
    parts,
    arrivals,
    seed,  # of dropout, where there is any
    site,
    threshold,
    M,
    C,
    x_stride,
    h_stride,
    A_rank_stride,
    A_column_stride,
    scaling,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    DROP: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    row = tile * TILE + tl.arange(0, TILE)
    rank = tl.arange(0, RANK_TILE)
    if RANK > RANK_TILE:
        tile += tl.program_id(2).to(tl.int64) * tl.num_programs(0)
        rank += tl.program_id(2) * RANK_TILE
    sums = tl.zeros((TILE, RANK_TILE), tl.float32)
    for step in tl.range(tl.program_id(1), tl.cdiv(C, STEP), SPLITS, num_stages=3):
        column = (step * STEP + tl.arange(0, STEP)).to(tl.int64)
        inside = (row < M)[:, None] & (column < C)[None, :]
        xs = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        if DROP:
            group = step * (STEP // 4) + tl.arange(0, STEP // 4)
            stay = kept(seed, site, threshold, row, group, (C + 3) // 4, TILE, STEP)
            xs = tl.where(stay, xs, 0.0)
        at = A + rank[None, :] * A_rank_stride + column[:, None] * A_column_stride
        inside = (rank < RANK)[None, :] & (column < C)[:, None]
        As = tl.load(at, mask=inside, other=0.0).to(x.dtype.element_ty)
        sums = tl.dot(xs, As, sums, input_precision="ieee")
    place = tl.arange(0, TILE)[:, None] * RANK_TILE + tl.arange(0, RANK_TILE)[None, :]
    SIZE: tl.constexpr = TILE * RANK_TILE
    sums, last = sum_of_splits(sums, parts, arrivals, tile, place, SIZE, SPLITS)
    if last:
        inside = (row < M)[:, None] & (rank < RANK)[None, :]
        at = h + row[:, None] * h_stride + rank[None, :]
        tl.store(at, (sums * scaling).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _cross_kernel(
    wide,  # (M, C), rows wide_stride apart
    thin,  # (M, RANK), rows thin_stride apart
    out,  # (C, RANK) float32, any strides
    parts,
    arrivals,
    seed,  # of wide's dropout, where there is any
    site,
    threshold,
    M,
    C,
    wide_stride,
    thin_stride,
    out_column_stride,
    out_rank_stride,
    scaling,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    DROP: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    column = tile * TILE + tl.arange(0, TILE)
    rank = tl.arange(0, RANK_TILE)
    if RANK > RANK_TILE:
        tile += tl.program_id(2).to(tl.int64) * tl.num_programs(0)
        rank += tl.program_id(2) * RANK_TILE
    sums = tl.zeros((TILE, RANK_TILE), tl.float32)
    for step in tl.range(tl.program_id(1), tl.cdiv(M, STEP), SPLITS, num_stages=3):
        row = (step * STEP + tl.arange(0, STEP)).to(tl.int64)
        inside = (row < M)[:, None] & (column < C)[None, :]
        at = wide + row[:, None] * wide_stride + column[None, :]
        wides = tl.load(at, mask=inside, other=0.0)
        if DROP:
            group = tl.program_id(0) * (TILE // 4) + tl.arange(0, TILE // 4)
            stay = kept(seed, site, threshold, row, group, (C + 3) // 4, STEP, TILE)
            wides = tl.where(stay, wides, 0.0)
        inside = (row < M)[:, None] & (rank < RANK)[None, :]
        at = thin + row[:, None] * thin_stride + rank[None, :]
        thins = tl.load(at, mask=inside, other=0.0)
        sums = tl.dot(tl.trans(wides), thins, sums, input_precision="ieee")
    place = tl.arange(0, TILE)[:, None] * RANK_TILE + tl.arange(0, RANK_TILE)[None, :]
    SIZE: tl.constexpr = TILE * RANK_TILE
    sums, last = sum_of_splits(sums, parts, arrivals, tile, place, SIZE, SPLITS)
    if last:
        inside = (column < C)[:, None] & (rank < RANK)[None, :]
        at = out + column[:, None] * out_column_stride + rank[None, :] * out_rank_stride
        tl.store(at, sums * scaling, mask=inside)


def down(
    x: Tensor,
    A: Tensor,
    scaling: float = 1.0,
    out: Tensor | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """scaling * x A^T, rounded once: (..., C) and (r, C), any strides -> (..., r) in x's dtype.

    Args:
        out: (M, r), where it goes, rows side by side or further apart; None: a new tensor.
        drop: dropout of x.
    """
    rows = _rows(x)
    (M, C), rank = rows.shape, A.shape[0]
    h = empty((M, rank), x.dtype, x.device) if out is None else out
    step = STEPS[x.element_size()]
    tiles, steps = cdiv(M, TILE), cdiv(C, step)
    width = tuning.rank_tile(rank, tuning.RANKS_ALONE)
    widths = cdiv(rank, width)
    splits = tuning.splits(capability(x.device), tiles * widths, steps)
    launch(
        _down_kernel,
        (tiles, splits, widths),
        rows,
        A,
        h,
        *split_buffers(x.device, tiles * widths, splits, TILE * width),
        *_dropping(drop),
        *(M, C, rows.stride(0), h.stride(0), *A.stride()),
        scaling if drop is None else scaling * drop.scale,
        RANK=rank,
        RANK_TILE=width,
        TILE=TILE,
        STEP=step,
        SPLITS=splits,
        DROP=drop is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return h.view(*x.shape[:-1], rank) if out is None else out


def cross(left: Tensor, right: Tensor, scaling: float = 1.0, drop: Drop | None = None) -> Tensor:
    """scaling * left^T right, summed and given in float32: (..., P) and (..., Q) -> (P, Q).

    The narrower of the two is the rank; both have the same dtype. drop: dropout of `right`.
    """
    left, right = _rows(left), _rows(right)
    out = empty((left.shape[1], right.shape[1]), torch.float32, left.device)
    wide, thin, strides = left, right, out.stride()
    if left.shape[1] < right.shape[1] or drop is not None:
        wide, thin, strides = right, left, (out.stride(1), out.stride(0))
    (M, C), rank = wide.shape, thin.shape[1]
    step = STEPS[left.element_size()]
    tiles, steps = cdiv(C, TILE), cdiv(M, step)
    width = tuning.rank_tile(rank, tuning.RANKS_ALONE)
    widths = cdiv(rank, width)
    splits = tuning.splits(capability(left.device), tiles * widths, steps)
    launch(
        _cross_kernel,
        (tiles, splits, widths),
        wide,
        thin,
        out,
        *split_buffers(left.device, tiles * widths, splits, TILE * width),
        *_dropping(drop),
        *(M, C, wide.stride(0), thin.stride(0), *strides),
        scaling if drop is None else scaling * drop.scale,
        RANK=rank,
        RANK_TILE=width,
        TILE=TILE,
        STEP=step,
        SPLITS=splits,
        DROP=drop is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """(M, C) whose rows are whole; a view where they are already."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _dropping(drop: Drop | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if drop is None else (drop.seed, drop.site, drop.threshold)


def forward(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y (..., N) and h (..., r), which the backward wants.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.
        A: (r, K), of any dtype; its product is taken in x's.
        B: (N, r), the same.
        scaling: of the path.
    """
    h = _down(x, A, 1.0)
    return matmul.matmul(x, weight, bias, (h, B, scaling)), h


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: PackedWeight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wants_dx: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (..., K) or None, dA (r, K) and dB (N, r), the last two in A's and B's dtype."""
    dh = _down(dy, B.t(), scaling)
    dx = matmul.matmul_dx(dy, weight, (dh, A.t(), 1.0)) if wants_dx else None
    return dx, cross(dh, x).to(A.dtype), cross(dy, h, scaling).to(B.dtype)


def _down(x: Tensor, A: Tensor, scaling: float) -> Tensor:
    """`down` up to the crossover, cuBLAS above."""
    if math.prod(x.shape[:-1]) <= tuning.crossover(capability(x.device), x.dtype):
        return down(x, A, scaling)
    return (x @ A.t().to(x.dtype)) * scaling


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        scaling: float,
    ) -> Tensor:
        y, h = forward(x, weight, bias, A, B, scaling)
        ctx.save_for_backward(x, h, A, B)
        ctx.weight, ctx.scaling = weight, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, h, A, B = ctx.saved_tensors
        wants_dx = ctx.needs_input_grad[0]
        found = backward(gradients[0], x, h, ctx.weight, A, B, ctx.scaling, wants_dx)
        return (*found, None, None, None)


def lora_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """y = x W^T + b + scaling * (x A^T) B^T, with gradients for x, A and B; see `forward`."""
    return _LoRALinear.apply(x, A, B, weight, bias, scaling)
