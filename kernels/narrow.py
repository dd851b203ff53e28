"""y = x W^T of 1 to 16 rows: what decoding a token multiplies with, for Linears with one input.

    launch 1   x put into the order in which the product meets it, and h = x A^T of every LoRA
    launch 2   y_i = x W_i^T + b_i + s_i h_i B_i^T for all of them (q, k, v; gate, up)

W is read once, in whole words, and decoded in registers (nibbles.py) as the tensor cores' left
operand: y^T = W x^T. A step takes 16 words of each row, 128 values. Nibble n of the words is one
product of 16 terms, so eight products make a step; for these x lies as

    xp[step, n, m, w] = x[m, 128 step + 8 w + (n ^ 1)]          (K / 128, 8, COLUMNS, 16)

**Scales.** With blocks of 64, words 0 ... 7 have one scale and 8 ... 15 another, and a sum over all
16 could not be scaled any more. So x enters twice, side by side, with the other block's words as
zeros: the sum of each block stands in columns of its own, is scaled in float32, and both are added
at the end. The tensor cores have time for that; decoding needs no multiplication.

**Splitting.** A tile's K is cut into at most 8 stretches, each contiguous; the last of the programs
to arrive adds up their parts in order, so the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels import tuning
from lorax.kernels.common import block_scales, sum_of_splits
from lorax.kernels.launch import capability, cdiv, empty, launch, runs_assembly, split_buffers
from lorax.kernels.nibbles import plane, plane_by_look_up, texts_of
from lorax.kernels.weight import PackedWeight, go_together

STEP, WORDS = 128, 16
MOST_ROWS = 16
Path = tuple[Tensor, Tensor, float]  # A (r, K), B (N, r) and the scaling

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _arrange_kernel(
    x,  # (M, K)
    xp,  # (K / 128, 8, COLUMNS, 16)
    downs,  # a tuple: each path's A (r, K)
    h,  # (M, all ranks)
    parts,
    arrivals,
    ranks,
    first_columns,  # of each path in h
    first_tiles,  # each path's first tile of ranks, from 0; behind the last, their number
    M,
    K,
    h_width,
    per_split,  # values of K a program
    COLUMNS: tl.constexpr,
    PATHS: tl.constexpr,
    RANK_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    m = tl.arange(0, 16)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, K)
    if tl.program_id(0) == 0:
        place = tl.arange(0, 128 * COLUMNS)
        w, column, n = place % 16, place // 16 % COLUMNS, place // (16 * COLUMNS)
        for start in range(begin, end, 128):
            at = x + column * K + start + 8 * w + (n ^ 1)
            values = tl.load(at, mask=column < M, other=0.0)
            tl.store(xp + start * COLUMNS + place, values)
    for i in tl.static_range(PATHS):
        tile = tl.program_id(0) - 1
        if (tile >= first_tiles[i]) & (tile < first_tiles[i + 1]):
            rank = (tile - first_tiles[i]) * RANK_TILE + tl.arange(0, RANK_TILE)
            sums = tl.zeros((16, RANK_TILE), tl.float32)
            for start in range(begin, end, 128):
                k = start + tl.arange(0, 128)
                xs = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0.0)
                at = downs[i] + rank[None, :] * K + k[:, None]
                As = tl.load(at, mask=(rank < ranks[i])[None, :], other=0.0)
                sums = tl.dot(xs, As.to(xs.dtype), sums)
            place = m[:, None] * RANK_TILE + tl.arange(0, RANK_TILE)[None, :]
            SIZE: tl.constexpr = 16 * RANK_TILE
            sums, last = sum_of_splits(sums, parts, arrivals, tile, place, SIZE, SPLITS)
            if last:
                at = h + m[:, None] * h_width + first_columns[i] + rank[None, :]
                inside = (m < M)[:, None] & (rank < ranks[i])[None, :]
                tl.store(at, sums.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _scales_of(
    absmax, nested_absmax, nested_map, offset, block, inside, column, NESTED, BLOCKS, COLUMNS
):
    """Of each sum's block: (ROWS, BLOCKS * COLUMNS), from the blocks block ... block + BLOCKS."""
    found = block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED)[:, None]
    for b in tl.static_range(1, BLOCKS):
        more = block_scales(absmax, nested_absmax, nested_map, offset, block + b, inside, NESTED)
        found = tl.where((column // COLUMNS == b)[None, :], more[:, None], found)
    return found


@triton.jit
def _multiply(
    xp,
    words,
    absmax,
    code,
    nested_absmax,
    nested_map,
    nested_offset,
    bias,
    h,
    h_width,
    h_first,
    up,
    scaling,
    y,
    y_width,
    y_first,
    parts,
    arrivals,
    tile,
    own_tile,  # within this weight
    M,
    N,
    row_words,  # K / 8: a multiple of 16, so that loads are 16 bytes wide
    per_split,  # steps
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    TEXTS: tl.constexpr,  # nibbles.texts_of, or None: by look-up
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = 128 // BLOCK_SIZE if BLOCK_SIZE < 128 else 1
    BLOCK_WORDS: tl.constexpr = 16 // BLOCKS
    WIDTH: tl.constexpr = BLOCKS * COLUMNS
    row = own_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    word = tl.arange(0, 16)
    column = tl.arange(0, WIDTH)
    own = (word[None, :] // BLOCK_WORDS) == (column[:, None] // COLUMNS)
    x_place = (column % COLUMNS)[:, None] * 16 + word[None, :]
    offset = 0.0
    if NESTED:
        offset = tl.load(nested_offset)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, row_words // 16)
    at = words + row[:, None] * row_words + word[None, :]
    first_block = row * (row_words * 8 // BLOCK_SIZE)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        packed = tl.load(at + step * 16, mask=inside[:, None], other=0)
        block = first_block + step * 128 // BLOCK_SIZE
        scales = _scales_of(
            absmax,
            nested_absmax,
            nested_map,
            offset,
            block,
            inside,
            column,
            NESTED,
            BLOCKS,
            COLUMNS,
        )
        x_at = xp + step * (128 * COLUMNS) + x_place
        PLANE: tl.constexpr = 16 * COLUMNS
        part = tl.zeros((ROWS, WIDTH), tl.float32)
        for n in tl.static_range(8):
            xs = tl.load(x_at + n * PLANE, mask=own, other=0.0)
            if TEXTS is None:
                values = plane_by_look_up(packed, code, n, DTYPE)
            else:
                values = plane(packed, TEXTS[n], DTYPE)
            part = tl.dot(values, tl.trans(xs), part)
        sums += part * scales
    each = tl.reshape(sums, ROWS, BLOCKS, COLUMNS)
    result = tl.sum(each, 1)
    m = tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + m[None, :]
    result, last = sum_of_splits(result, parts, arrivals, tile, place, ROWS * COLUMNS, SPLITS)
    if last:
        if RANK > 0:
            for start in tl.range(0, RANK, RANK_TILE, num_stages=1):
                rank = start + tl.arange(0, RANK_TILE)
                within = inside[:, None] & (rank < RANK)[None, :]
                ups = tl.load(up + row[:, None] * RANK + rank[None, :], mask=within, other=0.0)
                within = (m < M)[None, :] & (rank < RANK)[:, None]
                hs = tl.load(
                    h + m[None, :] * h_width + h_first + rank[:, None], mask=within, other=0.0
                )
                result += scaling * tl.dot(ups.to(DTYPE), hs)
        if bias is not None:
            result += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(
            y + m[None, :].to(tl.int64) * y_width + y_first + row[:, None],
            result.to(y.dtype.element_ty),
            mask=(m < M)[None, :] & inside[:, None],
        )


@triton.jit
def _narrow_kernel(
    xp,
    words,  # tuples, an entry a weight
    absmax,
    nested_absmax,
    nested_offset,
    biases,
    ups,
    scalings,
    sizes,  # N of each
    first_rows,  # of each in y
    first_tiles,
    h_firsts,
    code,
    nested_map,
    h,
    y,
    parts,
    arrivals,
    M,
    row_words,
    y_width,
    h_width,
    per_split,
    RANKS: tl.constexpr,  # a tuple
    RANK_TILE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    TEXTS: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (tile >= first_tiles[i]) & (tile < first_tiles[i + 1]):
            _multiply(
                xp,
                words[i],
                absmax[i],
                code,
                nested_absmax[i],
                nested_map,
                nested_offset[i],
                biases[i],
                h,
                h_width,
                h_firsts[i],
                ups[i],
                scalings[i],
                y,
                y_width,
                first_rows[i],
                parts,
                arrivals,
                tile,
                tile - first_tiles[i],
                M,
                sizes[i],
                row_words,
                per_split,
                RANKS[i],
                RANK_TILE,
                BLOCK_SIZE,
                ROWS,
                COLUMNS,
                NESTED,
                TEXTS,
                DTYPE,
                SPLITS,
                STAGES,
            )


def takes(x: Tensor, weights: Sequence[PackedWeight]) -> bool:
    """Whether these weights go together for rows like x (M, K)."""
    K = weights[0].shape[-1]
    rows = x.numel() // max(1, K)
    known = x.dtype in _DTYPES and 1 <= rows <= MOST_ROWS and go_together(weights)
    return known and K % STEP == 0


def products(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    paths: Sequence[Path | None],
) -> Tensor:
    """The outputs of all weights side by side, (M, N_1 + N_2 + ...), in x's dtype.

    Args:
        x: (M, K) of 1 to 16 rows; bfloat16 or float16. See `takes`.
        weights: (N_i, K) each. biases: (N_i,) or None, each.
        paths: (A_i, B_i, s_i) or None, each; A and B of any floating dtype.
    """
    x = x.contiguous()
    M, K = x.shape
    gpu, columns = capability(x.device), 8 if M <= 8 else 16
    config = tuning.narrow(gpu)
    xp, h, firsts = _arranged(x, columns, [None if p is None else p[0] for p in paths])
    sizes = [weight.shape[0] for weight in weights]
    first_rows, first_tiles = [0], [0]
    for size in sizes:
        first_rows.append(first_rows[-1] + size)
        first_tiles.append(first_tiles[-1] + cdiv(size, config.rows))
    y = empty((M, first_rows[-1]), x.dtype, x.device)
    tiles, steps = first_tiles[-1], K // STEP
    splits = min(8, tuning.splits(gpu, tiles, steps))
    ranks = [0 if p is None else p[1].shape[1] for p in paths]
    first = weights[0]
    launch(
        _narrow_kernel,
        (tiles, splits),
        xp,
        tuple(_words(weight.packed) for weight in weights),
        tuple(weight.absmax for weight in weights),
        tuple(weight.nested_absmax for weight in weights),
        tuple(weight.nested_offset for weight in weights),
        tuple(biases),
        tuple(None if p is None else p[1].contiguous() for p in paths),
        tuple(0.0 if p is None else float(p[2]) for p in paths),
        tuple(sizes),
        tuple(first_rows[:-1]),
        tuple(first_tiles),
        tuple(firsts),
        first.code,
        first.nested_map,
        h,
        y,
        *split_buffers(x.device, tiles, splits, config.rows * columns),
        *(M, K // 8, y.shape[1], h.shape[1], cdiv(steps, splits)),
        RANKS=tuple(ranks),
        RANK_TILE=tuning.rank_tile(max(ranks), tuning.RANKS_BESIDE_A_PRODUCT),
        COUNT=len(weights),
        BLOCK_SIZE=first.block_size,
        ROWS=config.rows,
        COLUMNS=columns,
        NESTED=first.nested_absmax is not None,
        TEXTS=texts_of(first.code, x.dtype) if runs_assembly(x.device) else None,
        DTYPE=_DTYPES[x.dtype],
        SPLITS=splits,
        STAGES=config.stages,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return y


def _arranged(
    x: Tensor, columns: int, downs: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[int]]:
    """x as the product reads it, h (M, all ranks), and where each path's columns begin in h."""
    M, K = x.shape
    present = [A.contiguous() for A in downs if A is not None]
    ranks = [A.shape[0] for A in present]
    width = tuning.rank_tile(max(ranks, default=1), tuning.RANKS_ALONE)
    first_columns, first_tiles = [0], [0]
    for rank in ranks:
        first_columns.append(first_columns[-1] + rank)
        first_tiles.append(first_tiles[-1] + cdiv(rank, width))
    starts = iter(first_columns)
    firsts = [0 if A is None else next(starts) for A in downs]
    xp = empty((K // STEP, 8, columns, WORDS), x.dtype, x.device)
    h = empty((M, max(1, first_columns[-1])), x.dtype, x.device)
    steps = K // STEP
    splits = min(32, steps)
    per_split = cdiv(steps, splits) * STEP
    launch(
        _arrange_kernel,
        (1 + first_tiles[-1], splits),
        x,
        xp,
        tuple(present),
        h,
        *split_buffers(x.device, max(1, first_tiles[-1]), splits, 16 * width),
        tuple(ranks),
        tuple(first_columns[:-1]),
        tuple(first_tiles),
        *(M, K, h.shape[1], per_split),
        COLUMNS=columns,
        PATHS=len(present),
        RANK_TILE=width,
        SPLITS=splits,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return xp, h, firsts


def _words(packed: Tensor) -> Tensor:
    packed = packed.view(-1)
    packed = packed if packed.data_ptr() % 16 == 0 else packed.clone()
    return packed.view(torch.int32)
