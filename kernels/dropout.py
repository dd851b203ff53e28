"""Dropout whose mask is never stored: it follows from a seed and is drawn wherever it is needed.

Philox 4x32-10 (Salmon et al. 2011) makes four 32-bit words from a key and a counter. Here

    key       the step's seed, an int64 in the device's memory: a replayed graph reads a new one
    counter   (row * ceil(C / 4) + column // 4,  site, 0, 0)        site: which Linear of the model

and word column % 4 decides about the value at (row, column): it stays where the word, as a signed
number, is at least p 2^32 - 2^31. One call decides about four values, some four instructions each;
a stored mask would cost a byte of traffic each way, and M * C bytes of memory for every Linear.

Who drops: `lora.down` (h = drop(x) A^T), `lora.cross` (dA = dh^T drop(x)) and `add_dropped` here
(dx += drop(dh A)). All three see the same mask for the same (seed, site), whatever their tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels import tuning
from lorax.kernels.drop import Drop
from lorax.kernels.launch import cdiv, launch


@triton.jit
def kept(seed, site, threshold, row, group, groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which values stay, (ROWS, COLUMNS): rows `row`, and columns in fours, `group` of `groups`."""
    counter = (row.to(tl.int64)[:, None] * groups + group.to(tl.int64)[None, :]).to(tl.uint32)
    zero = counter * 0
    key = tl.load(seed)
    w0, w1, w2, w3 = tl.philox(key, counter, zero + site, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, ROWS, COLUMNS).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _add_dropped_kernel(
    dx,  # (M, C), rows dx_stride apart
    dh,  # (M, RANK), rows dh_stride apart
    A,  # (RANK, C)
    seed,
    site,
    threshold,
    M,
    C,
    dx_stride,
    dh_stride,
    scale,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in tl.range(0, RANK, RANK_TILE, num_stages=1):
        rank = begin + tl.arange(0, RANK_TILE)
        inside = (row < M)[:, None] & (rank < RANK)[None, :]
        left = tl.load(dh + row[:, None] * dh_stride + rank[None, :], mask=inside, other=0.0)
        inside = (rank < RANK)[:, None] & (column < C)[None, :]
        right = tl.load(A + rank[:, None] * C + column[None, :], mask=inside, other=0.0)
        sums = tl.dot(left, right.to(left.dtype), sums, input_precision="ieee")
    group = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    stay = kept(seed, site, threshold, row, group, (C + 3) // 4, ROWS, COLUMNS)
    at = dx + row[:, None] * dx_stride + column[None, :]
    inside = (row < M)[:, None] & (column < C)[None, :]
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = before + tl.where(stay, sums * scale, 0.0)
    tl.store(at, value.to(dx.dtype.element_ty), mask=inside)


def add_dropped(dx: Tensor, dh: Tensor, A: Tensor, drop: Drop) -> Tensor:
    """dx += drop(dh A), in place: dx (M, C), dh (M, r) in dx's dtype, A (r, C) of any dtype."""
    (M, C), rank = dx.shape, A.shape[0]
    rows, columns = 64, 128 if dx.dtype != torch.float32 else 64
    launch(
        _add_dropped_kernel,
        (cdiv(M, rows), cdiv(C, columns)),
        dx,
        dh,
        A.contiguous(),
        *(drop.seed, drop.site, drop.threshold),
        *(M, C, dx.stride(0), dh.stride(0), drop.scale),
        RANK=rank,
        RANK_TILE=tuning.rank_tile(rank, tuning.RANKS_BESIDE_A_PRODUCT),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dx
