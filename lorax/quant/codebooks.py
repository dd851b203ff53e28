"""The table of 4-bit codebooks: the 16 values that the codes 0 ... 15 stand for.

Each codebook is one entry here, and the rest of lorax asks this table: formats, recipes, help
texts, checkpoints, the decoders in PyTorch, C++ and Triton. A researcher adds an entry in a line,

    lorax.register_codebook("sym4", [(2 * code - 15) / 15 for code in range(16)])

and "sym4" and "sym4-dq" are formats like any other. Values lie in [-1, 1], for a block is divided
by its largest magnitude before the nearest value is looked for (blockwise.py).

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

The table needs no torch, so that recipes and help texts can ask it; torch comes with `four_bit`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from lorax.errors import QuantizationError

if TYPE_CHECKING:
    import torch

RESERVED = re.compile(r"int\d*|none|auto|original")  # names that mean something else as a format


@dataclass(frozen=True)
class Codebook:
    """One entry: the value of each code, and where it comes from.

    values: 16 floats in [-1, 1], read as float32, in any order.
    bitsandbytes: its quant_type in bitsandbytes' files; None where those have no such codebook.
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

CODEBOOKS = {
    "nf4": Codebook("nf4", NF4_VALUES, "QLoRA, arXiv:2305.14314", "nf4"),
    "fp4": Codebook("fp4", FP4_VALUES, "bitsandbytes, E2M1 divided by 12", "fp4"),
}


def register_codebook(name: str, values: Iterable[float], source: str = "") -> None:
    """Add a codebook: `name` and `name`-dq become formats of lorax, in this process.

    Args:
        name: lower-case letters, digits and "_", a letter first.
        values: the 16 values of the codes 0 ... 15, in [-1, 1] and in any order. Zero need not be
            among them; an all-zero block comes back as zeros all the same.
        source: where the values come from, for people.

    Raises:
        QuantizationError: a name that is taken or no name, or values that are no codebook.
            The same name with the same values again changes nothing.
    """
    found = tuple(_float32(value) for value in values)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or RESERVED.fullmatch(name):
        raise QuantizationError(
            f"codebook {name!r}: expected a name of lower-case letters, digits and '_', "
            "a letter first, and none of int8, int4, none, auto, original"
        )
    _check_values(name, found)
    if name in CODEBOOKS and tuple(map(_float32, CODEBOOKS[name].values)) != found:
        raise QuantizationError(f"codebook {name!r} is there with other values; take another name")
    CODEBOOKS.setdefault(name, Codebook(name, found, source))


def _float32(value: float) -> float:
    """The value rounded to float32; infinite where it does not fit."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", float(value)))[0])
    except OverflowError:
        return math.inf


def _check_values(name: str, values: tuple[float, ...]) -> None:
    if len(values) != 16 or not all(abs(value) <= 1 for value in values):
        raise QuantizationError(
            f"codebook {name!r}: expected 16 values in [-1, 1], found {len(values)}: {values}"
        )
    # nearest.py tells codes apart by the upper 16 bits of the boundaries between them.
    ascending = sorted(values)
    middles = [(low + high) / 2 for low, high in pairwise(ascending)]
    cells = [struct.pack(">f", middle)[:2] for middle in middles]
    if len(set(cells)) < len(cells):
        raise QuantizationError(
            f"codebook {name!r} is too fine: two boundaries between its values agree in their "
            "upper 16 bits; move the values apart by more than 1 % of their size"
        )


def find(name: str) -> Codebook:
    """The codebook of that name.

    Raises:
        QuantizationError: there is none, with those that there are.
    """
    if name not in CODEBOOKS:
        raise QuantizationError(
            f"codebook {name!r} is unknown; expected one of {tuple(CODEBOOKS)}, "
            f"or lorax.register_codebook({name!r}, values) first"
        )
    return CODEBOOKS[name]


def formats(bitsandbytes: bool = False) -> tuple[str, ...]:
    """The format names of all codebooks, "nf4", "nf4-dq", ...; or of those bitsandbytes has."""
    entries = [c for c in CODEBOOKS.values() if c.bitsandbytes or not bitsandbytes]
    return tuple(f"{entry.name}{second}" for entry in entries for second in ("", "-dq"))


@cache
def four_bit(name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The values of a codebook on a device: (16,) float32, one tensor for all who ask."""
    import torch

    return torch.tensor(find(name).values, dtype=torch.float32, device=device)
