"""Register a codebook of one's own, from any file, with one call:

    lorax.register_codebook("sym4", [(2 * code - 15) / 15 for code in range(16)])

From then on "sym4" and "sym4-dq" are formats like any other in this process: in `lorax.quantize`,
recipes, help texts, checkpoints and on every device. Values are checked here, once, so that the
decoders can rely on them.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from itertools import pairwise

from lorax.errors import QuantizationError
from lorax.quant import codebooks
from lorax.quant.codebooks import Codebook

RESERVED = re.compile(r"int\d*|none|auto|original")  # names that already mean another format


def register_codebook(name: str, values: Iterable[float], source: str = "") -> None:
    """Add a codebook: `name` and `name`-dq become formats of lorax in this process.

    Args:
        name: lower-case letters, digits and "_", a letter first.
        values: the 16 values of the codes 0 ... 15, in [-1, 1] and in any order. Zero need not be
            among them; an all-zero block comes back as zeros all the same.
        source: the paper or program that the values come from; documentation only.

    Registering the same name with the same values again changes nothing.

    Raises:
        QuantizationError: the name is invalid or taken by other values, or the values are not a
            codebook: not 16, outside [-1, 1], or too close together for nearest.py.
    """
    found = tuple(_float32(value) for value in values)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or RESERVED.fullmatch(name):
        raise QuantizationError(
            f"codebook {name!r}: expected a name of lower-case letters, digits and '_', "
            "a letter first, and none of int8, int4, none, auto, original"
        )
    _check_values(name, found)
    known = codebooks.CODEBOOKS.setdefault(name, Codebook(name, found, source))
    if tuple(map(_float32, known.values)) != found:
        raise QuantizationError(f"codebook {name!r} is there with other values; take another name")


def _float32(value: float) -> float:
    """The value rounded to float32; infinity if it overflows."""
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
