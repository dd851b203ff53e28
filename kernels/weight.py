"""PackedWeight: the tensors of a 4-bit weight, an argument of every function of this package."""

from __future__ import annotations

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
