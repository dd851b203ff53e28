"""Affine integers: int8 and int4 whose codes lie at equal distances, with or without a zero point.

    code = round(x / scale) + zero      per block of 64 values of the flat tensor, as in 4 bits
    back = (code - zero) * scale        equal steps need no table and no search

**Symmetric**: zero is 0, codes -127 ... 127 (int8) or -7 ... 7 (int4), scale = max |x| / 127 or
/ 7. One code (-128, -8) stays unused, so that both signs reach equally far.

**With a zero point** ("affine"): the grid is laid over [low, high], the block's smallest and
largest value, widened to hold 0. That wins where a block leans to one side:

    symmetric   -7                0                 7        x in [-0.2, 1.0]: 9 of 15 codes used
                 |. . . . . . . . + . . . . . . . . |
    affine              -8   zero = -5              7        all 16
                         |. . + . . . . . . . . . . |

The zero point is the code of 0, so it belongs to the codes' own range, the signed -8 ... 7. (A
well-known course computes it for unsigned codes, 0 ... 15, and then clamps to the signed ones: half
of the block is lost.) A zero comes back as a zero, exactly.

    codes         int8 (n,), or uint8 (ceil(n / 2),): two's complement, the earlier in the high half
    scales        float32 (blocks,)
    zero_points   int8 (blocks,)                         affine only

A scale keeps 16 significant bits for int8 and 20 for int4, so that any code times it is exact in
float32: nothing is rounded on the way back, quantizing again finds the same scale, zero point and
codes, and the grid misses a block's ends by at most 2^-9 of a step.

8.5 and 4.5 bits a weight, and 1/8 more with zero points. bitsandbytes has neither; lorax names the
tensors weight, weight.scales, weight.zero_points and weight.quant_state.lorax__int4-affine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant import names
from lorax.quant.blockwise import CHUNK_ELEMENTS, number_of_blocks, scale_blocks_
from lorax.quant.checks import check_block_size, check_input, take
from lorax.quant.scratch import output_of
from lorax.quant.state_dict import reader
from lorax.quant.tensor import QuantizedTensor

FORMATS = names.AFFINE
TINY_SCALE = 2.0**-120
STATE = "weight.quant_state.lorax__"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class AffineTensor(QuantizedTensor):
    """A tensor of equally spaced integers.

    packed: int8 (n,), or uint8 (ceil(n / 2),) for 4 bits; scales: (blocks,) float32;
    zero_points: (blocks,) int8, or None where it is symmetric.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block_size: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def format(self) -> str:
        """The name that `lorax.quantize` takes, like "int4-affine"."""
        return f"int{self.bits}-{'symmetric' if self.zero_points is None else 'affine'}"

    def tensors(self) -> tuple[Tensor, ...]:
        """Packed codes, scales, and zero points where there are some."""
        last = () if self.zero_points is None else (self.zero_points,)
        return (self.packed, self.scales, *last)

    def replaced(self, tensors: Sequence[Tensor]) -> AffineTensor:
        """The same with other codes, scales and zero points."""
        packed, scales, *last = tensors
        return replace(self, packed=packed, scales=scales, zero_points=last[0] if last else None)

    def codes(self) -> Tensor:
        """The codes, one a value: (n,) int8."""
        return self.packed if self.bits == 8 else unpack_nibbles(self.packed, self.shape.numel())

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """(code - zero) * scale, exact in float32 and rounded once to a shorter dtype.

        The ends of the grid may lie half a step outside the block's values; what that carries past
        the dtype's largest number comes back as that number.
        """
        out = output_of(self, dtype, out)
        flat = out.view(-1)
        dequantize_integers(self.codes(), self.scales, self.zero_points, self.block_size, flat)
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under the names above; the state is a JSON text, one byte an element."""
        state = {
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors = {"weight": self.packed, "weight.scales": self.scales}
        if self.zero_points is not None:
            tensors["weight.zero_points"] = self.zero_points
        return {**tensors, STATE + self.format: text}


def quantize(
    weight: Tensor,
    format: str,
    block_size: int = 64,
    *,
    name: str = "weight",
    nonfinite: str = "raise",
) -> AffineTensor:
    """Quantize a tensor of any shape to equally spaced integers.

    Args:
        weight: float32, float16 or bfloat16; any strides; any number of values, zero included.
        format: one of FORMATS.
        block_size: values that share a scale: a power of two from 32 to 4096.
        name: what messages call the tensor.
        nonfinite: "raise", or "allow": a NaN or infinity then spoils its own block and no other.

    Raises:
        QuantizationError: an unknown format, block size or policy, a dtype that is no float, or a
            value that is not finite.
    """
    check_input(weight, format, FORMATS, block_size, name, nonfinite)
    bits, symmetric = int(format[3]), format.endswith("symmetric")
    flat = weight.detach().contiguous().view(-1)
    codes, scales, zeros = quantize_integers(flat, block_size, bits, symmetric)
    packed = codes if bits == 8 else pack_nibbles(codes)
    return AffineTensor(packed, scales, zeros, bits, block_size, weight.shape, weight.dtype)


@reader(lambda names: any(name.startswith(STATE + "int") for name in names))
def from_state_dict(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> AffineTensor:
    """Inverse of `AffineTensor.state_dict`; the tensors state their dtype, so `dtype` is unused.

    Raises:
        QuantizationError: a tensor is missing, or its dtype, size or values are wrong.
    """
    found = [name for name in tensors if name.startswith(STATE)]
    if len(found) != 1 or found[0].removeprefix(STATE) not in FORMATS:
        raise QuantizationError(f"expected one tensor {STATE}... of {FORMATS}, found {found}")
    format = found[0].removeprefix(STATE)
    shape, block_size, dtype = _read_state(tensors[found[0]], found[0])
    bits, n = int(format[3]), shape.numel()
    blocks = number_of_blocks(n, block_size)
    kind, size = (torch.int8, n) if bits == 8 else (torch.uint8, (n + 1) // 2)
    zeros = None
    if format.endswith("affine"):
        zeros = take(tensors, "weight.zero_points", torch.int8, (blocks,))
        limit = 2 ** (bits - 1)
        if blocks and not -limit <= int(zeros.min()) <= int(zeros.max()) < limit:
            raise QuantizationError(
                f"weight.zero_points: outside int{bits}'s signed range; "
                f"expected {-limit} to {limit - 1}"
            )
    packed = take(tensors, "weight", kind, (size,))
    scales = take(tensors, "weight.scales", torch.float32, (blocks,))
    if not torch.isfinite(scales).all():
        raise QuantizationError("weight.scales: a scale is not finite; quantize the weight anew")
    return AffineTensor(packed, scales, zeros, bits, block_size, shape, dtype)


def _read_state(text: Tensor, name: str) -> tuple[torch.Size, int, torch.dtype]:
    try:
        state = json.loads(bytes(text.cpu().tolist()))
        shape, block_size = torch.Size(state["shape"]), state["blocksize"]
        check_block_size(block_size, name)
        if min(shape, default=0) < 0 or math.prod(shape) >= 2**62:
            raise ValueError(f"shape {list(shape)}")
        return shape, block_size, _DTYPES[state["dtype"]]
    except (ValueError, KeyError, TypeError) as error:
        raise QuantizationError(
            f"{name}: not a state of lorax's ({error!r}); get the file anew, or quantize anew"
        ) from None


def pack_nibbles(codes: Tensor) -> Tensor:
    """(n,) int8 in -8 ... 7 -> (ceil(n / 2),) uint8; an odd end is filled with 0."""
    nibbles = codes.view(torch.uint8) & 15
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return (nibbles[0::2] << 4) | nibbles[1::2]


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """The way back, (n,) int8: a shift to the right keeps the sign."""
    signed = packed.view(torch.int8)
    return torch.stack([signed >> 4, (signed << 4) >> 4], dim=1).flatten()[:n]


def quantize_integers(
    x: Tensor, block_size: int, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a flat tensor per block to signed integers.

    Args:
        x: (n,), any floating dtype and any n, zero included.
        block_size: values per block.
        bits: 8 or 4.
        symmetric: around zero, without zero points.

    Returns:
        codes (n,) int8, scales (ceil(n / block_size),) float32 and zero points, the same number,
        int8, or None.
    """
    n, blocks = x.numel(), number_of_blocks(x.numel(), block_size)
    codes = torch.empty(n, dtype=torch.int8, device=x.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=x.device)
    zeros = torch.empty(blocks, dtype=torch.int8, device=x.device)
    whole = n - n % block_size
    step = max(1, CHUNK_ELEMENTS // block_size) * block_size
    pieces = [(start, min(start + step, whole)) for start in range(0, whole, step)]
    for start, stop in [*pieces, (whole, n)]:
        if start == stop:
            continue
        rows = x[start:stop].view(-1, min(block_size, stop - start)).float()
        here = slice(start // block_size, number_of_blocks(stop, block_size))
        found, scales[here], zeros[here] = _integer_rows(rows, bits, symmetric)
        codes[start:stop] = found.view(-1)
    return codes, scales, None if symmetric else zeros


def _integer_rows(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One block a row: x (blocks, k) float32 -> codes, scales and zero points."""
    largest = 2 ** (bits - 1) - 1
    smallest = -largest if symmetric else -largest - 1
    high, low = x.amax(1).clamp_min(0), x.amin(1).clamp_max(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    # Halves, since high - low can overflow; the division is exact when this is done again.
    scale = _shorten((high / 2 - low / 2) / ((largest - smallest) / 2), bits)
    # A block as small as this keeps its law (half a step), but its codes stay near zero.
    tiny = scale <= TINY_SCALE / 4
    scale = torch.where(tiny, TINY_SCALE, scale)
    scale = torch.where(scale.isfinite(), scale, torch.nan)  # spoils this block, and says so
    middle = (smallest + largest - (high / scale + low / scale)) / 2
    zero = torch.where(tiny, 0, middle.round()).nan_to_num(0)
    codes = (x / scale[:, None]).round_().add_(zero[:, None]).nan_to_num_(0)
    codes.clamp_(smallest, largest)
    # Each end takes its end code, also where half a step would round away from it: else a second
    # pass would find a shorter block.
    codes.masked_fill_((x == high[:, None]) & ~tiny[:, None], largest)
    codes.masked_fill_((x == low[:, None]) & ~tiny[:, None], smallest)
    return codes.to(torch.int8), scale, zero.to(torch.int8)


def _shorten(scale: Tensor, bits: int) -> Tensor:
    """Round positive float32 to 24 - bits significant bits, so that a code times it is exact."""
    drop = 2**bits
    return ((scale.view(torch.int32) + drop // 2) & -drop).view(torch.float32)


def dequantize_integers(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, block_size: int, out: Tensor
) -> Tensor:
    """(code - zero) * scale, into `out`; nothing finite becomes infinite.

    Args:
        codes: (n,) int8.
        scales: (ceil(n / block_size),) float32.
        zeros: the same number, int8, or None.
        block_size: values per block.
        out: (n,) contiguous, of the dtype that is wanted; one rounding from float32.
    """
    n = codes.numel()
    largest = torch.finfo(out.dtype).max
    step = max(1, CHUNK_ELEMENTS // block_size) * block_size
    for start in range(0, n, step):
        stop = min(start + step, n)
        here = slice(start // block_size, number_of_blocks(stop, block_size))
        values = codes[start:stop].float()
        if zeros is not None:
            values -= zeros[here].repeat_interleave(block_size)[: stop - start]
        scale_blocks_(values, scales[here], block_size)
        out[start:stop].copy_(values.clamp_(-largest, largest))
    return out
