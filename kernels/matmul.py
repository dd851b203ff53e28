"""Products with a four-bit weight: y = x W^T + b and dx = dy W.

    M = 1                  vector kernel    ordinary multiplications, a program 8 rows of W
    2 <= M <= crossover    skinny kernel    tensor cores, W decoded on the way
    above                  decode W into a scratch, in chunks that stay in L2 or whole, then cuBLAS

At small M the weight is what is read: 0.516 bytes a value against bf16's 2, so the limit is 3.87
times as fast. The two fused kernels read it once and never write it.

**The skinny kernel** computes y^T = W x^T with W as the left operand: decoded values are then where
a Hopper warp group reads its left operand, and the padded side is the short one. W's tile stays
unscaled: a step of K lies inside one block, so a row's scale is applied to its 32-bit sum:

    sum over steps  scale[row, step] * ( codes[row, step] . x[:, step] )

The values of the code are rounded to x's dtype (a bf16 NF4 value is off by 0.14 % in the mean
square), the product with the scale never is (dequantizing first: 0.17 %). A byte gives two values
of K; they are multiplied apart, the first ones with x's even columns, the second with the odd ones,
so nothing has to be shuffled.

**The backward product** contracts over W's rows, along which the scale changes, so there each value
is scaled and rounded, exactly as `dequantize` does.

**Splitting.** Few rows fill no GPU, so a tile's sum is split over several programs. Each writes its
part; the last to arrive adds them up in a fixed order, so the same call gives the same bits.

**A low-rank path** (h, up, scaling) adds scaling * h up^T to y before it is rounded: LoRA without a
second pass over y. The rank is taken in tiles: a larger one needs no more shared memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorax.kernels import tuning
from lorax.kernels.common import (
    block_scales,
    bytes_of,
    first_of,
    pair_table,
    second_of,
    sum_of_splits,
)
from lorax.kernels.dequantize import dequantize
from lorax.kernels.launch import capability, empty, launch, split_buffers
from lorax.kernels.weight import PackedWeight

Path = tuple[Tensor, Tensor, float]

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
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


def is_fusable(weight: PackedWeight) -> bool:
    """Whether the fused kernels take this weight: (N, K) with whole blocks in each row."""
    return len(weight.shape) == 2 and weight.shape[1] % weight.block_size == 0


def matmul(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, path: Path | None = None
) -> Tensor:
    """y = x W^T + b, by the kernel that suits M; no gradients here.

    Args:
        x: (..., K), any strides; bfloat16, float16 or float32.
        weight: (N, K).
        bias: (N,) or None.
        path: (h, up, scaling) with h (..., r) in x's dtype and up (N, r): y also gets
            scaling * h up^T.

    Returns:
        (..., N) in x's dtype.
    """
    M = math.prod(x.shape[:-1])
    if is_fusable(weight) and M <= tuning.crossover(capability(x.device), x.dtype):
        return fused(x, weight, bias, path)
    return unfused(x, weight, bias, path)


def matmul_dx(dy: Tensor, weight: PackedWeight, path: Path | None = None) -> Tensor:
    """dx = dy W, by the kernel that suits M.

    Args:
        dy: (..., N), any strides.
        weight: (N, K).
        path: (h, up, scaling) with h (..., r) and up (K, r): dx also gets scaling * h up^T.

    Returns:
        (..., K) in dy's dtype.
    """
    M = math.prod(dy.shape[:-1])
    crossover = tuning.crossover(capability(dy.device), dy.dtype)
    if is_fusable(weight) and 1 <= M <= crossover and dy.dtype != torch.float32:
        return fused_dx(dy, weight, path)
    return unfused_dx(dy, weight, path)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return matmul(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return matmul_dx(gradients[0], ctx.weight), None, None


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`matmul` with a gradient for x."""
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


def fused(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, path: Path | None = None
) -> Tensor:
    """`matmul` by the vector kernel (M = 1) or the skinny one, whatever the crossover says."""
    N, K = weight.shape
    rows = _aligned(x.reshape(-1, K), 2 * x.element_size())
    M = rows.shape[0]
    y = empty((M, N), x.dtype, x.device)
    gpu = capability(x.device)
    h, up, scaling, rank = _path_arguments(path, M)
    common = {
        "RANK": rank,
        "BIAS": bias is not None,
        "BLOCK_SIZE": weight.block_size,
        "NESTED": weight.nested_absmax is not None,
        "DTYPE": _DTYPES[x.dtype],
        "enable_fp_fusion": True,
    }
    up = None if up is None else up.contiguous()
    inputs = (rows.view(_PAIRS[x.dtype]), *_weight_arguments(weight), bias, h, up, y)
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
    columns = _columns(M)
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


