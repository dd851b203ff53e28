"""y = x W^T for few rows of x: one pass over W's four bits, decoded on the way.

    M = 1        vector kernel    ordinary multiplications, a program 8 rows of W
    M <= 64 ...  skinny kernel    tensor cores

**The skinny kernel** computes y^T = W x^T with W as the left operand, so that the padded side is
the short one. W's tile stays unscaled: a step of K lies inside one block, so a row's scale is
applied to its 32-bit sum:

    sum over steps  scale[row, step] * ( codes[row, step] . x[:, step] )

The values of the code are rounded to x's dtype (a bf16 NF4 value is off by 0.14 % in the mean
square), the product with the scale never is (dequantizing first: 0.17 %). A byte gives two values
of K; they are multiplied apart, the first ones with x's even columns, the second with the odd ones,
so nothing has to be shuffled.

**Splitting.** Few rows fill no GPU, so a tile's sum is split over several programs. Each writes its
part; the last to arrive adds them up in a fixed order, so the same call gives the same bits.

**A low-rank path** (h, up, scaling) adds scaling * h up^T to y before it is rounded: LoRA without a
second pass over y. The rank is taken in tiles: a larger one needs no more shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels import tuning
from lorax.kernels.common import (
    block_scales,
    bytes_of,
    first_of,
    pair_table,
    second_of,
    sum_of_splits,
)
from lorax.kernels.launch import capability, empty, launch, split_buffers
from lorax.kernels.operands import (
    DTYPES,
    Path,
    aligned,
    columns_of,
    path_arguments,
    weight_arguments,
)
from lorax.kernels.weight import PackedWeight

_PAIRS = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}


@triton.jit
def _vector_kernel(
    x,  # (K / 2,) pairs
    words,  # (N, K / 8) int32
    absmax,
    code,
    nested_absmax,
    nested_map,
    nested_offset,
    bias,
    h,  # (RANK,)
    up,  # (N, RANK)
    y,  # (N,)
    N,
    row_words,  # K / 8
    row_blocks,  # K / BLOCK_SIZE
    scaling,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    NESTED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    WORDS: tl.constexpr = STEP // 8
    BLOCKS: tl.constexpr = STEP // BLOCK_SIZE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    table = pair_table(code, DTYPE)
    offset = 0.0
    if NESTED:
        offset = tl.load(nested_offset)
    sums = tl.zeros((ROWS, WORDS), tl.float32)
    for begin in range(0, row_words, WORDS):
        word = begin + tl.arange(0, WORDS)
        inside = (row < N)[:, None] & (word < row_words)[None, :]
        packed = tl.load(words + row[:, None] * row_words + word[None, :], mask=inside, other=0)

        block = begin // (BLOCK_SIZE // 8) + tl.arange(0, BLOCKS)
        present = (row < N)[:, None] & (block < row_blocks)[None, :]
        block = row[:, None] * row_blocks + block[None, :]
        scales = block_scales(absmax, nested_absmax, nested_map, offset, block, present, NESTED)
        scales = tl.broadcast_to(scales[:, :, None], ROWS, BLOCKS, BLOCK_SIZE // 8)

        fourth = tl.arange(0, 4)
        mine = (word < row_words)[:, None]
        pairs = tl.load(x + word[:, None] * 4 + fourth[None, :], mask=mine, other=0)
        even, odd = tl.split(tl.reshape(pairs, WORDS, 2, 2))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)

        part = tl.zeros((ROWS, WORDS), tl.float32)
        for byte in tl.static_range(4):
            x_pair = x0 if byte == 0 else (x1 if byte == 1 else (x2 if byte == 2 else x3))
            index = (packed >> (8 * byte)) & 255
            value = tl.reshape(tl.gather(table, tl.reshape(index, ROWS * WORDS), 0), ROWS, WORDS)
            first, second = first_of(value, DTYPE), second_of(value, DTYPE)
            x_first, x_second = first_of(x_pair, DTYPE), second_of(x_pair, DTYPE)
            part += first.to(tl.float32) * x_first.to(tl.float32)[None, :]
            part += second.to(tl.float32) * x_second.to(tl.float32)[None, :]
        sums += part * tl.reshape(scales, ROWS, WORDS)
    result = tl.sum(sums, 1)
    if RANK > 0:
        for begin in tl.range(0, RANK, RANK_TILE, num_stages=1):
            rank = begin + tl.arange(0, RANK_TILE)
            inside = (row < N)[:, None] & (rank < RANK)[None, :]
            ups = tl.load(up + row[:, None] * RANK + rank[None, :], mask=inside, other=0.0)
            hs = tl.load(h + rank, mask=rank < RANK, other=0.0)
            result += scaling * tl.sum(ups.to(tl.float32) * hs.to(tl.float32)[None, :], 1)
    if BIAS:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < N)


@triton.jit
def _skinny_kernel(
    x,  # (M, K / 2) pairs
    words,  # (N, K / 8) int32
    absmax,
    code,
    nested_absmax,
    nested_map,
    nested_offset,
    bias,
    h,  # (M, RANK)
    up,  # (N, RANK)
    y,  # (M, N)
    parts,
    arrivals,
    M,
    N,
    row_words,
    row_blocks,
    scaling,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of M
    STEP: tl.constexpr,
    NESTED: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    WORDS: tl.constexpr = STEP // 8
    tile = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    table = pair_table(code, DTYPE)
    offset = 0.0
    if NESTED:
        offset = tl.load(nested_offset)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(tl.program_id(1), tl.cdiv(row_words, WORDS), SPLITS, num_stages=STAGES):
        word = step * WORDS + tl.arange(0, WORDS)
        inside = (row < N)[:, None] & (word < row_words)[None, :]
        packed = tl.load(words + row[:, None] * row_words + word[None, :], mask=inside, other=0)
        block = row * row_blocks + step // (BLOCK_SIZE // STEP)
        scales = block_scales(absmax, nested_absmax, nested_map, offset, block, row < N, NESTED)
        pair = step * (STEP // 2) + tl.arange(0, STEP // 2)
        inside = (column < M)[:, None] & (pair < row_words * 4)[None, :]
        x_pairs = tl.load(
            x + column[:, None] * (row_words * 4) + pair[None, :], mask=inside, other=0
        )
        index = tl.reshape(bytes_of(packed), ROWS * WORDS * 4)
        values = tl.gather(table, index, 0)
        values = tl.reshape(values, ROWS, STEP // 2)
        part = tl.dot(
            first_of(values, DTYPE), tl.trans(first_of(x_pairs, DTYPE)), input_precision="ieee"
        )
        part = tl.dot(
            second_of(values, DTYPE),
            tl.trans(second_of(x_pairs, DTYPE)),
            part,
            input_precision="ieee",
        )
        sums += part * scales[:, None]
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums, last = sum_of_splits(sums, parts, arrivals, tile, place, ROWS * COLUMNS, SPLITS)
    if last:
        if RANK > 0:
            for begin in tl.range(0, RANK, RANK_TILE, num_stages=1):
                rank = begin + tl.arange(0, RANK_TILE)
                ups = tl.load(
                    up + row[:, None] * RANK + rank[None, :],
                    mask=(row < N)[:, None] & (rank < RANK)[None, :],
                    other=0.0,
                ).to(DTYPE)
                hs = tl.load(
                    h + column[None, :] * RANK + rank[:, None],
                    mask=(column < M)[None, :] & (rank < RANK)[:, None],
                    other=0.0,
                )
                sums += scaling * tl.dot(ups, hs, input_precision="ieee")
        if BIAS:
            sums += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        tl.store(
            y + column[None, :] * N + row[:, None],
            sums.to(y.dtype.element_ty),
            mask=(column < M)[None, :] & (row < N)[:, None],
        )


def fused(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, path: Path | None = None
) -> Tensor:
    """`matmul` by the vector kernel (M = 1) or the skinny one, whatever the crossover says."""
    N, K = weight.shape
    rows = aligned(x.reshape(-1, K), 2 * x.element_size())
    M = rows.shape[0]
    y = empty((M, N), x.dtype, x.device)
    gpu = capability(x.device)
    h, up, scaling, rank = path_arguments(path, M)
    common = {
        "RANK": rank,
        "BIAS": bias is not None,
        "BLOCK_SIZE": weight.block_size,
        "NESTED": weight.nested_absmax is not None,
        "DTYPE": DTYPES[x.dtype],
        "enable_fp_fusion": True,
    }
    up = None if up is None else up.contiguous()
    inputs = (rows.view(_PAIRS[x.dtype]), *weight_arguments(weight), bias, h, up, y)
    sizes = (N, K // 8, K // weight.block_size, scaling)
    if M == 1:
        vector = tuning.vector(gpu)
        launch(
            _vector_kernel,
            (triton.cdiv(N, vector.rows),),
            *inputs,
            *sizes,
            RANK_TILE=tuning.rank_tile(rank, tuning.RANKS_BESIDE_A_PRODUCT),
            ROWS=vector.rows,
            STEP=max(vector.step, weight.block_size),
            num_warps=vector.num_warps,
            **common,
        )
        return y.view(*x.shape[:-1], N)
    skinny = tuning.skinny(gpu)
    columns = columns_of(M)
    grid = (triton.cdiv(N, skinny.rows), triton.cdiv(M, columns))
    step = min(weight.block_size, 64)
    splits = tuning.splits(gpu, grid[0] * grid[1], K // step)
    launch(
        _skinny_kernel,
        (grid[0], splits, grid[1]),
        *inputs,
        *split_buffers(x.device, grid[0] * grid[1], splits, skinny.rows * columns),
        M,
        *sizes,
        RANK_TILE=tuning.rank_tile(rank, tuning.RANKS_BESIDE_A_PRODUCT),
        ROWS=skinny.rows,
        COLUMNS=columns,
        STEP=step,
        SPLITS=splits,
        STAGES=skinny.stages,
        num_warps=skinny.num_warps[columns],
        **common,
    )
    return y.view(*x.shape[:-1], N)
