"""Four-bit codes to 16-bit values in registers, by byte permutations: no memory, no table look-up.

PRMT takes 8 bytes in two registers and picks four of them by four 3-bit numbers. A table of 16
values of 16 bits is four registers of upper bytes and four of lower ones; so for four codes at once

    lower half of the table, upper half      PRMT by the codes' low 3 bits, twice
    which of the two, by each code's bit 3   PRMT by (place + 4 * bit 3)

three for the upper bytes and three for the lower, then two that put the bytes of a value together.
Two neighbouring words of the weight are decoded side by side: a register then holds the same place
of both, as a tensor core's left operand wants two neighbours of the sum. In all 46 instructions for
16 values, and no bank of shared memory is asked.

A word holds eight codes; its nibble n, from the lowest, is value n ^ 1 of the eight: a byte has the
earlier code in its upper half. So eight planes come out, one a nibble. Each is an expression of its
own, with one operand and one result and the table in its text: so Triton moves the words, and not
the values, to where the tensor core reads them; what the eight share, ptxas computes once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Table = tuple[int, ...]  # upper bytes of entries 0-3, 4-7, 8-11 and 12-15, then the lower ones
_texts = WeakIdKeyDictionary()  # of the codes that have been used, by dtype


def texts_of(code: Tensor, dtype: torch.dtype) -> tuple[str, ...]:
    """`plane_text` of each nibble for a code in `dtype`; the first call reads the code back."""
    known: dict[torch.dtype, tuple[str, ...]] = _texts.setdefault(code, {})
    if dtype not in known:
        table = table_of(code, dtype)
        known[dtype] = tuple(plane_text(nibble, table) for nibble in range(8))
    return known[dtype]


def table_of(code: Tensor, dtype: torch.dtype) -> Table:
    """The bytes of the code's 16 values, rounded to `dtype`."""
    values = code.detach().cpu().to(dtype).view(torch.int16).tolist()

    def word(at: int, shift: int) -> int:
        return sum(((v >> shift) & 255) << 8 * i for i, v in enumerate(values[at : at + 4]))

    return tuple(word(at, shift) for shift in (8, 0) for at in (0, 4, 8, 12))


def plane_text(nibble: int, table: Table) -> str:
    """PTX: one plane of the words $1 and $2, as two 16-bit values, into $0.

    z is zero, as the grid has no third dimension, but ptxas does not know: else it would put each
    number of the table into a register anew, at every use (7.7 instructions a value, not 6.8).
    """
    lines = ["{", ".reg .b32 t, s, q, a, b, c, z, h<8>;", "mov.u32 z, %ctaid.z;"]
    lines += [f"or.b32 h{i}, z, {number};" for i, number in enumerate(table)]
    if nibble % 2:
        lines += ["shr.u32 t, $1, 4;", "lop3.b32 t, t, $2, 0x0F0F0F0F, 0xE4;"]
    else:
        lines += ["shl.b32 t, $2, 4;", "lop3.b32 t, $1, t, 0x0F0F0F0F, 0xE4;"]
    lines += [
        "and.b32 s, t, 0x77777777;",
        "shr.u32 q, t, 1;",
        "and.b32 q, q, 0x44444444;",
        "or.b32 q, q, 0x32103210;",
    ]
    if nibble >= 4:  # the upper half of the selectors
        lines += ["shr.u32 s, s, 16;", "shr.u32 q, q, 16;"]
    for to, h in (("a", 0), ("c", 4)):
        lines += [
            f"prmt.b32 {to}, h{h}, h{h + 1}, s;",
            f"prmt.b32 b, h{h + 2}, h{h + 3}, s;",
            f"prmt.b32 {to}, {to}, b, q;",
        ]
    lines += [f"prmt.b32 $0, c, a, {0x7362 if nibble % 4 >= 2 else 0x5140};", "}"]
    return "\n".join(lines)


@triton.jit
def plane(words, TEXT: tl.constexpr, DTYPE: tl.constexpr):
    """One plane of words (..., an even number of words), in their shape; TEXT: its PTX."""
    bits = tl.inline_asm_elementwise(TEXT, "=r,r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def plane_by_look_up(words, code, nibble: tl.constexpr, DTYPE: tl.constexpr):
    """The same by loads: for the interpreter, which runs no assembly."""
    return tl.load(code + ((words >> (4 * nibble)) & 15)).to(DTYPE)
