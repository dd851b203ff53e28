"""Four-bit tensors (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): packing and decoding.

A weight W (out, in) of n = out * in values becomes

    packed          uint8   (ceil(n / 2),)      two codes a byte, the earlier one in the high nibble
    absmax          float32 (blocks,)           the largest magnitude of each block of 64

        byte 0        byte 1                     W.flatten():  x0 x1 | x2 x3 | ...
       [c0 | c1]     [c2 | c3]   ...             blocks:       x0 ... x63 | x64 ... x127 | ...

which is 4 + 32/64 = 4.5 bits a weight. **Double quantization** ("nf4-dq") stores the scales in 8
bits, blockwise again, after subtracting their mean (double.py):

    absmax          uint8   (blocks,)
    nested.absmax   float32 (ceil(blocks / 256),)
    nested.offset   float32 ()                  the mean

4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight. Decoding is one product in float32, rounded once:

    W'[i] = values[code i] * absmax[i // 64]    values: the codebook's 16 (codebooks.py)

All bytes and values equal bitsandbytes', with one intended difference: its CPU code rounds the
second level's table, so about 1 in 700 of those codes is not the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorax.backend import kernels_for, uses_triton
from lorax.quant import codebooks
from lorax.quant.blockwise import CHUNK_ELEMENTS, number_of_blocks, quantize_blockwise
from lorax.quant.double import NestedScales, dequantize_scales, quantize_scales
from lorax.quant.dynamic_map import dynamic_map
from lorax.quant.scratch import output_of
from lorax.quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from lorax.kernels.weight import PackedWeight


@dataclass(frozen=True)
class FourBitTensor(QuantizedTensor):
    """A tensor in four bits a value; fields as above, `quant_type` names the codebook."""

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    nested: NestedScales | None = None
    quant_type: str = "nf4"

    @property
    def format(self) -> str:
        """The codebook's name, with "-dq" under double quantization: "nf4", "nf4-dq"."""
        return self.quant_type if self.nested is None else f"{self.quant_type}-dq"

    def tensors(self) -> tuple[Tensor, ...]:
        """Packed codes and absmax; nested.absmax and nested.offset under double quantization."""
        second = () if self.nested is None else (self.nested.absmax, self.nested.offset)
        return (self.packed, self.absmax, *second)

    def replaced(self, tensors: Sequence[Tensor]) -> FourBitTensor:
        """The same with others in the place of `tensors()`."""
        packed, absmax, *second = tensors
        nested = NestedScales(*second) if second else None
        return replace(self, packed=packed, absmax=absmax, nested=nested)

    def scales(self) -> Tensor:
        """absmax in float32, (blocks,), decoded if double quantized."""
        return self.absmax if self.nested is None else dequantize_scales(self.absmax, self.nested)

    def codes(self) -> Tensor:
        """The codes unpacked, (n,) uint8 in 0 ... 15."""
        pairs = torch.stack([self.packed >> 4, self.packed & 15], dim=1)  # (ceil(n / 2), 2)
        return pairs.flatten()[: self.shape.numel()]

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """`dequantize_blockwise` of `codes` with `scales`, by its fast twin for the device."""
        out = output_of(self, dtype, out)
        if uses_triton(out):
            kernels_for(out, "dequantize").dequantize(self.operands(), out)
        else:
            from lorax.quant.decode import decode_into

            decode_into(out.view(-1), self.packed, self.scales(), self.block_size, self.quant_type)
        return out

    def operands(self) -> PackedWeight:
        """The tensors as operators and kernels take them."""
        from lorax.kernels.weight import PackedWeight

        code = codebooks.four_bit(self.quant_type, self.device)  # (16,)
        plain = (self.packed, self.absmax, code, tuple(self.shape), self.block_size)
        if (second := self.nested) is None:
            return PackedWeight(*plain)
        return PackedWeight(*plain, second.absmax, dynamic_map(True, code.device), second.offset)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under their checkpoint names (state_dict.py)."""
        from lorax.quant.state_dict import pack

        return pack(self)


def quantize(
    weight: Tensor, format: str, block_size: int = 64, *, name: str = "weight",
    nonfinite: str = "raise",
) -> FourBitTensor:  # fmt: skip
    """Quantize a tensor to four bits a value; `lorax.quantize` for these formats.

    Args:
        weight: float32, float16 or bfloat16, any shape and strides.
        format: a codebook's name, or the name and "-dq"; a tensor that double quantization would
            spoil (double_safety.py) keeps float32 scales, and the log says so.
        block_size: values per scale, a power of two from 32 to 4096.
        name: the tensor's name in messages.
        nonfinite: "raise", or "allow": then a NaN or infinity spoils only its own block.

    Raises:
        QuantizationError: an argument or a value of the weight is none of these.
    """
    from lorax.quant.checks import check_input
    from lorax.quant.double_safety import keeps_float_scales

    finite = check_input(weight, format, codebooks.formats(), block_size, name, nonfinite)
    quant_type, _, double = format.partition("-")
    weight = weight.detach().contiguous()
    packed, absmax = _quantize_packed(weight.view(-1), quant_type, block_size)
    plain = FourBitTensor(packed, absmax, weight.shape, weight.dtype, block_size, None, quant_type)
    if not double:
        return plain
    codes, nested = quantize_scales(absmax)
    small = replace(plain, absmax=codes, nested=nested)
    return plain if keeps_float_scales(weight, plain, small, finite, name) else small


def _quantize_packed(flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """(n,) -> packed (ceil(n / 2),) uint8 and absmax (blocks,) float32, a chunk at a time."""
    n = flat.numel()
    code = codebooks.four_bit(quant_type, flat.device)  # (16,)
    if uses_triton(flat):
        return kernels_for(flat, "quantize").quantize_4bit(flat, code, block_size)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(number_of_blocks(n, block_size), dtype=torch.float32, device=flat.device)
    for start in range(0, n, CHUNK_ELEMENTS):  # so that unpacked codes never exist in full
        stop = min(start + CHUNK_ELEMENTS, n)
        codes, scales = quantize_blockwise(flat[start:stop], code, block_size)
        absmax[start // block_size : number_of_blocks(stop, block_size)] = scales
        if n % 2 and stop == n:  # the last byte's low nibble: the code nearest to zero
            codes = torch.cat([codes, quantize_blockwise(code.new_zeros(1), code, block_size)[0]])
        pairs = codes.view(torch.int16)  # little-endian: the second code is the upper byte
        packed[start // 2 : (stop + 1) // 2] = (pairs << 4).bitwise_or_(pairs >> 8)
    return packed, absmax
