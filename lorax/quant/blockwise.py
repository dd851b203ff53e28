"""Quantize and dequantize per block, for any codebook: the one place with that maths.

A tensor is read flat, in row-major order, and cut into blocks of `block_size` values; blocks run
across rows, and the last one may be short. Each block keeps its largest magnitude, `absmax`, in
float32. A value is stored as the index of the nearest entry of a codebook that spans [-1, 1]:

    y = clamp(x * (1 / absmax), -1, 1)          the reciprocal is rounded once, then multiplied
    code = the number of midpoints below y      a tie between two entries goes to the lower one
    back = code_values[code] * absmax           in float32, rounded once to the wanted dtype

These are bitsandbytes' operations in bitsandbytes' order, so the results agree bit for bit. Two of
its corners come with them: an all-zero block stores absmax 0 and comes back as exact zeros, and
below absmax = 1e-38 the reciprocal is held at 1e38, so that denormals shrink towards zero instead
of dividing by nothing.

The work is cut into chunks of whole blocks that fit the cache; the chunk's size changes no bit.
On CUDA a Triton kernel quantizes, with the same bits (`kernels/quantize.py`).
"""

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant.nearest import NearestTable, nearest_table

CHUNK_ELEMENTS = 2**19  # 2 MiB of float32: measured best on two cores with 2 MiB of L2 each
SMALLEST_ABSMAX = 1e-38
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def check_block_size(block_size: int, name: str) -> None:
    """Refuse a block size that no format has."""
    if block_size not in BLOCK_SIZES:
        raise QuantizationError(
            f"{name}: block_size {block_size} is not supported; expected one of {BLOCK_SIZES}"
        )


def number_of_blocks(elements: int, block_size: int) -> int:
    """How many blocks `elements` values fill, the last one perhaps in part."""
    return -(-elements // block_size)


def quantize_blockwise(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a flat tensor per block to the nearest codes.

    Args:
        x: (n,), any floating dtype and any n, zero included.
        code: (k,) float32, k <= 256, in any order.
        block_size: values per block.

    Returns:
        codes (n,) uint8 and absmax (ceil(n / block_size),) float32.
    """
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
    if whole < n:
        quantize_rows_(x[None, whole:], table, codes[None, whole:], absmax[-1:])
    return codes, absmax


def quantize_rows_(x: Tensor, table: NearestTable, codes: Tensor, absmax: Tensor) -> None:
    """One block a row: x (blocks, block_size) into codes (the same) and absmax (blocks,)."""
    x = x.float()
    torch.amax(x.abs(), dim=1, out=absmax)
    y = (x * absmax.clamp_min(SMALLEST_ABSMAX).reciprocal()[:, None]).clamp_(-1, 1)
    codes.copy_(table.codes(y))


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, block_size: int, out: Tensor
) -> Tensor:
    """Look each code up and scale it by its block's absmax, into `out`.

    Args:
        codes: (n,) uint8.
        absmax: (ceil(n / block_size),) float32.
        code: (k,) float32.
        block_size: values per block.
        out: (n,) contiguous, of the dtype that is wanted; one rounding from float32.
    """
    n = codes.numel()
    step = max(1, CHUNK_ELEMENTS // block_size) * block_size
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = code.index_select(0, codes[start:stop].int())
        scales = absmax[start // block_size : number_of_blocks(stop, block_size)]
        out[start:stop].copy_(scale_blocks_(values, scales, block_size))
    return out


def scale_blocks_(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Multiply values (n,) in place by scales (ceil(n / block_size),), one for each block."""
    n = values.numel()
    whole = n - n % block_size
    values[:whole].view(-1, block_size).mul_(scales[: whole // block_size, None])
    if whole < n:
        values[whole:].mul_(scales[-1])
    return values
