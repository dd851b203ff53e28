"""Four-bit tensors: packing, double quantization, and the way back.

A weight W (out, in) of n = out * in values becomes

    packed          uint8   (ceil(n / 2),)      two codes a byte, the earlier one in the high nibble
    absmax          float32 (blocks,)           the largest magnitude of each block of 64

        byte 0        byte 1                     W.flatten():  x0 x1 | x2 x3 | ...
       [c0 | c1]     [c2 | c3]   ...             blocks:       x0 ... x63 | x64 ... x127 | ...

which is 4 + 32/64 = 4.5 bits a weight. **Double quantization** ("nf4-dq") stores the scales in 8
bits: their mean is taken off, and the rest is quantized blockwise itself, 256 scales a block, with
the dynamic 8-bit map:

    absmax          uint8   (blocks,)
    nested.absmax   float32 (ceil(blocks / 256),)
    nested.offset   float32 ()                  the mean

4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight: 0.373 saved (not 0.5, as is often said).

Bytes, scales, nested scales and dequantized values equal bitsandbytes'. One difference is meant:
its CPU code finds the second level's codes in a rounded table, and about 1 in 700 is not the
nearest; lorax takes the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant import bitsandbytes_layout, codebooks
from lorax.quant.blockwise import (
    CHUNK_ELEMENTS,
    check_block_size,
    dequantize_blockwise,
    number_of_blocks,
    quantize_blockwise,
    scale_blocks_,
)
from lorax.quant.tensor import QuantizedTensor, check_source

FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq")
NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True)
class NestedScales:
    """The second level of double quantization.

    absmax: (ceil(blocks / 256),) float32, the scale of each group of 256 first-level scales.
    offset: () float32, the mean that was taken off before quantizing.
    """

    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True)
class FourBitTensor(QuantizedTensor):
    """A tensor in four bits a value. Built by `quantize` or `from_state_dict`.

    packed: uint8 (ceil(n / 2),); absmax: (blocks,) float32, or uint8 where `nested` is there.
    shape and dtype are those of the tensor that was quantized; `dequantize` gives them back.
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
        """The name that `quantize` takes: "nf4" or "nf4-dq"."""
        return self.quant_type if self.nested is None else f"{self.quant_type}-dq"

    def tensors(self) -> tuple[Tensor, ...]:
        """All that must be kept: packed codes, scales, and the second level where there is one."""
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
        scales = torch.empty(self.absmax.numel(), dtype=torch.float32, device=self.device)
        dynamic = codebooks.dynamic_map().to(self.device)
        dequantize_blockwise(self.absmax, self.nested.absmax, dynamic, NESTED_BLOCK_SIZE, scales)
        return scales.add_(self.nested.offset)

    def codes(self) -> Tensor:
        """The codes, one a value: (n,) uint8 in 0 ... 15."""
        pairs = torch.stack([self.packed >> 4, self.packed & 15], dim=1)
        return pairs.flatten()[: math.prod(self.shape)]

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """code * absmax, computed in float32 and rounded once.

        Args:
            dtype: of the result; by default the dtype before quantization.
            out: a contiguous tensor of `shape` to write into, which saves the page faults of a
                fresh one (20 ms for 64 MB). Its dtype wins.

        Raises:
            QuantizationError: `out` has another shape or device, or is not contiguous.
        """
        out = self.output(dtype, out)
        table = _pair_table(self.quant_type, self.device)
        _unpack_into(out.view(-1), self.packed, table, self.scales(), self.block_size)
        return out

    def to_bitsandbytes(self) -> dict[str, Tensor]:
        """The tensors as bitsandbytes stores them: "weight", "weight.absmax", and so on."""
        return bitsandbytes_layout.pack(self)

    def state_dict(self) -> dict[str, Tensor]:
        """The same as `to_bitsandbytes`."""
        return self.to_bitsandbytes()

    def describe(self) -> str:
        """What `print(model)` shows of this tensor."""
        return f"{self.format}, block_size={self.block_size}"

    @staticmethod
    def from_state_dict(tensors: Mapping[str, Tensor]) -> FourBitTensor:
        """Read what `state_dict` gives, or the same keys from a checkpoint."""
        fields = bitsandbytes_layout.unpack(tensors)
        offset = fields.pop("nested_offset")
        nested_absmax = fields.pop("nested_absmax")
        nested = None if nested_absmax is None else NestedScales(nested_absmax, offset)
        return FourBitTensor(**fields, nested=nested)


