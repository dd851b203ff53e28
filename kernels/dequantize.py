"""Four-bit weights back to 16 or 32 bits, bit-equal to PyTorch's.

    packed  (n / 2,) uint8     one 16-byte load a thread: 32 codes
       |  words go to the threads that will store their values (once through shared memory)
       |  byte -> pair table in shared memory -> two float32                   one look-up a byte
       |  * absmax, decoded in the same launch if it is itself quantized       one multiplication
       v  one rounding
    out     (n,) bf16 | fp16 | fp32                16-byte stores, neighbours side by side

A program decodes TILE values. Every whole tile goes through the path above; what is left at the end
of a ragged tensor goes through a second launch of one program that reads byte by byte under a mask.

Cost for bf16 with double quantization: 0.516 + 2 bytes a value, so memory is the limit: 12.6 us for
4096 x 4096 at 3.35 TB/s. The decoding takes under 6 machine instructions a value on sm_90
(benchmarks/static_cost.py), bitsandbytes' Triton path 16.6.

The multiplication by nested_absmax and the addition of the offset must not become one fused
operation, which rounds once where PyTorch rounds twice: hence enable_fp_fusion=False, which a test
holds against the machine code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels import tuning
from lorax.kernels.common import block_scales, first_of, pair_table, second_of
from lorax.kernels.launch import capability, launch
from lorax.kernels.weight import PackedWeight


@triton.jit
def _dequantize_kernel(
    packed,  # (n / 2,) uint8, or the same bytes as (n / 8,) int32 if WORDS
    absmax,
    code,
    nested_absmax,
    nested_map,
    nested_offset,
    out,
    n,
    first_block,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    if WORDS:
        words = tl.load(packed + tile * (TILE // 8) + tl.arange(0, TILE // 8))
        shifts = tl.arange(0, 4) * 8
        index = tl.reshape((words[:, None] >> shifts[None, :]) & 255, TILE // 2)
    else:
        place = tile * (TILE // 2) + tl.arange(0, TILE // 2)
        index = tl.load(packed + place, mask=place * 2 < n, other=0).to(tl.int32)
    pairs = tl.gather(pair_table(code, tl.float32), index, 0)

    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    offset = 0.0
    if NESTED:
        offset = tl.load(nested_offset)
    inside = block * BLOCK_SIZE < n
    block += first_block
    scales = block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED)
    first = tl.reshape(first_of(pairs, tl.float32), BLOCKS, BLOCK_SIZE // 2) * scales[:, None]
    second = tl.reshape(second_of(pairs, tl.float32), BLOCKS, BLOCK_SIZE // 2) * scales[:, None]
    values = tl.reshape(tl.join(first, second), TILE).to(out.dtype.element_ty)
    place = tile * TILE + tl.arange(0, TILE)
    if WORDS:
        tl.store(out + place, values)
    else:
        tl.store(out + place, values, mask=place < n)


def dequantize(weight: PackedWeight, out: Tensor, start: int = 0) -> Tensor:
    """Decode values start ... start + out.numel() of a 4-bit weight into `out`.

    Args:
        weight: of any shape, read flat.
        out: contiguous, of any shape; float32, bfloat16 or float16.
        start: the first value, a multiple of block_size: rows are decoded in chunks with it.

    Returns:
        out.
    """
    block_size = weight.block_size
    if start % block_size:
        raise ValueError(f"start: {start} is not a multiple of block_size {block_size}")
    if not out.is_contiguous():
        raise ValueError(f"out: strides {out.stride()}; expected a contiguous tensor")
    config = tuning.dequantize(capability(out.device))
    tile = max(config.tile, block_size)
    flat = out.view(-1)
    n = flat.numel()
    packed = weight.packed.view(-1)[start // 2 :]
    whole = n - n % tile if packed.data_ptr() % 4 == 0 else 0
    for begin, end, by_words in ((0, whole, True), (whole, n, False)):
        if begin == end:
            continue
        part = packed[begin // 2 : (end + 1) // 2]
        launch(
            _dequantize_kernel,
            (triton.cdiv(end - begin, tile),),
            part.view(torch.int32) if by_words else part,
            weight.absmax,
            weight.code,
            weight.nested_absmax,
            weight.nested_map,
            weight.nested_offset,
            flat[begin:end],
            end - begin,
            (start + begin) // block_size,
            BLOCK_SIZE=block_size,
            TILE=tile,
            NESTED=weight.nested_absmax is not None,
            WORDS=by_words,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
    return out