def fused_dx(dy: Tensor, weight: PackedWeight, path: Path | None = None) -> Tensor:
    """`matmul_dx` by the backward kernel, whatever the crossover says."""
    N, K = weight.shape
    rows = dy.reshape(-1, N).contiguous()
    M = rows.shape[0]
    dx = empty((M, K), dy.dtype, dy.device)
    gpu = capability(dy.device)
    config = tuning.backward(gpu)
    columns = _columns(M)
    grid = (triton.cdiv(K, config.columns), triton.cdiv(M, columns))
    splits = tuning.splits(gpu, grid[0] * grid[1], triton.cdiv(N, config.rows))
    h, up, scaling, rank = _path_arguments(path, M)
    launch(
        _backward_kernel,
        (grid[0], splits, grid[1]),
        rows,
        *_weight_arguments(weight),
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
        DTYPE=_DTYPES[dy.dtype],
        SPLITS=splits,
        STAGES=config.stages,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return dx.view(*dy.shape[:-1], K)


def unfused(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, path: Path | None = None
) -> Tensor:
    """`matmul` by decoding chunks of W's rows into the scratch, each followed by a product."""
    N, K = weight.shape
    rows = x.reshape(-1, K)
    y = empty((rows.shape[0], N), x.dtype, x.device)
    chunks = _row_chunks(weight, x)
    scratch = _scratch(chunks[0][1] * K if chunks else 0, x)
    for begin, end in chunks:
        W = dequantize(weight, scratch[: (end - begin) * K].view(-1, K), start=begin * K)
        part = y[:, begin:end]
        if bias is None:
            torch.mm(rows, W.t(), out=part)
        else:
            torch.addmm(bias[begin:end].to(x.dtype), rows, W.t(), out=part)
    return _add_path(y, path).view(*x.shape[:-1], N)


def unfused_dx(dy: Tensor, weight: PackedWeight, path: Path | None = None) -> Tensor:
    """`matmul_dx`, (..., N) -> (..., K), by one product with all of W, decoded into the scratch.

    In chunks of rows, dx would be rounded after each.
    """
    N, K = weight.shape
    rows = dy.reshape(-1, N)
    dx = empty((rows.shape[0], K), dy.dtype, dy.device)
    torch.mm(rows, dequantize(weight, _scratch(N * K, dy).view(N, K)), out=dx)
    return _add_path(dx, path).view(*dy.shape[:-1], K)


def _add_path(y: Tensor, path: Path | None) -> Tensor:
    """y += scaling * h up^T, in place."""
    if path is None:
        return y
    h, up, scaling = path
    return y.addmm_(h.reshape(-1, h.shape[-1]), up.to(y.dtype).t(), alpha=scaling)


def _row_chunks(weight: PackedWeight, x: Tensor) -> list[tuple[int, int]]:
    """Rows of W that fit the scratch together, or all rows; each chunk starts with a block.

    A chunk that stays in L2 saves a trip to memory, a fourth of a product of 2,048 rows at most. A
    chunk whose last wave of tiles leaves multiprocessors idle costs more: then W is decoded whole.
    """
    N, K = weight.shape
    gpu = capability(x.device)
    M = x.numel() // max(1, K)
    unit = max(weight.block_size, tuning.PRODUCT_TILE[1])
    rows = tuning.SCRATCH_BYTES[tuning.family(gpu)] // max(1, K * x.element_size())
    rows = max(rows - rows % unit, unit)
    chunks = [(begin, min(begin + rows, N)) for begin in range(0, N, rows)]
    cost = sum(tuning.waves(gpu, M, end - begin) for begin, end in chunks)
    return chunks if cost <= tuning.waves(gpu, M, N) else [(0, N)]


def _scratch(size: int, like: Tensor) -> Tensor:
    """Room for a decoded weight or a chunk of it, gone with the call.

    torch's allocator gives it from what this stream, or the graph that is being captured, has just
    freed: the same memory each time, and never memory that another stream or graph still reads. A
    buffer kept here would have to know of both.
    """
    return empty((size,), like.dtype, like.device)


def _aligned(x: Tensor, alignment: int) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % alignment == 0 else x.clone()


def _columns(M: int) -> int:
    """How many of M's rows a program takes: the tensor cores' 16, 32 or 64."""
    return min(64, max(16, triton.next_power_of_2(M)))


def _weight_arguments(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    words = _aligned(weight.packed.view(-1), 4).view(torch.int32)
    nested = (weight.nested_absmax, weight.nested_map, weight.nested_offset)
    return (words, weight.absmax, weight.code, *nested)


def _path_arguments(path: Path | None, M: int) -> tuple[Tensor | None, Tensor | None, float, int]:
    """h (M, r), up (N, r), scaling and r; r = 0 where there is no path."""
    if path is None:
        return None, None, 0.0, 0
    h, up, scaling = path
    return h.reshape(M, h.shape[-1]).contiguous(), up, scaling, up.shape[1]
