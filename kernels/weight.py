"""PackedWeight: the tensors of a 4-bit weight, an argument of every function of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class PackedWeight(NamedTuple):
    """A weight in four bits a value; plain tensors, no behaviour.

    packed: (ceil(n / 2),) uint8, the earlier code in the high nibble.
    absmax: (blocks,) float32, or uint8 together with the three nested tensors.
    code: (16,) float32, the value of each code: NF4's, FP4's or any other.
    shape: of the weight; (N, K) for a product.
    block_size: values of the flat weight that share a scale, a power of two from 32 to 4096.
    nested_absmax: (ceil(blocks / 256),) float32; nested_map: (256,) float32; nested_offset: ()
        float32. With them, absmax = nested_map[absmax] * nested_absmax + nested_offset.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, ...]
    block_size: int
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    nested_offset: Tensor | None = None


PATH_WIDTHS = 16


def path_width(ranks: Sequence[int]) -> int:
    """How wide the low-rank paths of a group are together: the ranks' sum, rounded up to 16."""
    return -(-sum(ranks) // PATH_WIDTHS) * PATH_WIDTHS


def go_together(weights: Sequence[PackedWeight]) -> bool:
    """Whether one launch decodes these weights: of one format, with whole blocks in each row."""
    first = weights[0]
    return all(
        len(w.shape) == 2
        and w.shape[1] == first.shape[1]
        and w.shape[1] % w.block_size == 0
        and w.block_size == first.block_size
        and (w.nested_absmax is None) == (first.nested_absmax is None)
        and w.code is first.code
        and w.nested_map is first.nested_map
        for w in weights
    )
