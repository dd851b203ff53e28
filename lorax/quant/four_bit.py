"""Four-bit tensors: packing, double quantization, and the way back.

A weight W (out, in) of n = out * in values becomes

    packed          uint8   (ceil(n / 2),)      two codes a byte, the earlier one in the high nibble
    absmax          float32 (blocks,)           the largest magnitude of each block of 64

        byte 0        byte 1                     W.flatten():  x0 x1 | x2 x3 | ...
       [c0 | c1]     [c2 | c3]   ...             blocks:       x0 ... x63 | x64 ... x127 | ...

which is 4 + 32/64 = 4.5 bits a weight. **Double quantization** ("nf4-dq") stores the scales in 8
bits: their mean is taken off, and the rest is quantized blockwise itself, 256 scales a block, with
the dynamic 8-bit map (double.py):

    absmax          uint8   (blocks,)
    nested.absmax   float32 (ceil(blocks / 256),)
    nested.offset   float32 ()                  the mean

4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight. Dequantized, each value is code * absmax in float32,
rounded once:

    W[i] = values[code i] * absmax[i // 64]     values: the codebook's 16 (codebooks.py)

Bytes, scales, nested scales and dequantized values equal bitsandbytes'. One difference is meant:
its CPU code finds the second level's codes in a rounded table, and about 1 in 700 is not the
nearest; lorax takes the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorax.backend import kernels_for, uses_triton
from lorax.errors import QuantizationError
from lorax.kernels.weight import PackedWeight
from lorax.quant import codebooks, decode
from lorax.quant.blockwise import (
    CHUNK_ELEMENTS,
    check_block_size,
    number_of_blocks,
    quantize_blockwise,
)
from lorax.quant.checks import check_source
from lorax.quant.double import NestedScales, dequantize_scales, quantize_scales
from lorax.quant.double_safety import is_safe, say_fallback
from lorax.quant.dynamic_map import dynamic_map
from lorax.quant.nearest import nearest_table
from lorax.quant.state_dict import is_state, pack, unpack
from lorax.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class FourBitTensor(QuantizedTensor):
    """A tensor in four bits a value. Built by `quantize` or `from_state_dict`.

    packed: uint8 (ceil(n / 2),); absmax: (blocks,) float32, or uint8 where `nested` is there.
    shape and dtype are those of the tensor that was quantized; `dequantize` gives them back.
    quant_type: the codebook's name.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    nested: NestedScales | None = None
    quant_type: str = "nf4"

    @property
    def format(self) -> str:
        """The name that `quantize` takes, like "nf4" or "nf4-dq"."""
        return self.quant_type if self.nested is None else f"{self.quant_type}-dq"

    def tensors(self) -> tuple[Tensor, ...]:
        """Packed codes, scales, and the second level where there is one."""
        second = () if self.nested is None else (self.nested.absmax, self.nested.offset)
        return (self.packed, self.absmax, *second)

    def to(self, device: torch.device | str) -> FourBitTensor:
        """Move to another device; a dtype never changes, for these are no plain numbers."""
        nested = self.nested
        if nested is not None:
            nested = NestedScales(nested.absmax.to(device), nested.offset.to(device))
        return replace(
            self, packed=self.packed.to(device), absmax=self.absmax.to(device), nested=nested
        )

    def scales(self) -> Tensor:
        """The first level's scales in float32, (blocks,): decoded where they are nested."""
        if self.nested is None:
            return self.absmax
        return dequantize_scales(self.absmax, self.nested)

    def codes(self) -> Tensor:
        """The codes, one a value: (n,) uint8 in 0 ... 15."""
        pairs = torch.stack([self.packed >> 4, self.packed & 15], dim=1)  # (ceil(n / 2), 2)
        return pairs.flatten()[: math.prod(self.shape)]

    def code_values(self, start: int, stop: int) -> Tensor:
        """The codebook's values for the flat range [start, stop), float32; start must be even."""
        packed = self.packed[start // 2 : (stop + 1) // 2]
        return decode.code_values(packed, self.quant_type)[: stop - start]

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """code * absmax, computed in float32 and rounded once; see `QuantizedTensor`."""
        out = self.output(dtype, out)
        if uses_triton(out):
            kernels_for(out, "dequantize").dequantize(self.operands(), out)
        else:
            decode.decode_into(
                out.view(-1), self.packed, self.scales(), self.block_size, self.quant_type
            )
        return out

    def operands(self) -> PackedWeight:
        """The tensors as the operators and kernels take them."""
        code = codebooks.four_bit(self.quant_type, self.device)
        weight = PackedWeight(self.packed, self.absmax, code, tuple(self.shape), self.block_size)
        if self.nested is None:
            return weight
        return weight._replace(
            nested_absmax=self.nested.absmax,
            nested_map=dynamic_map(device=self.device),
            nested_offset=self.nested.offset,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors as checkpoints name them; for bitsandbytes' codebooks its own bytes."""
        return pack(
            self.packed, self.absmax, self.nested, self.quant_type, self.block_size, self.shape,
            self.dtype,
        )  # fmt: skip

    def to_bitsandbytes(self) -> dict[str, Tensor]:
        """The same as `state_dict`, for the codebooks that bitsandbytes has; see the base class."""
        if codebooks.find(self.quant_type).bitsandbytes is None:
            return super().to_bitsandbytes()
        return self.state_dict()

    def describe(self) -> str:
        """What `print(model)` shows of this tensor."""
        return f"{self.format}, block_size={self.block_size}"

    @staticmethod
    def reads(tensors: Mapping[str, Tensor]) -> bool:
        """See `QuantizedTensor`."""
        return any(is_state(name) for name in tensors)

    @staticmethod
    def from_state_dict(
        tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16
    ) -> FourBitTensor:
        """Read what `state_dict` gives, or the same keys from a checkpoint, which say the dtype."""
        return FourBitTensor(**unpack(tensors))


def quantize(
    weight: Tensor,
    format: str,
    block_size: int = 64,
    *,
    name: str = "weight",
    nonfinite: str = "raise",
) -> FourBitTensor:
    """Quantize a tensor of any shape to four bits a value.

    Args:
        weight: float32, float16 or bfloat16; any strides; any number of values, zero included.
        format: a codebook's name (float32 scales), or the name and "-dq" (double quantization;
            where that would spoil rows of small weights, the tensor keeps float32 scales and the
            log says so).
        block_size: values that share a scale: a power of two from 32 to 4096.
        name: what messages call the tensor.
        nonfinite: "raise", or "allow": a NaN or infinity then spoils its own block and no other;
            with double quantization the tensor keeps float32 scales.

    Raises:
        QuantizationError: an unknown format, block size or policy, a dtype that is no float, or a
            value that is not finite (with how many there are, and where the first one stands).
    """
    if format not in codebooks.formats():
        raise QuantizationError(
            f"{name}: format {format!r} is unknown; expected one of {codebooks.formats()}"
        )
    check_block_size(block_size, name)
    finite = check_source(weight, name, nonfinite)
    weight = weight.detach().contiguous()
    quant_type, _, double = format.partition("-")
    packed, absmax = _quantize_packed(weight.view(-1), quant_type, block_size)
    plain = FourBitTensor(packed, absmax, weight.shape, weight.dtype, block_size, None, quant_type)
    if not double:
        return plain
    if not finite or _needs_zero_scales(plain):
        say_fallback(name, "zero or non-finite blocks need exact scales")
        return plain
    codes, nested = quantize_scales(absmax)
    scales = dequantize_scales(codes, nested)
    if not is_safe(weight, plain.code_values, absmax, scales, block_size):
        say_fallback(name, "its rows differ too much in scale for double quantization")
        return plain
    return replace(plain, absmax=codes, nested=nested)


def _needs_zero_scales(plain: FourBitTensor) -> bool:
    """Whether only a scale of exactly zero gives a zero block back: the codebook has no zero."""
    has_zero = 0.0 in codebooks.find(plain.quant_type).values
    return not has_zero and bool((plain.absmax == 0).any())


def _quantize_packed(flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize and pack (n,), a chunk at a time, so that no tensor of one byte a value is made."""
    n = flat.numel()
    code = codebooks.four_bit(quant_type, flat.device)  # (16,)
    if uses_triton(flat):
        packed, absmax = kernels_for(flat, "quantize").quantize_4bit(flat, code, block_size)
        return packed, absmax
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(number_of_blocks(n, block_size), dtype=torch.float32, device=flat.device)
    for start in range(0, n, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, n)
        codes, scales = quantize_blockwise(flat[start:stop], code, block_size)
        absmax[start // block_size : number_of_blocks(stop, block_size)] = scales
        if n % 2 and stop == n:  # the last byte's low nibble: the code nearest to zero
            zero = nearest_table(code.cpu(), flat.device).codes(torch.zeros_like(scales[:1]))
            codes = torch.cat([codes, zero])
        pairs = codes.view(torch.int16)  # little-endian: the second code is the upper byte
        packed[start // 2 : (stop + 1) // 2] = (pairs << 4).bitwise_or_(pairs >> 8)
    return packed, absmax
