"""Double quantization: the scales themselves in 8 bits (QLoRA, arXiv:2305.14314, section 3).

    offset = mean(absmax)                               () float32
    codes, absmax2 = blockwise(absmax - offset)         256 scales a block, the dynamic 8-bit map
    absmax' = dynamic_map[codes] * absmax2 + offset     in float32, rounded after each operation

For blocks of 64 this turns 32/64 bits a weight into 8/64 + 32/(64 * 256): it saves 0.373 bits.

Without their mean the scales lie around zero, where the dynamic map is dense: the error is at most
0.0070 * absmax2. But that error is absolute, so scales a thousand times smaller than their
neighbours drown in it; double_safety.py measures that row by row and then keeps float32 scales.
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

    absmax: (ceil(blocks / 256),) float32, one scale for 256 first-level scales.
    offset: () float32, the mean subtracted before quantizing.
    """

    absmax: Tensor
    offset: Tensor


def quantize_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    """absmax (blocks,) float32 -> codes (blocks,) uint8 and the second level that decodes them."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    code = dynamic_map(device=absmax.device)  # (256,)
    quantize = quantize_blockwise
    if uses_triton(absmax):
        quantize = kernels_for(absmax, "quantize").quantize_8bit
    codes, nested_absmax = quantize(absmax - offset, code, NESTED_BLOCK_SIZE)
    return codes, NestedScales(nested_absmax, offset)


def dequantize_scales(codes: Tensor, nested: NestedScales) -> Tensor:
    """Inverse of `quantize_scales`: codes (blocks,) uint8 -> (blocks,) float32."""
    scales = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    code = dynamic_map(device=codes.device)
    dequantize_blockwise(codes, nested.absmax, code, NESTED_BLOCK_SIZE, scales)
    return scales.add_(nested.offset)
