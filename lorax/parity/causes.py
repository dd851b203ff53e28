"""Why two sides part, where that is known, and which of them is right.

Each function looks at one kind of part and gives a sentence, or "" where it knows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

NEAR = 1e-4  # a ratio is recognized up to this

UNEXPECTED = "PEFT ignores a file's tensors that it has no place for; lorax refuses the file"
NOT_FINITE = "PEFT loads values that are not finite without a word; lorax refuses them"
PATTERNS = (
    "keys of rank_pattern or alpha_pattern overlap here: the first in the file's order counts, and "
    "PEFT sorts the keys when it saves, so that another one may win after it"
)
REQUANTIZED = (
    "PEFT's merge quantizes the merged weight again and loses {lost:.0%} of the adapter's effect "
    "here; lorax merges into the dequantized weight and loses none. Held against each other: "
    "lorax's merged weight, quantized again as well"
)
NESTED = (
    "bitsandbytes' CPU code looks the scales' 8-bit codes up in a rounded table, and {count} of "
    "{all} are not the nearest; lorax takes the nearest"
)
AVX512 = (
    "the bytes and scales are equal, so the values must be: bitsandbytes' AVX-512 decoder is wrong "
    "where rows ({width}) are no multiple of the block ({block}). lorax, code times scale, is right"
)


def of_tensors(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str, file: Tensor | None
) -> str:
    """Why a tensor of an adapter differs.

    mine, theirs: the module's tensors by their short names; name: the one that differs; file: what
    the adapter's file holds, if it is known.
    """
    one, other = mine[name], theirs[name]
    said = _swapped(mine, theirs, name) or _count(one, other)
    if file is None:
        return said
    equal = [who for who, t in (("lorax", one), ("PEFT", other)) if torch.equal(t, file.to(t))]
    right = (
        f"{equal[0]} has the file's bytes" if len(equal) == 1 else "neither has the file's bytes"
    )
    return f"{said}; {right}"


def _swapped(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str) -> str:
    twins = {"lora_A.weight": "lora_B.weight", "lora_B.weight": "lora_A.weight"}
    twin = mine.get(twins.get(name, ""))
    if twin is None:
        return ""
    found = theirs[name]
    for turned, how in ((twin, ""), (twin.t(), ", transposed")):
        if turned.shape == found.shape and torch.equal(turned, found):
            return f"A and B of this layer are swapped{how}"
    return ""


def _count(mine: Tensor, theirs: Tensor) -> str:
    differ = mine != theirs
    count = int(differ.sum())
    said = f"{count} of {mine.numel()} values differ{'s' if count == 1 else ''}"
    if count == 1 and mine.dtype == theirs.dtype == torch.float32:
        bits = mine[differ].view(torch.int32) ^ theirs[differ].view(torch.int32)
        flipped = (int(bits.item()) & 0xFFFFFFFF).bit_count()
        said += f", by {flipped} bit{'' if flipped == 1 else 's'}"
    return said


def of_scaling(mine: float, theirs: float, rank: int | None, overlapping: bool) -> str:
    """Why the factor differs: rsLoRA, or another alpha or rank."""
    if overlapping:
        return PATTERNS
    ratio = theirs / mine if mine else math.inf
    for side, share in (("PEFT", ratio), ("lorax", 1 / ratio if ratio else math.inf)):
        if rank and rank > 1 and abs(share - math.sqrt(rank)) <= NEAR * share:
            return (
                f"{side} has alpha / sqrt({rank}) where the other has alpha / {rank}: use_rslora "
                "is in force there only (or lora_alpha is another)"
            )
    return f"another lora_alpha or r: {theirs:g} in PEFT is {ratio:.6g} times lorax's {mine:g}"


def of_base(mine: Tensor, theirs: Tensor, others: int, all_tensors: int) -> str:
    """Why a weight of the base differs: turned, or another base."""
    if mine.dim() == 2 and mine.shape == theirs.t().shape and torch.equal(mine, theirs.t()):
        return "the weight is transposed: GPT-2's Conv1D holds (in, out), everything else (out, in)"
    return f"another base: {others} of its {all_tensors} tensors differ"


def of_weights(mine: Tensor, theirs: Tensor, base: Tensor) -> str:
    """Why effective weights differ: one path is the other's multiple, or lies transposed."""
    one, other = (t.double() - base.double() for t in (mine, theirs))
    size = one.square().sum().item()
    if not size:
        return ""
    ratio = (one * other).sum().item() / size
    if (other - ratio * one).norm().item() <= NEAR * other.norm().item():
        return f"PEFT's path is {ratio:.6g} times lorax's"
    if one.shape == other.t().shape and torch.allclose(one.t(), other, rtol=NEAR):
        return "PEFT's path is lorax's transposed"
    return ""
