"""The dynamic 8-bit map (Dettmers et al. 2022, arXiv:2110.02861): 256 values over seven decades.

It stores what spans orders of magnitude: the scales in double quantization, Adam's moments. The
place of the first set bit behind the sign is a decimal exponent; the bits behind it are a linear
fraction. Large values get six bits of fraction, small ones seven decades. What is never negative,
as Adam's second moment, takes the unsigned map: the sign's bit goes to the fraction, so every
decade has twice the magnitudes.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def dynamic_map(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """The map, ascending: (256,) float32, as bitsandbytes builds it.

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
    values = torch.cat([*negative, torch.tensor([0.0, 1.0]), magnitudes]).sort().values
    return values.to(device)
