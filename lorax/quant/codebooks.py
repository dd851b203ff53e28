"""The table of 4-bit codebooks: the 16 values that the codes 0 ... 15 stand for.

Every part of lorax that needs a codebook reads this table; `lorax.register_codebook` (register.py)
adds an entry. Values lie in [-1, 1]: blockwise.py divides a block by its largest magnitude first.

**NF4** (NormalFloat, Dettmers et al. 2023, arXiv:2305.14314, section 3). Trained weights are nearly
normal, so a good 4-bit code puts its 16 values where equal shares of a normal distribution lie. Two
changes to that idea make it practical. Zero must be exact (padding, pruned weights), so the two
sides are built apart: 8 values above zero, 7 below, and zero itself. And the outermost quantile
would be infinite, so the scale begins at

    offset = 1/2 ((1 - 1/32) + (1 - 1/30)) = 0.9677083

the mean of the last bins' centres of a 16-value and a 15-value side. Divided by the largest, the
values span [-1, 1]. The 16 numbers are bitsandbytes' constants: float32 of that derivation.

**FP4** is a floating-point number of one sign, two exponent and one mantissa bits, divided by its
largest value, 12. Its values stand in the order of their bits, not of their size, and there are two
zeros, 0000 and 1000: what is just above zero becomes the second one, and comes back as the first.

    code     0    1      2     3    4    5    6    7     8 ... 15
    value    0  .0052  .667    1  .333  .5  .167  .25    the same, negative
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lorax.errors import QuantizationError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Codebook:
    """A codebook.

    values: 16 floats in [-1, 1], stored as float32; values[code], in any order.
    source: the paper or program that defines the values.
    bitsandbytes: the `quant_type` in bitsandbytes' files; None if it has no such codebook.
    """

    name: str
    values: tuple[float, ...]
    source: str
    bitsandbytes: str | None = None


NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_MAGNITUDES = tuple(x / 12 for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4_VALUES = (*_FP4_MAGNITUDES, *(0.0 - x for x in _FP4_MAGNITUDES))

CODEBOOKS = {  # plain floats, so that recipes and help texts can read it without torch
    "nf4": Codebook("nf4", NF4_VALUES, "QLoRA, arXiv:2305.14314", "nf4"),
    "fp4": Codebook("fp4", FP4_VALUES, "bitsandbytes, E2M1 divided by 12", "fp4"),
}


def find(name: str) -> Codebook:
    """The codebook of that name; a QuantizationError lists the known ones if there is none."""
    if name not in CODEBOOKS:
        raise QuantizationError(
            f"codebook {name!r} is unknown; expected one of {tuple(CODEBOOKS)}, "
            f"or lorax.register_codebook({name!r}, values) first"
        )
    return CODEBOOKS[name]


def formats(bitsandbytes: bool = False) -> tuple[str, ...]:
    """Format names, two per codebook: "nf4", "nf4-dq", ...; optionally only bitsandbytes' own."""
    entries = [c for c in CODEBOOKS.values() if c.bitsandbytes or not bitsandbytes]
    return tuple(f"{entry.name}{second}" for entry in entries for second in ("", "-dq"))


@cache
def four_bit(name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The values of a codebook: (16,) float32 on `device`, cached; do not write to it."""
    import torch

    return torch.tensor(find(name).values, dtype=torch.float32, device=device)
