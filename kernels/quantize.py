"""Quantize blockwise on the GPU: to four bits, and to the dynamic 8-bit table.

    x (n,)  ->  blocks of B:  absmax = max |x|,  y = clamp(x * (1 / absmax), -1, 1)
            ->  code = the number of midpoints below y        a binary search: 4 or 8 steps

The operations and their order are those of lorax/quant/blockwise.py, so the codes and scales agree
bit for bit: the division is the correctly rounded one, and a NaN or an infinity spoils its own
block.

A table need not ascend: FP4's values are ordered by their bits, and it has two zeros. The search
runs over the sorted values, and a second table gives back the code; what lies just above two equal
values takes the second one's code, as in `blockwise.py` and in bitsandbytes on a CPU.

Cost: x read once, half a byte (or one) and 4 / B bytes of scales written a value; memory is the
limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels.common import nearest_code, scaled_to_absmax
from lorax.kernels.launch import empty, launch
from lorax.kernels.reference import search_tables

TILE = 4096  # values a program, and the largest block


@triton.jit
def _quantize_kernel(
    x,
    boundaries,
    order,
    codes,
    absmax,
    n,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    LOG2: tl.constexpr,
    PACKED: tl.constexpr,
):
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    tile = tl.program_id(0).to(tl.int64)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = place < n
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    largest, y = scaled_to_absmax(values, inside, 1)
    tl.store(absmax + block, largest, mask=block * BLOCK_SIZE < n)
    code = tl.load(order + nearest_code(y, boundaries, LOG2)).to(tl.int32)
    if PACKED:
        first, second = tl.split(tl.reshape(code, BLOCKS, BLOCK_SIZE // 2, 2))
        half = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
        tl.store(codes + half, ((first << 4) | second).to(tl.uint8), mask=half * 2 < n)
    else:
        tl.store(codes + place, code.to(tl.uint8), mask=inside)


def _quantize(x: Tensor, code: Tensor, block_size: int, packed: bool) -> tuple[Tensor, Tensor]:
    flat = x.contiguous().view(-1)
    n = flat.numel()
    codes = empty(((n + 1) // 2 if packed else n,), torch.uint8, x.device)
    absmax = empty((triton.cdiv(n, block_size),), torch.float32, x.device)
    boundaries, order = search_tables(code)
    launch(
        _quantize_kernel,
        (triton.cdiv(n, TILE),),
        flat,
        boundaries,
        order,
        codes,
        absmax,
        n,
        BLOCK_SIZE=block_size,
        TILE=TILE,
        LOG2=(code.numel() - 1).bit_length(),
        PACKED=packed,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, absmax


def quantize_4bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize to the nearest of 16 values, two codes a byte.

    Args:
        x: any shape and strides; float32, bfloat16 or float16. Read flat, in row-major order.
        code: (16,) float32, the value of each code, in any order.
        block_size: a power of two from 32 to 4096.

    Returns:
        packed (ceil(n / 2),) uint8 and absmax (ceil(n / block_size),) float32. An odd end is filled
        with the code of the value nearest to zero.
    """
    return _quantize(x, code, block_size, packed=True)


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize to the nearest of 256 values: codes (n,) uint8, absmax (blocks,) float32."""
    return _quantize(x, code, block_size, packed=False)
