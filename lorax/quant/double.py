"""Double quantization: the scales themselves in 8 bits (QLoRA, arXiv:2305.14314, section 3).

    offset = mean(absmax)                         r = absmax - offset
    codes, absmax2 = blockwise 8-bit of r         256 scales a block, the dynamic map
    back: dynamic_map[codes] * absmax2 + offset   in float32, rounded after each operation

For blocks of 64 that turns 32/64 bits a weight into 8/64 + 32/(64 * 256): 0.373 bits saved (not
0.5, as is often said).

The mean makes the scales small numbers around zero, which the dynamic map stores well: their error
is at most 0.0070 * absmax2. But that is an absolute error. In a tensor where one row in eight is a
thousand times smaller than the others, those rows' scales drown in it: bitsandbytes then brings
them back with a relative error of 5.8. So lorax measures what the second level costs, row by row,
and keeps float32 scales for a tensor where it costs too much (double_safety.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorax.backend import kernels_for, uses_triton
from lorax.quant.blockwise import dequantize_blockwise, quantize_blockwise
from lorax.quant.dynamic_map import dynamic_map

NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True)
class NestedScales:
    """The second level of double quantization.

    absmax: (ceil(blocks / 256),) float32, the scale of each group of 256 first-level scales.
    offset: () float32, the mean that was taken off before quantizing.
    """

    absmax: Tensor
    offset: Tensor


def quantize_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    """Quantize scales (blocks,) float32: codes (blocks,) uint8, and what decodes them."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    code = dynamic_map(device=absmax.device)  # (256,)
    quantize = quantize_blockwise
    if uses_triton(absmax):
        quantize = kernels_for(absmax, "quantize").quantize_8bit
    codes, nested_absmax = quantize(absmax - offset, code, NESTED_BLOCK_SIZE)
    return codes, NestedScales(nested_absmax, offset)


def dequantize_scales(codes: Tensor, nested: NestedScales) -> Tensor:
    """The way back: (blocks,) float32."""
    scales = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    code = dynamic_map(device=codes.device)
    dequantize_blockwise(codes, nested.absmax, code, NESTED_BLOCK_SIZE, scales)
    return scales.add_(nested.offset)
