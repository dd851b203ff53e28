"""The low-rank paths of a batch whose rows have different adapters, all adapters in two launches.

    rows of x       3   0 | 4   1   2 | 5           sorted by their path, cut into tiles of one path
    path            A1 B1 | A2  B2    | -           row 5 has none and is not touched
    h = x A^T       (rows, most ranks)              first launch: each tile with its path's A
    y += s h B^T    (M, N), in place                second launch: each tile with its path's B

One kernel does both: a product of some rows with a matrix that their tile names. The matrices lie
where they are, each a tensor of its own; the kernel gets their addresses, so that adapters come and
go without being stacked. Ranks may differ. (Punica and S-LoRA, arXiv:2310.18547 and 2311.03285,
call the two launches shrink and expand.)

`add_paths_reference` is the slow twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels import tuning
from lorax.kernels.common import sum_of_splits
from lorax.kernels.launch import capability, empty, launch, split_buffers

FEW_ROWS, MANY_ROWS = 16, 64  # of a tile: the tensor cores' least, and what a warp group multiplies
STEPS = {4: 16, 2: 64}  # of the sum, by a value's bytes: as in lora.py
COLUMNS = 64  # of y that a program adds to


class Path(NamedTuple):
    """A (r, in), B (out, r), of one dtype, and the scale of their path."""

    A: Tensor
    B: Tensor
    scaling: float


@triton.jit
def _segmented_kernel(
    x,  # DOWN: (M, C), by rows of the batch; else h (rows, RANKS), by places in `order`
    out,  # DOWN: h; else y (M, C)
    matrices,  # (paths,) int64: addresses of A (rank, C) or B (C, rank), contiguous
    ranks,  # (paths,) int32
    scalings,  # (paths,) float32
    order,  # the rows, int32, sorted by path
    tiles,  # (tiles, 3) int32: path, first place in `order`, number of places
    like,  # a tensor of the matrices' dtype; it is not read
    parts,
    arrivals,
    C,
    RANKS,
    DOWN: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    path = tl.load(tiles + tile * 3)
    lane = tl.arange(0, TILE)
    place = tl.load(tiles + tile * 3 + 1).to(tl.int64) + lane
    inside_rows = lane < tl.load(tiles + tile * 3 + 2)
    row = tl.load(order + place, mask=inside_rows, other=0).to(tl.int64)
    rank = tl.load(ranks + path)
    matrix = tl.load(matrices + path).to(tl.pointer_type(like.dtype.element_ty))
    matrix = tl.multiple_of(matrix, 16)
    column = tl.program_id(2).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    if DOWN:
        source, target, inner, x_stride, out_stride = row, place, C, C, RANKS
        inside_columns = column < rank
    else:
        source, target, inner, x_stride, out_stride = place, row, rank, RANKS, C
        inside_columns = column < C
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    for step in range(tl.program_id(1), tl.cdiv(inner, STEP), SPLITS):
        k = (step * STEP + tl.arange(0, STEP)).to(tl.int64)
        inside = inside_rows[:, None] & (k < inner)[None, :]
        xs = tl.load(x + source[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
        inside = inside_columns[None, :] & (k < inner)[:, None]
        values = tl.load(matrix + column[None, :] * inner + k[:, None], mask=inside, other=0.0)
        sums = tl.dot(xs, values.to(x.dtype.element_ty), sums, input_precision="ieee")
    last = True
    if SPLITS > 1:
        within = lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        mine = tile + tl.program_id(2).to(tl.int64) * tl.num_programs(0)
        SIZE: tl.constexpr = TILE * WIDTH
        sums, last = sum_of_splits(sums, parts, arrivals, mine, within, SIZE, SPLITS)
    if last:
        inside = inside_rows[:, None] & inside_columns[None, :]
        at = out + target[:, None] * out_stride + column[None, :]
        if not DOWN:
            before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            sums = before + tl.load(scalings + path) * sums
        tl.store(at, sums.to(out.dtype.element_ty), mask=inside)


def add_paths(y: Tensor, x: Tensor, paths: Sequence[Path], rows: Sequence[Sequence[int]]) -> None:
    """y[i] += scaling * (x[i] A^T) B^T in place, for each row i of the batch that has a path.

    h = x A^T is rounded to x's dtype, the sum with y once.

    Args:
        y: (batch, ..., N), contiguous, of x's dtype.
        x: (batch, ..., C).
        paths: A (r, C) and B (N, r), of any floating dtype, r of any size, 0 too.
        rows: for each path the rows of the batch that have it; no row twice.
    """
    kept = [(path, list(own)) for path, own in zip(paths, rows, strict=True) if len(path.A)]
    kept = [(path, own) for path, own in kept if own]
    if not kept or not x.numel():
        return
    if not y.is_contiguous():
        raise ValueError(f"y has the strides {y.stride()}; expected a contiguous tensor")
    C, N = x.shape[-1], y.shape[-1]
    tokens = x.numel() // C // len(x)  # of a row
    most = max(len(own) for _, own in kept) * tokens
    tile = FEW_ROWS if most <= FEW_ROWS else MANY_ROWS
    order, tiles = _tiles([own for _, own in kept], tokens, tile, x.device)
    dtype = kept[0][0].A.dtype
    As = [_aligned(path.A, dtype) for path, _ in kept]
    Bs = [_aligned(path.B, dtype) for path, _ in kept]
    ranks = _on([len(A) for A in As], torch.int32, x.device)
    scalings = _on([path.scaling for path, _ in kept], torch.float32, x.device)
    widest = max(len(A) for A in As)
    flat = x.reshape(-1, C).contiguous()
    h = empty((len(order), widest), x.dtype, x.device)
    step = STEPS[x.element_size()]
    width = tuning.rank_tile(widest, tuning.RANKS_ALONE)
    blocks = triton.cdiv(widest, width)
    splits = tuning.splits(capability(x.device), len(tiles) * blocks, triton.cdiv(C, step))
    buffers = split_buffers(x.device, len(tiles) * blocks, splits, tile * width)
    table = ranks, scalings, order, tiles
    _start(flat, h, As, table, buffers, (C, widest), True, (tile, width, step, splits))
    step = min(step, max(16, triton.next_power_of_2(widest)))
    shape = tile, COLUMNS, step, 1
    _start(h, y.view(-1, N), Bs, table, (None, None), (N, widest), False, shape)


def _start(
    x: Tensor,
    out: Tensor,
    matrices: Sequence[Tensor],
    table: tuple[Tensor, ...],
    buffers: tuple[Tensor | None, Tensor | None],
    sizes: tuple[int, int],
    down: bool,
    shape: tuple[int, int, int, int],
) -> None:
    """One of the two launches. shape: TILE, WIDTH, STEP and SPLITS."""
    ranks, scalings, order, tiles = table
    tile, width, step, splits = shape
    blocks = triton.cdiv(sizes[1] if down else sizes[0], width)
    launch(
        _segmented_kernel,
        (len(tiles), splits, blocks),
        x,
        out,
        _on([matrix.data_ptr() for matrix in matrices], torch.int64, x.device),
        ranks,
        scalings,
        order,
        tiles,
        matrices[0],
        *buffers,
        *sizes,
        DOWN=down,
        TILE=tile,
        WIDTH=width,
        STEP=step,
        SPLITS=splits,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _tiles(
    rows: Sequence[Sequence[int]], tokens: int, tile: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The order of all rows of x and y, a batch's row being `tokens` of them, and its tiles."""
    order: list[int] = []
    tiles: list[tuple[int, int, int]] = []
    for path, own in enumerate(rows):
        first = len(order)
        for row in own:
            order += range(row * tokens, (row + 1) * tokens)
        count = len(order) - first
        tiles += [(path, first + at, min(tile, count - at)) for at in range(0, count, tile)]
    return _on(order, torch.int32, device), _on(tiles, torch.int32, device)


def _on(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table, in a buffer that the tests can put guards around."""
    table = torch.tensor(values, dtype=dtype)
    return empty(table.shape, dtype, device).copy_(table)


def _aligned(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix, contiguous from an address that is a multiple of 16; a copy where it is not."""
    matrix = matrix.detach().to(dtype).contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def add_paths_reference(
    y: Tensor, x: Tensor, paths: Sequence[Path], rows: Sequence[Sequence[int]]
) -> None:
    """The slow twin of `add_paths`, with the same arguments: a path at a time."""
    for path, own in zip(paths, rows, strict=True):
        at = torch.tensor(list(own), dtype=torch.int64, device=x.device)
        h = F.linear(x[at], path.A.to(x.dtype))  # (rows, ..., r)
        onto, thin = y[at].reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
        path_of = torch.addmm(onto, thin, path.B.to(x.dtype).t(), alpha=path.scaling)
        y[at] = path_of.view(len(at), *y.shape[1:])
