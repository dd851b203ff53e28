"""How far two tensors are apart, and how far they may be.

What is read from a file must be equal to the bit. What is computed in float32 may differ by
rounding, u = 2^-24 of a value each time. Each quantity is held to a relative RMS,
||mine - theirs|| / ||theirs||, and each bound says where it comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = "read from the files, nothing is rounded: equal to the bit"
DECODED = (
    "decoded from the same 4-bit codes, rounded once: equal to the bit, but for the sign of FP4's "
    "second zero, which differs between bitsandbytes' own decoders"
)
SCALING = "one division in float64"
WEIGHT = (
    "r products summed in another order (1e-5 of the adapter's own effect), and four roundings a "
    "side of the whole weight"
)
REQUANTIZED = (
    "both merged weights in the base's 4 bits again: one rounding can push one value over a step"
)
NESTED = (
    "both quantizers' scales, decoded: bitsandbytes' table of second-level codes is rounded, which "
    "moves one scale in some hundreds by one step of the map"
)
COMPUTED = (
    "the same sums in another order, 170 roundings of 2^-24; measured through SmolLM2's 30 layers: "
    "outputs equal to the bit, gradients within 2e-6"
)
COMPUTED_BOUND = 1e-5
GRADIENT = (
    "as outputs; and eight roundings of the largest gradient, for a gradient that is zero but for "
    "cancellation (attention over tokens that are all the same) is nothing but noise"
)
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class Difference:
    """mine - theirs, measured in float64.

    equal: every bit is (so that -0 is not 0). max and rms are in the tensor's unit; relative is
    ||mine - theirs|| / ||theirs|| (infinite where theirs is zero and mine is not); ulps counts the
    floats between the two that are farthest apart, None where there is no such count.
    """

    equal: bool
    max: float
    rms: float
    relative: float
    ulps: int | None


SAME = Difference(True, 0.0, 0.0, 0.0, 0)


def difference(mine: Tensor, theirs: Tensor) -> Difference:
    """Measure two tensors of one shape; a NaN on one side makes every number infinite."""
    if mine.dtype == theirs.dtype and torch.equal(_bytes(mine), _bytes(theirs)):
        return SAME
    gap = (mine.double() - theirs.double()).abs()
    if not gap.isfinite().all():
        return Difference(False, math.inf, math.inf, math.inf, None)
    size, norm = theirs.double().norm().item(), gap.norm().item()
    relative = norm / size if size else (math.inf if norm else 0.0)
    rms = norm / math.sqrt(max(1, gap.numel()))
    largest = gap.max().item() if gap.numel() else 0.0
    return Difference(False, largest, rms, relative, _ulps(mine, theirs))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _ulps(mine: Tensor, theirs: Tensor) -> int | None:
    """The largest number of floats from one to the other; -0 and 0 are one."""
    kind = _INTEGERS.get(mine.dtype)
    if kind is None or mine.dtype != theirs.dtype:
        return None
    steps = []
    for tensor in (mine, theirs):
        bits = tensor.contiguous().view(kind).long()
        magnitude = bits & torch.iinfo(kind).max
        steps.append(torch.where(bits < 0, -magnitude, magnitude))
    return int((steps[0] - steps[1]).abs().max())


def gradient_bound(theirs: Tensor, largest: float) -> float:
    """(1e-5 ||g|| + 8 u G) / ||g||, G being the largest norm of any of the gradients."""
    size = theirs.double().norm().item()
    noise = 4 * torch.finfo(torch.float32).eps * largest
    return COMPUTED_BOUND + (noise / size if size else 0.0)


def weight_bound(mine: Tensor, base: Tensor) -> float:
    """For effective and merged weights W + D: (1e-5 ||D|| + 8 u ||W + D||) / ||W + D||.

    u is half the distance from 1 to the next number of `mine`'s dtype. So a wrong factor on a
    small adapter is not lost in the size of the base.
    """
    size = mine.double().norm().item()
    effect = (mine.double() - base.double()).norm().item()
    return 4 * torch.finfo(mine.dtype).eps + (1e-5 * effect / size if size else 0.0)
