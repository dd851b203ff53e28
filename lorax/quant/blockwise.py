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

**Integers** are the codebook that needs no table, for equal steps need no search:

    code = round(x / scale) + zero              back = (code - zero) * scale

A scale keeps 16 significant bits for int8 and 20 for int4, so that any code times it is exact in
float32: nothing is rounded on the way back, quantizing again finds the same scale, zero point and
codes, and the grid misses a block's ends by at most 2^-9 of a step.

The work is cut into chunks of whole blocks that fit the cache; the chunk's size changes no bit.

Adam's second moment needs one more rule, `quantize_positive_`: nearest codes would store small
values as zero, which is then divided by. There a value above zero never gets code 0.
"""

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant.nearest import NearestTable, nearest_table

CHUNK_ELEMENTS = 2**19  # 2 MiB of float32: measured best on two cores with 2 MiB of L2 each
SMALLEST_ABSMAX = 1e-38
SMALLEST_POSITIVE_ABSMAX = 1e-30  # times the unsigned map's least value still a normal float32
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TINY_SCALE = 2.0**-120


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


def quantize_positive_(
    x: Tensor, round_up: Tensor, table: NearestTable, codes: Tensor, absmax: Tensor
) -> None:
    """Quantize whole blocks of values >= 0 so that none but zero itself becomes zero.

    Args:
        x: (blocks, block_size) float32, one block a row, nothing below zero.
        round_up: the same shape, bool: where set, the next entry that is not smaller is taken
            instead of the nearest.
        table: of a codebook that goes from 0 to 1.
        codes: the same shape as x, uint8, written.
        absmax: (blocks,) float32, written; at least 1e-30, so that the least entry times absmax is
            not zero either.
    """
    torch.amax(x, dim=1, out=absmax).clamp_min_(SMALLEST_POSITIVE_ABSMAX)
    y = (x * absmax.reciprocal()[:, None]).clamp_(max=1)
    nearest = table.codes(y)
    short = table.values.index_select(0, nearest.view(-1).int()).view(y.shape) < y
    torch.maximum(nearest.add_(short & round_up), (x > 0).to(torch.uint8), out=codes)


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
