"""Several four-bit weights decoded into one matrix, a low-rank path beside them: one launch.

Linears that read the same input are one product: q, k and v, or gate and up. And LoRA's path is
part of that product, as further columns of the sum, so that y is written once and never read:

    y = [ x | h ] [ W | s B ]^T                 dx = [ dy | dh ] [ W ]
                                                                 [ A ]
    columns (N, K + R)                          rows (N + R, K)
    +------------+------+                       +------------+
    |    W_q     | sB 0 |  N_q                  |    W_q     |
    +------------+------+                       +------------+
    |    W_k     | 0 sB |  N_k                  |    W_k     |
    +------------+------+                       +------------+
          K        R                            | A_q        |  r_q
                                                | A_k        |  r_k, then zeros up to R

The weights themselves stay where they are, in four bits each: nothing is copied or laid out anew,
and whoever takes the adapter off finds the model as it was. R is the sum of the ranks, rounded up
to a multiple of 16 (whole 16-byte rows; the rest is zeros, so that nothing undefined is summed).

The decoding is dequantize.py's, bit for bit; programs behind the decoding ones write the path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels import tuning
from lorax.kernels.common import block_scales, first_of, pair_table, second_of
from lorax.kernels.launch import capability, launch
from lorax.kernels.weight import PackedWeight

PATH_ROWS, PATH_COLUMNS = 16, 64  # of the path's region, a program

Factor = tuple[Tensor, float]  # A (r, K) or B (N, r), and what it is multiplied by


@triton.jit
def _decode_tile(
    words,
    absmax,
    code,
    nested_absmax,
    nested_map,
    nested_offset,
    out,
    tile,
    n,
    K,
    first_row,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NESTED: tl.constexpr,
):
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    word = tile * (TILE // 8) + tl.arange(0, TILE // 8)
    packed = tl.load(words + word, mask=word < n // 8, other=0)
    shifts = tl.arange(0, 4) * 8
    index = tl.reshape((packed[:, None] >> shifts[None, :]) & 255, TILE // 2)
    pairs = tl.gather(pair_table(code, tl.float32), index, 0)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < n // BLOCK_SIZE
    offset = 0.0
    if NESTED:
        offset = tl.load(nested_offset)
    scales = block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED)
    first = tl.reshape(first_of(pairs, tl.float32), BLOCKS, BLOCK_SIZE // 2) * scales[:, None]
    second = tl.reshape(second_of(pairs, tl.float32), BLOCKS, BLOCK_SIZE // 2) * scales[:, None]
    values = tl.reshape(tl.join(first, second), BLOCKS, BLOCK_SIZE).to(out.dtype.element_ty)
    row_blocks = K // BLOCK_SIZE
    row = block // row_blocks
    start = (row + first_row) * out_stride + (block - row * row_blocks) * BLOCK_SIZE
    start = tl.multiple_of(start, 16)
    tl.store(out + start[:, None] + tl.arange(0, BLOCK_SIZE)[None, :], values, mask=inside[:, None])


@triton.jit
def _group_kernel(
    words,  # tuples, an entry a weight
    absmax,
    nested_absmax,
    nested_offset,
    factors,
    code,
    nested_map,
    out,
    sizes,  # N * K of each
    first_rows,  # where each begins in out
    first_tiles,  # and its first program; behind the last: the path's
    factor_rows,  # each factor's first row and column, and its numbers of both
    factor_columns,
    factor_heights,
    factor_widths,
    scalings,
    K,
    out_stride,
    path_row,  # the path's region in out
    path_column,
    path_height,
    path_width,
    PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NESTED: tl.constexpr,
    PATH_ROWS: tl.constexpr,
    PATH_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(PARTS):
        if (program >= first_tiles[i]) & (program < first_tiles[i + 1]):
            _decode_tile(
                words[i],
                absmax[i],
                code,
                nested_absmax[i],
                nested_map,
                nested_offset[i],
                out,
                program - first_tiles[i],
                sizes[i],
                K,
                first_rows[i],
                out_stride,
                BLOCK_SIZE,
                TILE,
                NESTED,
            )
    if program >= first_tiles[PARTS]:
        program -= first_tiles[PARTS]
        across = tl.cdiv(path_width, PATH_COLUMNS)
        row = program // across * PATH_ROWS + tl.arange(0, PATH_ROWS)
        column = program % across * PATH_COLUMNS + tl.arange(0, PATH_COLUMNS)
        values = tl.zeros((PATH_ROWS, PATH_COLUMNS), tl.float32)
        for i in tl.static_range(PARTS):
            if factors[i] is not None:
                r = (row - factor_rows[i])[:, None]
                c = (column - factor_columns[i])[None, :]
                inside = (r >= 0) & (r < factor_heights[i]) & (c >= 0) & (c < factor_widths[i])
                at = factors[i] + r * factor_widths[i] + c
                values += tl.load(at, mask=inside, other=0.0).to(tl.float32) * scalings[i]
        at = out + (path_row + row)[:, None] * out_stride + (path_column + column)[None, :]
        inside = (row < path_height)[:, None] & (column < path_width)[None, :]
        tl.store(at, values.to(out.dtype.element_ty), mask=inside)


def decode_columns(
    weights: Sequence[PackedWeight], factors: Sequence[Factor | None], out: Tensor
) -> Tensor:
    """[ W | s B ], (N, K + R), into `out`: W's rows below each other, B's on the diagonal.

    Args:
        weights: (N_i, K) each, of one format; whole blocks in a row.
        factors: (B_i (N_i, r_i), s_i) of each, or None.
        out: contiguous; `weight.path_width` says R.
    """
    K, rows, columns, first_row, first_column = weights[0].shape[1], [], [], 0, 0
    for weight, factor in zip(weights, factors, strict=True):
        rows.append(first_row)
        columns.append(first_column)
        first_row += weight.shape[0]
        first_column += 0 if factor is None else factor[0].shape[1]
    region = (0, K, first_row, out.shape[1] - K)
    return _decode(weights, factors, out, rows, columns, region)


def decode_rows(
    weights: Sequence[PackedWeight], factors: Sequence[Factor | None], out: Tensor
) -> Tensor:
    """W's rows, and below them A's: (N + R, K), into `out`.

    factors: (A_i (r_i, K), what it is multiplied by) of each, or None.
    """
    K, rows, first_row = weights[0].shape[1], [], 0
    for factor in factors:
        rows.append(first_row)
        first_row += 0 if factor is None else factor[0].shape[0]
    N = sum(weight.shape[0] for weight in weights)
    return _decode(weights, factors, out, rows, [0] * len(rows), (N, 0, out.shape[0] - N, K))


def _decode(
    weights: Sequence[PackedWeight],
    factors: Sequence[Factor | None],
    out: Tensor,
    rows: list[int],
    columns: list[int],
    region: tuple[int, int, int, int],
) -> Tensor:
    first, parts = weights[0], len(weights)
    K, tile = first.shape[1], max(tuning.dequantize(capability(out.device)).tile, first.block_size)
    sizes = [weight.shape[0] * K for weight in weights]
    first_tiles, first_rows = [0], [0]
    for weight, size in zip(weights, sizes, strict=True):
        first_tiles.append(first_tiles[-1] + -(-size // tile))
        first_rows.append(first_rows[-1] + weight.shape[0])
    present = [(None, 0.0) if f is None else (f[0].contiguous(), f[1]) for f in factors]
    shapes = [(0, 0) if f is None else f.shape for f, _ in present]
    path = -(-region[2] // PATH_ROWS) * -(-region[3] // PATH_COLUMNS)
    launch(
        _group_kernel,
        (first_tiles[-1] + path,),
        tuple(_words(weight.packed) for weight in weights),
        tuple(weight.absmax for weight in weights),
        tuple(weight.nested_absmax for weight in weights),
        tuple(weight.nested_offset for weight in weights),
        tuple(f for f, _ in present),
        first.code,
        first.nested_map,
        out,
        tuple(sizes),
        tuple(first_rows[:-1]),
        tuple(first_tiles),
        tuple(rows),
        tuple(columns),
        tuple(shape[0] for shape in shapes),
        tuple(shape[1] for shape in shapes),
        tuple(float(scaling) for _, scaling in present),
        *(K, out.stride(0), *region),
        PARTS=parts,
        BLOCK_SIZE=first.block_size,
        TILE=tile,
        NESTED=first.nested_absmax is not None,
        PATH_ROWS=PATH_ROWS,
        PATH_COLUMNS=PATH_COLUMNS,
        num_warps=tuning.dequantize(capability(out.device)).num_warps,
        enable_fp_fusion=False,
    )
    return out


def _words(packed: Tensor) -> Tensor:
    packed = packed.view(-1)
    packed = packed if packed.data_ptr() % 4 == 0 else packed.clone()
    return packed.view(torch.int32)
