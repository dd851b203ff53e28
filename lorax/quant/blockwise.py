"""Blockwise quantization with any codebook (Dettmers et al. 2022, arXiv:2110.02861, section 2).

A tensor is read flat, in row-major order, and cut into blocks of `block_size` values; blocks run
across rows, and the last one may be short. Each block keeps its largest magnitude, `absmax`, in
float32. A value is stored as the index of the nearest entry of a codebook that spans [-1, 1]:

    y = clamp(x * (1 / absmax), -1, 1)          the reciprocal is rounded once, then multiplied
    code = the number of midpoints below y      a tie between two entries goes to the lower one
    x' = values[code] * absmax                  in float32, rounded once to the output dtype

These are bitsandbytes' operations in its order, so codes, scales and values agree bit for bit. An
all-zero block stores absmax = 0 and decodes to exact zeros; for absmax < 1e-38 the reciprocal is
clamped to 1e38, so that a block of denormals shrinks towards zero instead of overflowing.

4-bit weights, their scales and 8-bit optimizer states are all quantized here. Fast twins compute
the same bits: decode.py for four bits on a CPU, kernels/quantize.py and dequantize.py on CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorax.quant.nearest import NearestTable

CHUNK_ELEMENTS = 2**19  # 2 MiB of float32, whole blocks: fastest with 2 MiB of L2; changes no bit
SMALLEST_ABSMAX = 1e-38
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def number_of_blocks(elements: int, block_size: int) -> int:
    """ceil(elements / block_size)."""
    return -(-elements // block_size)


def quantize_blockwise(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize each block to the nearest entries of a codebook.

    Args:
        x: (n,), any floating dtype.
        code: (k,) float32 codebook, k <= 256, in any order.
        block_size: values per block.

    Returns:
        codes (n,) uint8, indices into `code`, and absmax (ceil(n / block_size),) float32.
    """
    from lorax.quant.nearest import nearest_table

    n = x.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(number_of_blocks(n, block_size), dtype=torch.float32, device=x.device)
    table = nearest_table(code.cpu(), x.device)
    whole = n - n % block_size
    step = max(1, CHUNK_ELEMENTS // block_size) * block_size
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        quantize_rows_(
            x[start:stop].view(-1, block_size),
            table,
            codes[start:stop].view(-1, block_size),
            absmax[start // block_size : stop // block_size],
        )
    if whole < n:  # the last, short block
        quantize_rows_(x[None, whole:], table, codes[None, whole:], absmax[-1:])
    return codes, absmax


def quantize_rows_(x: Tensor, table: NearestTable, codes: Tensor, absmax: Tensor) -> None:
    """x (blocks, block_size) into `codes`, the same shape in uint8, and absmax (blocks,)."""
    x = x.float()
    torch.amax(x.abs(), dim=1, out=absmax)  # (blocks,)
    y = (x * absmax.clamp_min(SMALLEST_ABSMAX).reciprocal()[:, None]).clamp_(-1, 1)
    codes.copy_(table.codes(y))


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, block_size: int, out: Tensor
) -> Tensor:
    """Decode into `out`: code[codes[i]] * absmax[i // block_size], returned as well.

    Args:
        codes: (n,) uint8.
        absmax: (ceil(n / block_size),) float32.
        code: (k,) float32 codebook.
        block_size: values per block.
        out: (n,) contiguous, any floating dtype; rounded once from float32.
    """
    n = codes.numel()
    step = max(1, CHUNK_ELEMENTS // block_size) * block_size
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = code.index_select(0, codes[start:stop].int())  # (stop - start,) float32
        scales = absmax[start // block_size : number_of_blocks(stop, block_size)]
        out[start:stop].copy_(scale_blocks_(values, scales, block_size))
    return out


def scale_blocks_(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """values[i] *= scales[i // block_size], in place: values (n,), scales one per block."""
    n = values.numel()
    whole = n - n % block_size
    values[:whole].view(-1, block_size).mul_(scales[: whole // block_size, None])
    if whole < n:
        values[whole:].mul_(scales[-1])
    return values
