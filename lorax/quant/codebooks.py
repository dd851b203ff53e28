"""The tables behind the codes: where their values come from.

**NF4** (NormalFloat, Dettmers et al. 2023, arXiv:2305.14314, section 3). Trained weights are nearly
normal, so a good 4-bit code puts its 16 values where equal shares of a normal distribution lie. Two
changes to that idea make it practical. Zero must be exact (padding, pruned weights), so the two
sides are built apart: 8 values above zero, 7 below, and zero itself. And the outermost quantile
would be infinite, so the scale begins at

    offset = 1/2 ((1 - 1/32) + (1 - 1/30)) = 0.9677083

the mean of the last bins' centres of a 16-value and a 15-value side. Divided by the largest, the
values span [-1, 1], and a block is scaled by its absolute maximum to fit.

    code     0     1     2     3     4     5     6    7    8    9   ...   15
    value   -1 -.696 -.525 -.395 -.284 -.185 -.091   0  .080 .161  ...    1

**FP4** is a floating-point number of one sign, two exponent and one mantissa bits, divided by its
largest value, 12. Its values stand in the order of their bits, not of their size, and there are two
zeros, 0000 and 1000: what is just above zero becomes the second one, and comes back as the first.

    code     0    1      2     3    4    5    6    7     8 ... 15
    value    0  .0052  .667    1  .333  .5  .167  .25    the same, negative

**The dynamic 8-bit map** (Dettmers et al. 2022, arXiv:2110.02861) stores the scales themselves in
double quantization. The place of the first set bit behind the sign is a decimal exponent; the bits
behind it are a linear fraction. Large values get six bits of fraction, small ones seven decades.
What is never negative, as Adam's second moment, takes the unsigned map: the sign's bit goes to the
fraction, so every decade has twice the magnitudes.
"""

from functools import cache

import torch
from torch import Tensor

# bitsandbytes' constants, the standard's real definition: float32 of the derivation below.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def derive_nf4(offset: float = 0.9677083) -> Tensor:
    """Derive the 16 NF4 values from the normal distribution's quantiles: (16,) float64, ascending.

    `offset` is the outermost probability, printed with seven digits in the QLoRA code.
    """

    def side(count: int) -> Tensor:
        probabilities = torch.linspace(offset, 0.5, count + 1)[:-1]
        return torch.special.ndtri(probabilities.double())

    values = torch.cat([-side(7), torch.zeros(1, dtype=torch.float64), side(8)])
    return (values / values.max()).sort().values


@cache
def nf4() -> Tensor:
    """The NF4 values, ascending: (16,) float32."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32)


@cache
def fp4() -> Tensor:
    """The FP4 values in the order of their bits: (16,) float32."""
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32) / 12
    return torch.cat([positive, 0.0 - positive])


def four_bit(quant_type: str) -> Tensor:
    """The codebook of that name, "nf4" or "fp4"."""
    return {"nf4": nf4, "fp4": fp4}[quant_type]()


@cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The dynamic 8-bit map, ascending: (256,) float32, as bitsandbytes builds it.

    Decade e in 0 ... 6 holds 2^e magnitudes (unsigned: 2^(e + 1)): the midpoints of as many equal
    parts of [0.1, 1], times 10^(e - 6). With both signs that is 254 values, and unsigned too; 0 and
    1 complete the table (-1 is not in it).
    """
    decades = []
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
        decades.append((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (exponent - 6))
    magnitudes = torch.cat(decades)
    negative = [-magnitudes] if signed else []
    return torch.cat([*negative, torch.tensor([0.0, 1.0]), magnitudes]).sort().values


def midpoints(code: Tensor) -> Tensor:
    """The boundaries between neighbouring values of a `code` (k,), ascending: (k - 1,) float32.

    Computed in float32, as bitsandbytes does: seven of NF4's lie above the exact midpoint.
    """
    ascending = code.sort().values
    return (ascending[:-1] + ascending[1:]) / 2