def quantize(
    weight: Tensor, format: str, block_size: int = 64, *, name: str = "weight"
) -> FourBitTensor:
    """Quantize a tensor of any shape to four bits a value.

    Args:
        weight: float32, float16 or bfloat16; any strides; any number of values, zero included.
        format: "nf4" or "fp4" (float32 scales), "nf4-dq" or "fp4-dq" (double quantization).
        block_size: values that share a scale: a power of two from 32 to 4096.
        name: what error messages call the tensor.

    Raises:
        QuantizationError: an unknown format or block size, a dtype that is no float, or a value
            that is not finite (with how many there are, and where the first one stands).
    """
    check_request(format, block_size, name)
    check_source(weight, name)
    flat = weight.detach().contiguous().view(-1)
    quant_type, _, double = format.partition("-")
    code = codebooks.four_bit(quant_type)
    codes, absmax = quantize_blockwise(flat, code, block_size)
    nested = None
    if double:
        absmax, nested = _quantize_scales(absmax)
    packed = _pack(codes, fill=code.tolist().index(0.0))
    return FourBitTensor(packed, absmax, weight.shape, weight.dtype, block_size, nested, quant_type)


def check_request(format: str, block_size: int = 64, name: str = "weight") -> None:
    """Refuse a format or block size that does not exist, before anything is computed."""
    if format not in FORMATS:
        raise QuantizationError(f"{name}: format {format!r} is unknown; expected one of {FORMATS}")
    check_block_size(block_size, name)


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, nested_absmax = quantize_blockwise(
        absmax - offset, codebooks.dynamic_map(), NESTED_BLOCK_SIZE
    )
    return codes, NestedScales(nested_absmax, offset)


def _pack(codes: Tensor, fill: int) -> Tensor:
    """Pack (n,) uint8 codes into (ceil(n / 2),) bytes; an odd end is filled with `fill`."""
    pairs = codes.numel() // 2
    packed = torch.empty((codes.numel() + 1) // 2, dtype=torch.uint8, device=codes.device)
    torch.bitwise_or(codes[0 : 2 * pairs : 2] << 4, codes[1 : 2 * pairs : 2], out=packed[:pairs])
    if codes.numel() % 2:
        packed[-1] = (codes[-1] << 4) | fill
    return packed


@cache
def _pair_table(quant_type: str, device: torch.device) -> Tensor:
    """For each byte its two float32 values as one 64-bit entry: (256,) int64."""
    code = codebooks.four_bit(quant_type)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
    return pairs.to(device).view(torch.int64).flatten()


def _unpack_into(
    out: Tensor, packed: Tensor, table: Tensor, scales: Tensor, block_size: int
) -> None:
    """Decode into out (n,), a chunk of whole blocks at a time.

    One look-up in the pair table decodes a byte, both values at once, into a float32 buffer that
    stays in the cache; it is scaled there and copied, rounded once, into `out`.
    """
    n = out.numel()
    step = min(CHUNK_ELEMENTS, max(2, n + n % 2))
    index = torch.empty(step // 2, dtype=torch.int32, device=out.device)
    buffer = torch.empty(step // 2, dtype=torch.int64, device=out.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        count = (stop - start + 1) // 2
        torch.index_select(
            table, 0, index[:count].copy_(packed[start // 2 : start // 2 + count]),
            out=buffer[:count],
        )  # fmt: skip
        values = buffer[:count].view(torch.float32)[: stop - start]
        chunk_scales = scales[start // block_size : number_of_blocks(stop, block_size)]
        out[start:stop].copy_(scale_blocks_(values, chunk_scales, block_size))
