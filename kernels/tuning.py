"""The choices that depend on the GPU, frozen, so that a run repeats.

Nothing is tuned at run time: an autotuner picks what was fastest a moment ago, and another tile is
another order of summation. Each table below has one row a GPU family; a GPU that is not listed gets
the row of the nearest older one.

    sm_80 A100 | sm_86 RTX 3090, A40 | sm_89 RTX 4090, L40S | sm_90 H100, H200 | sm_100 B200 |
    sm_120 RTX 5090

How the rows came about: tiles and warps were chosen by compiling for each target and reading the
machine code (registers, no spills, 16-byte loads, instructions a value; benchmarks/static_cost.py).
The crossovers are where bitsandbytes 0.50 found its own; they are leads until
benchmarks/gpu_suite.py has measured ours on that GPU, which docs/log.md then says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FAMILIES = (80, 86, 89, 90, 100, 120)
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
SCRATCH_BYTES = {
    80: 2**24,
    86: 2**22,
    89: 2**25,
    90: 2**25,
    100: 2**26,
    120: 2**25,
}  # a tile that its L2 can hold
CROSSOVER = {
    80: 128,
    86: 128,
    89: 256,
    90: 64,
    100: 64,
    120: 256,
}  # up to this M the fused product is used
# Of a low-rank path's rank, on any GPU: what grows with the rank outgrew sm_89's shared memory at
# r = 256 and spilled 2,004 registers. Beside a base product's sums there is room for 32 (64 spill).
RANKS_ALONE, RANKS_BESIDE_A_PRODUCT = 64, 32
PRODUCT_TILE = (128, 256)  # what a multiprocessor computes of a large 16-bit product in cuBLAS


@dataclass(frozen=True)
class Dequantize:
    """tile: values a program decodes."""

    tile: int
    num_warps: int


@dataclass(frozen=True)
class Vector:
    """M = 1. rows: output values a program; step: values of K at a time."""

    rows: int
    step: int
    num_warps: int


@dataclass(frozen=True)
class Skinny:
    """rows: of W a program; stages: steps of K loaded ahead.

    num_warps goes by the columns of M that a program takes: on a Hopper, 64 columns in 4 warps
    spill registers; on a Blackwell they do not, and 8 warps do.
    """

    rows: int
    num_warps: dict[int, int]
    stages: int


@dataclass(frozen=True)
class Narrow:
    """M = 1 to 16. rows: of W a program; stages: steps of 128 loaded ahead.

    What a step costs beside decoding is shared by its rows: 64 in 4 warps take 6.8 instructions a
    value on sm_90, 128 take 5.3.
    """

    rows: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class Backward:
    """columns: of W, of which a program gives dx; rows: of W at a time."""

    columns: int
    rows: int
    num_warps: int
    stages: int


_DEQUANTIZE = {
    80: Dequantize(tile=8192, num_warps=4),
    86: Dequantize(tile=8192, num_warps=4),
    89: Dequantize(tile=8192, num_warps=4),
    90: Dequantize(tile=8192, num_warps=4),
    100: Dequantize(tile=8192, num_warps=4),
    120: Dequantize(tile=8192, num_warps=4),
}
_VECTOR = {
    80: Vector(rows=8, step=2048, num_warps=4),
    86: Vector(rows=8, step=2048, num_warps=4),
    89: Vector(rows=8, step=2048, num_warps=4),
    90: Vector(rows=8, step=2048, num_warps=4),
    100: Vector(rows=8, step=2048, num_warps=4),
    120: Vector(rows=8, step=2048, num_warps=4),
}
_SKINNY = {
    80: Skinny(rows=128, num_warps={16: 4, 32: 4, 64: 8}, stages=4),
    86: Skinny(rows=128, num_warps={16: 4, 32: 4, 64: 8}, stages=3),
    89: Skinny(rows=128, num_warps={16: 4, 32: 4, 64: 8}, stages=3),
    90: Skinny(rows=128, num_warps={16: 4, 32: 4, 64: 8}, stages=4),
    100: Skinny(rows=128, num_warps={16: 4, 32: 4, 64: 4}, stages=4),
    120: Skinny(rows=128, num_warps={16: 4, 32: 4, 64: 8}, stages=3),
}
_NARROW = {
    80: Narrow(rows=128, num_warps=4, stages=4),
    86: Narrow(rows=128, num_warps=4, stages=3),
    89: Narrow(rows=128, num_warps=4, stages=3),
    90: Narrow(rows=128, num_warps=4, stages=4),
    100: Narrow(rows=128, num_warps=4, stages=4),
    120: Narrow(rows=128, num_warps=4, stages=3),
}
_BACKWARD = {
    80: Backward(columns=128, rows=32, num_warps=4, stages=3),
    86: Backward(columns=128, rows=32, num_warps=4, stages=3),
    89: Backward(columns=128, rows=32, num_warps=4, stages=3),
    90: Backward(columns=128, rows=64, num_warps=4, stages=3),
    100: Backward(columns=128, rows=64, num_warps=4, stages=3),
    120: Backward(columns=128, rows=32, num_warps=4, stages=3),
}


def family(capability: int) -> int:
    """The listed GPU family that `capability` is served by: itself, or the nearest older one."""
    return max((known for known in FAMILIES if known <= capability), default=FAMILIES[0])


def dequantize(capability: int) -> Dequantize:
    """The row for dequantize.py."""
    return _DEQUANTIZE[family(capability)]


def vector(capability: int) -> Vector:
    """The row for the matrix-vector product."""
    return _VECTOR[family(capability)]


def skinny(capability: int) -> Skinny:
    """The row for the skinny product."""
    return _SKINNY[family(capability)]


def narrow(capability: int) -> Narrow:
    """The row for the product of 1 to 16 rows."""
    return _NARROW[family(capability)]


def backward(capability: int) -> Backward:
    """The row for dx = dy W."""
    return _BACKWARD[family(capability)]


def rank_tile(rank: int, most: int) -> int:
    """How much of a rank is multiplied at once: 16 (the tensor cores' least), 32 ... `most`."""
    return min(most, 1 << max(4, (rank - 1).bit_length()))


def crossover(capability: int, dtype: torch.dtype) -> int:
    """The largest M for which the fused product is used.

    A float32 product has no tensor-core instruction of full precision, so there it is 1.
    """
    return 1 if dtype == torch.float32 else CROSSOVER[family(capability)]


def waves(capability: int, rows: int, columns: int) -> int:
    """How often all multiprocessors work on a tile of cuBLAS, until (rows, columns) are done."""
    tiles = -(-rows // PRODUCT_TILE[0]) * -(-columns // PRODUCT_TILE[1])
    return -(-tiles // MULTIPROCESSORS[family(capability)])


def splits(capability: int, tiles: int, steps: int) -> int:
    """Into how many programs each output tile's sum is split: a power of two.

    Enough that the programs fill the GPU twice, at most 16, and never more than there are steps.
    """
    wanted = 2 * MULTIPROCESSORS[family(capability)]
    count = 1
    while count < 16 and 2 * count <= steps and tiles * count < wanted:
        count *= 2
    return count
