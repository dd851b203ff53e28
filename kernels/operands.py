"""What the host functions of the products share: tensors as their kernels take them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels.weight import PackedWeight

Path = tuple[Tensor, Tensor, float]  # h (..., r), up (N, r) and what their product is multiplied by

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def is_fusable(weight: PackedWeight) -> bool:
    """Whether the fused kernels take this weight: (N, K) with whole blocks in each row."""
    return len(weight.shape) == 2 and weight.shape[1] % weight.block_size == 0


def aligned(x: Tensor, alignment: int) -> Tensor:
    """x, contiguous and at an address that is a multiple of `alignment` bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % alignment == 0 else x.clone()


def columns_of(M: int) -> int:
    """How many of M's rows a program takes: the tensor cores' 16, 32 or 64."""
    return min(64, max(16, triton.next_power_of_2(M)))


def weight_arguments(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    """The words, scales, code and nested scales, in the kernels' order."""
    words = aligned(weight.packed.view(-1), 4).view(torch.int32)
    nested = (weight.nested_absmax, weight.nested_map, weight.nested_offset)
    return (words, weight.absmax, weight.code, *nested)


def path_arguments(path: Path | None, M: int) -> tuple[Tensor | None, Tensor | None, float, int]:
    """h (M, r), up (N, r), scaling and r; r = 0 where there is no path."""
    if path is None:
        return None, None, 0.0, 0
    h, up, scaling = path
    return h.reshape(M, h.shape[-1]).contiguous(), up, scaling, up.shape[1]
