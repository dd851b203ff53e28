"""The four-bit decoder to bfloat16 on a CPU, compiled: for those who have a C++ compiler.

    with lorax.backend.backend("compiled"): ...       or LORAX_KERNELS=compiled

torch.compile makes one loop over the blocks of what stands here. It vectorizes neither look-ups nor
shuffles of bytes; but to choose one of 16 constants by the 4 bits of a code takes 15 selections of
whole vectors:

    8 pairs by bit 0, of the results 4 by bit 1, 2 by bit 2, 1 by bit 3

A byte's two values fill one int32 of the output, so whole vectors are written, in order; rounding
to bfloat16 is integer arithmetic, to even. The result is that of the other decoder, bit for bit, in
about 0.7 of its time. The first call takes some ten seconds, in a later process three (torch keeps
what it compiled in a cache on the disk). Other dtypes are left to the other decoder: for float32
two values make an int64, which inductor does not vectorize.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from lorax.errors import EnvironmentProblem
from lorax.quant import codebooks


def decode_into(
    out: Tensor, packed: Tensor, scales: Tensor, block_size: int, quant_type: str
) -> int:
    """Decode as many whole blocks as there are.

    Args:
        out: (n,) contiguous, on a CPU.
        packed: (ceil(n / 2),) uint8.
        scales: (ceil(n / block_size),) float32.
        block_size: values that share a scale.
        quant_type: the codebook's name, looked up in the table of codebooks.

    Returns:
        How many values, from the first, are decoded; none unless `out` is bfloat16.

    Raises:
        EnvironmentProblem: torch cannot compile here.
        QuantizationError: there is no codebook of that name.
    """
    blocks = out.numel() // block_size
    if out.dtype != torch.bfloat16 or not blocks:
        return 0
    done = blocks * block_size
    words = out[:done].view(torch.int32).view(blocks, block_size // 2)
    rows = packed[: done // 2].view(blocks, block_size // 2), scales[:blocks, None], words
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    try:
        _compiled(quant_type)(*rows)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EnvironmentProblem(
            f"LORAX_KERNELS=compiled: torch.compile does not work here ({reason}); it needs a C++ "
            "compiler and OpenMP. Leave it out for the decoder that needs nothing"
        ) from None
    return done


@cache
def _compiled(quant_type: str) -> Callable[[Tensor, Tensor, Tensor], None]:
    entries = codebooks.four_bit(quant_type).tolist()

    def decode(packed: Tensor, scales: Tensor, words: Tensor) -> None:
        words.copy_(_decoded(entries, packed, scales))

    # A code object of its own for each codebook: torch makes a symbol of every constant that
    # differs from one call of the same code to the next, and inductor then vectorizes nothing.
    code = decode.__code__.replace(co_name=f"decode_{quant_type}")
    own = FunctionType(code, globals(), code.co_name, None, decode.__closure__)
    return torch.compile(own, fullgraph=True)


def _decoded(entries: list[float], packed: Tensor, scales: Tensor) -> Tensor:
    """Each byte's two values as one int32, the first one lower."""
    codes = packed.to(torch.int32)
    first = _rounded(_choose(entries, codes >> 4) * scales)
    second = _rounded(_choose(entries, codes & 15) * scales)
    return ((first >> 16) & 0xFFFF) | (second & -0x10000)


def _choose(entries: list[float], codes: Tensor) -> Tensor:
    """entries[code] by the code's bits, the lowest first: float32."""
    found: list[float | Tensor] = list(entries)
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        pairs = zip(found[::2], found[1::2], strict=True)
        found = [torch.where(is_set, upper, lower) for lower, upper in pairs]
    assert isinstance(found[0], Tensor)
    return found[0]


def _rounded(x: Tensor) -> Tensor:
    """float32 as int32 whose upper half is x in bfloat16."""
    bits = x.view(torch.int32)
    return bits + 0x7FFF + ((bits >> 16) & 1)
