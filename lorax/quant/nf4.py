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
from lorax.kernels.weight import PackedWeight
from lorax.quant import bitsandbytes_layout, codebooks, compiled, ops
from lorax.quant.blockwise import (
    CHUNK_ELEMENTS,
    check_block_size,
    number_of_blocks,
    quantize_blockwise,
    scale_blocks_,
)
from lorax.quant.double import (
    NestedScales,
    dequantize_scales,
    is_safe,
    quantize_scales,
    say_fallback,
)
from lorax.quant.nearest import look_up
from lorax.quant.tensor import QuantizedTensor, check_source

FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq")
DECODE_ELEMENTS = 2**20  # measured best on two cores: few parallel regions, a buffer of 4 MiB


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
        return dequantize_scales(self.absmax, self.nested)

    def codes(self) -> Tensor:
        """The codes, one a value: (n,) uint8 in 0 ... 15."""
        pairs = torch.stack([self.packed >> 4, self.packed & 15], dim=1)
        return pairs.flatten()[: math.prod(self.shape)]

    def code_values(self, start: int, stop: int) -> Tensor:
        """The codebook's values for the flat range [start, stop), float32; start must be even."""
        table = _pair_table(self.quant_type, self.device)
        pairs = look_up(table, self.packed[start // 2 : (stop + 1) // 2])
        return pairs.view(torch.float32)[: stop - start]

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
        if ops.uses_triton(out):
            return ops.dequantize_4bit_into(self.operands(), out)
        flat, packed, scales, size = out.view(-1), self.packed, self.scales(), self.block_size
        done = 0
        if ops.uses_compiled(out):
            done = compiled.decode_into(flat, packed, scales, size, self.quant_type)
        if done < len(flat):
            table = _pair_table(self.quant_type, self.device)
            _unpack_into(flat[done:], packed[done // 2 :], table, scales[done // size :], size)
        return out

    def operands(self) -> PackedWeight:
        """The tensors as the operators and kernels take them."""
        code = _on_device(self.quant_type, self.device)
        shape = tuple(self.shape)
        if self.nested is None:
            return PackedWeight(self.packed, self.absmax, code, shape, self.block_size)
        dynamic = _on_device("dynamic", self.device)
        second = (self.nested.absmax, dynamic, self.nested.offset)
        return PackedWeight(self.packed, self.absmax, code, shape, self.block_size, *second)

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
        format: "nf4" or "fp4" (float32 scales), "nf4-dq" or "fp4-dq" (double quantization; where
            that would spoil rows of small weights, the tensor keeps float32 scales and the log
            says so).
        block_size: values that share a scale: a power of two from 32 to 4096.
        name: what messages call the tensor.
        nonfinite: "raise", or "allow": a NaN or infinity then spoils its own block and no other;
            with double quantization the tensor keeps float32 scales.

    Raises:
        QuantizationError: an unknown format, block size or policy, a dtype that is no float, or a
            value that is not finite (with how many there are, and where the first one stands).
    """
    check_request(format, block_size, name)
    finite = check_source(weight, name, nonfinite)
    weight = weight.detach().contiguous()
    quant_type, _, double = format.partition("-")
    packed, absmax = _quantize_packed(weight.view(-1), quant_type, block_size)
    plain = FourBitTensor(packed, absmax, weight.shape, weight.dtype, block_size, None, quant_type)
    if not double:
        return plain
    if finite:
        codes, nested = quantize_scales(absmax)
        scales = dequantize_scales(codes, nested)
        if is_safe(weight, plain.code_values, absmax, scales, block_size):
            return replace(plain, absmax=codes, nested=nested)
    say_fallback(name)
    return plain


def check_request(format: str, block_size: int = 64, name: str = "weight") -> None:
    """Refuse a format or block size that does not exist, before anything is computed."""
    if format not in FORMATS:
        raise QuantizationError(f"{name}: format {format!r} is unknown; expected one of {FORMATS}")
    check_block_size(block_size, name)


def _quantize_packed(flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize and pack (n,), a chunk at a time, so that no tensor of one byte a value is made."""
    n = flat.numel()
    code = codebooks.four_bit(quant_type)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(number_of_blocks(n, block_size), dtype=torch.float32, device=flat.device)
    for start in range(0, n, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, n)
        codes, scales = quantize_blockwise(flat[start:stop], code, block_size)
        absmax[start // block_size : number_of_blocks(stop, block_size)] = scales
        if n % 2 and stop == n:  # the last byte's low nibble: the code of zero, as bitsandbytes
            codes = torch.cat([codes, codes.new_tensor([code.tolist().index(0.0)])])
        pairs = codes.view(torch.int16)  # little-endian: the second code is the upper byte
        packed[start // 2 : (stop + 1) // 2] = (pairs << 4).bitwise_or_(pairs >> 8)
    return packed, absmax


@cache
def _on_device(table: str, device: torch.device) -> Tensor:
    """A codebook, or the "dynamic" map of the scales, on that device."""
    values = codebooks.dynamic_map() if table == "dynamic" else codebooks.four_bit(table)
    return values.to(device)


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

    One look-up in the pair table decodes a byte, both values at once, into a float32 buffer; it is
    scaled there and copied, rounded once, into `out`. The look-ups of a chunk are laid out as a row
    a thread, because torch looks up rows in parallel, and the entries of one row one by one.
    """
    n = out.numel()
    step = min(DECODE_ELEMENTS, max(2, n + n % 2))
    rows = torch.get_num_threads()
    width = -(-step // 2 // rows)
    index = torch.zeros(rows, width, dtype=torch.int64, device=out.device)
    buffer = torch.empty(rows, width, dtype=torch.int64, device=out.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        count = (stop - start + 1) // 2
        index.view(-1)[:count].copy_(packed[start // 2 : start // 2 + count])
        torch.gather(table.expand(rows, 256), 1, index, out=buffer)
        values = buffer.view(-1).view(torch.float32)[: stop - start]
        chunk_scales = scales[start // block_size : number_of_blocks(stop, block_size)]
        out[start:stop].copy_(scale_blocks_(values, chunk_scales, block_size))
