"""Products of many rows: W decoded to a scratch, in chunks that L2 holds or whole, then cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from lorax.kernels import tuning
from lorax.kernels.dequantize import dequantize
from lorax.kernels.launch import capability, empty
from lorax.kernels.operands import Path
from lorax.kernels.weight import PackedWeight


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
