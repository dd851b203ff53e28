"""What several kernels share: reading a 4-bit code, a scale, and finding the nearest code.

**A byte holds two codes**, the earlier one in the high nibble. All 256 bytes and the two values
each stands for make a table; one look-up decodes a byte:

    16 bit   256 x int32     [ second | first ]     exact where the values are rounded to 16 bits
    32 bit   256 x int64     [ second | first ]     the values themselves

A table in shared memory is read by 32 threads at once, through 32 banks. Threads that want
different words of one bank wait for each other: 3.2 wavefronts a look-up on random bytes
(benchmarks/bank_conflicts.py). Copies of the table do not pay: eight, spread over the banks, leave
2.9 and cost an instruction a value; four that all threads of a warp happen to share cost 6.5.

**A scale** is float32, or, with double quantization, a code for the dynamic map; then
absmax = map[code] * nested_absmax + offset, one multiplication and one addition. PyTorch rounds
after each. A compiler that fuses them rounds once, so a kernel that must agree bit for bit is
launched with enable_fp_fusion=False.
"""

import triton
import triton.language as tl


@triton.jit
def pair_table(code, DTYPE: tl.constexpr):
    """The two values of each byte, as one integer: (256,) from code (16,) float32."""
    byte = tl.arange(0, 256)
    first = tl.load(code + (byte >> 4))
    second = tl.load(code + (byte & 15))
    if DTYPE == tl.float32:
        low = first.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        high = second.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        table = low | (high << 32)
    else:
        low = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        table = low | (high << 16)
    return table


@triton.jit
def first_of(pair, DTYPE: tl.constexpr):
    """The first value of a pair: the lower half of the integer, as DTYPE."""
    if DTYPE == tl.float32:
        return (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def second_of(pair, DTYPE: tl.constexpr):
    """The second value of a pair: the upper half of the integer, as DTYPE."""
    if DTYPE == tl.float32:
        return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return ((pair >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def bytes_of(words):
    """The four bytes of each int32, in memory's order: (..., n) -> (..., n, 2, 2) in registers."""
    even = tl.join(words & 255, (words >> 16) & 255)
    odd = tl.join((words >> 8) & 255, (words >> 24) & 255)
    return tl.join(even, odd)


@triton.jit
def block_scales(absmax, nested_absmax, nested_map, offset, block, inside, NESTED: tl.constexpr):
    """The float32 scales of blocks `block` (int64), zero where not `inside`.

    offset is the value, loaded once by the caller; without NESTED the middle three are not read.
    """
    if NESTED:
        codes = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        groups = tl.load(nested_absmax + block // 256, mask=inside, other=0.0)
        return tl.load(nested_map + codes) * groups + offset
    else:
        return tl.load(absmax + block, mask=inside, other=0.0)


@triton.jit
def nearest_code(y, boundaries, LOG2: tl.constexpr):
    """How many of the 2^LOG2 - 1 ascending boundaries lie below y: a binary search.

    A tie stays below, a NaN goes to the end: both as torch.bucketize does.
    """
    index = tl.zeros_like(y).to(tl.int32)
    for level in tl.static_range(LOG2):
        step = 1 << (LOG2 - 1 - level)
        boundary = tl.load(boundaries + index + (step - 1))
        index += tl.where(y <= boundary, 0, step)
    return index


@triton.jit
def scaled_to_absmax(x, inside, AXIS: tl.constexpr, SMALLEST: tl.constexpr = 0.0):
    """Each row's largest magnitude, and the row divided by it as bitsandbytes does.

    x: (rows, n) float32, zero outside. Gives absmax (rows,), at least SMALLEST, and y (rows, n) in
    [-1, 1]. A NaN makes its row's absmax a NaN, as torch.amax does and tl.max alone would not.
    """
    spoiled = tl.max((x != x).to(tl.int32), AXIS)
    absmax = tl.max(tl.abs(x), AXIS)
    absmax = tl.where(absmax < SMALLEST, SMALLEST, absmax)
    absmax = tl.where(spoiled != 0, float("nan"), absmax)
    divisor = tl.where(absmax < 1e-38, 1e-38, absmax)
    reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    y = x * tl.expand_dims(reciprocal, AXIS)
    y = tl.where(y > 1.0, 1.0, tl.where(y < -1.0, -1.0, y))
    return absmax, tl.where(inside, y, 0.0)


@triton.jit
def sum_of_splits(part, parts, arrivals, tile, place, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Add up what SPLITS programs have of a tile; (sum, whether this program came last).

    place: where each value of `part` lies within a tile's SIZE values in `parts`.
    """
    last = True
    if SPLITS > 1:
        mine = tile * SPLITS + tl.program_id(1)
        tl.store(parts + mine * SIZE + place, part)
        tl.debug_barrier()  # all threads' stores lie before the one arrival
        last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            part = tl.zeros_like(part)
            for split in range(SPLITS):
                part += tl.load(parts + (tile * SPLITS + split) * SIZE + place)
            tl.store(arrivals + tile, 0)
    return part, last
