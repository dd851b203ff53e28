"""dx = dy W for few rows of dy, W decoded on the way.

The sum runs over W's rows, along which the scale changes, so each value is scaled and rounded,
exactly as `dequantize` does. Splitting and the low-rank path are as in skinny.py.
"""

from __future__ import annotations

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
    columns_of,
    path_arguments,
    weight_arguments,
)
from lorax.kernels.weight import PackedWeight


@triton.jit
def _backward_kernel(
    dy,  # (M, N)
    words,  # (N, K / 8) int32
    absmax,
    code,
    nested_absmax,
    nested_map,
    nested_offset,
    h,  # (M, RANK)
    up,  # (RANK, K)
    dx,  # (M, K)
    parts,
    arrivals,
    M,
    N,
    row_words,
    row_blocks,
    scaling,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # of K
    COLUMNS: tl.constexpr,  # of M
    ROWS: tl.constexpr,  # of N, a step
    NESTED: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    WORDS: tl.constexpr = WIDTH // 8
    GROUP: tl.constexpr = min(BLOCK_SIZE, WIDTH)
    GROUPS: tl.constexpr = WIDTH // GROUP
    K = row_words * 8
    tile = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    column = tl.program_id(2).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    table = pair_table(code, tl.float32)
    offset = 0.0
    if NESTED:
        offset = tl.load(nested_offset)
    even = tl.zeros((WIDTH // 2, COLUMNS), tl.float32)
    odd = tl.zeros((WIDTH // 2, COLUMNS), tl.float32)
    for step in tl.range(tl.program_id(1), tl.cdiv(N, ROWS), SPLITS, num_stages=STAGES):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < N)[:, None] & (word < row_words)[None, :]
        packed = tl.load(words + row[:, None] * row_words + word[None, :], mask=inside, other=0)
        start = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, GROUPS) * GROUP
        inside = (row < N)[:, None] & (start < K)[None, :]
        block = row[:, None] * row_blocks + (start // BLOCK_SIZE)[None, :]
        scales = block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED)
        scales = tl.reshape(
            tl.broadcast_to(scales[:, :, None], ROWS, GROUPS, GROUP // 2), ROWS, WIDTH // 2
        )
        index = tl.reshape(bytes_of(packed), ROWS * WORDS * 4)
        values = tl.gather(table, index, 0)
        values = tl.reshape(values, ROWS, WIDTH // 2)
        first = (first_of(values, tl.float32) * scales).to(DTYPE)
        second = (second_of(values, tl.float32) * scales).to(DTYPE)
        inside = (column < M)[:, None] & (row < N)[None, :]
        dys = tl.load(dy + column[:, None] * N + row[None, :], mask=inside, other=0.0)
        dys = tl.trans(dys)
        even = tl.dot(tl.trans(first), dys, even, input_precision="ieee")
        odd = tl.dot(tl.trans(second), dys, odd, input_precision="ieee")
    place = tl.arange(0, WIDTH // 2)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    place = tl.join(place, place + WIDTH // 2 * COLUMNS)
    SIZE: tl.constexpr = WIDTH * COLUMNS
    both, last = sum_of_splits(tl.join(even, odd), parts, arrivals, tile, place, SIZE, SPLITS)
    if last:
        even, odd = tl.split(both)
        if RANK > 0:
            for begin in tl.range(0, RANK, RANK_TILE, num_stages=1):
                rank = begin + tl.arange(0, RANK_TILE)
                hs = tl.load(
                    h + column[None, :] * RANK + rank[:, None],
                    mask=(column < M)[None, :] & (rank < RANK)[:, None],
                    other=0.0,
                )
                pair = tl.program_id(0).to(tl.int64) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
                at = up + rank[None, :].to(tl.int64) * K + pair[:, None] * 2
                inside = (rank < RANK)[None, :] & (pair * 2 < K)[:, None]
                ups = tl.load(at, mask=inside, other=0.0).to(DTYPE)
                even += scaling * tl.dot(ups, hs, input_precision="ieee")
                ups = tl.load(at + 1, mask=inside, other=0.0).to(DTYPE)
                odd += scaling * tl.dot(ups, hs, input_precision="ieee")
        result = tl.reshape(tl.permute(tl.join(even, odd), 1, 0, 2), COLUMNS, WIDTH)
        k = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
        tl.store(
            dx + column[:, None] * K + k[None, :],
            result.to(dx.dtype.element_ty),
            mask=(column < M)[:, None] & (k < K)[None, :],
        )


def fused_dx(dy: Tensor, weight: PackedWeight, path: Path | None = None) -> Tensor:
    """`matmul_dx` by the backward kernel, whatever the crossover says."""
    N, K = weight.shape
    rows = dy.reshape(-1, N).contiguous()
    M = rows.shape[0]
    dx = empty((M, K), dy.dtype, dy.device)
    gpu = capability(dy.device)
    config = tuning.backward(gpu)
    columns = columns_of(M)
    grid = (triton.cdiv(K, config.columns), triton.cdiv(M, columns))
    splits = tuning.splits(gpu, grid[0] * grid[1], triton.cdiv(N, config.rows))
    h, up, scaling, rank = path_arguments(path, M)
    launch(
        _backward_kernel,
        (grid[0], splits, grid[1]),
        rows,
        *weight_arguments(weight),
        h,
        None if up is None else up.t().contiguous(),
        dx,
        *split_buffers(dy.device, grid[0] * grid[1], splits, config.columns * columns),
        M,
        N,
        K // 8,
        K // weight.block_size,
        scaling,
        RANK=rank,
        RANK_TILE=tuning.rank_tile(rank, tuning.RANKS_BESIDE_A_PRODUCT),
        BLOCK_SIZE=weight.block_size,
        WIDTH=config.columns,
        COLUMNS=columns,
        ROWS=config.rows,
        NESTED=weight.nested_absmax is not None,
        DTYPE=DTYPES[dy.dtype],
        SPLITS=splits,
        STAGES=config.stages,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return dx.view(*dy.shape[:-1], K)
