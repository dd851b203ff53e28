"""Quantized weights without memory, and what must be computed before there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from lorax.inspect.estimate.setting import Setting
from lorax.quant import codebooks, names
from lorax.quant.affine import AffineTensor
from lorax.quant.decode import code_values
from lorax.quant.double import NESTED_BLOCK_SIZE, NestedScales
from lorax.quant.dynamic_map import dynamic_map
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.int8 import Int8Tensor
from lorax.quant.tensor import QuantizedTensor
from lorax.training.fast import products

BLOCK = 64  # weights that share a scale


def prepare(setting: Setting) -> None:
    """Fill the caches of tables and of what the CPU offers, which must not hold blank tensors."""
    products.prefers_onednn()
    products.has_bfloat16()
    dynamic_map(device=torch.device("cpu"))  # called as double.py does: the cache tells them apart
    for codebook in codebooks.CODEBOOKS:
        code_values(torch.zeros(1, dtype=torch.uint8), codebook)


def blank_weight(format: str, weight: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """A tensor of that format in a weight's shape (out, in), its parts as `torch.empty` makes them.

    dtype: what it was quantized from.
    """
    rows, columns = weight.shape
    values, blocks = rows * columns, -(-rows * columns // BLOCK)
    if format == names.INT8:
        codes = torch.empty(rows, columns, dtype=torch.int8)
        return Int8Tensor(codes, torch.empty(rows), dtype)
    if format in names.AFFINE:
        bits = 8 if format.startswith("int8") else 4
        codes = torch.empty(values if bits == 8 else -(-values // 2)).to(
            torch.int8 if bits == 8 else torch.uint8
        )
        zeros = torch.empty(blocks, dtype=torch.int8) if format.endswith("affine") else None
        return AffineTensor(codes, torch.empty(blocks), zeros, bits, BLOCK, weight.shape, dtype)
    packed = torch.empty(-(-values // 2), dtype=torch.uint8)
    codebook = format.removesuffix("-dq")
    plain = (weight.shape, dtype, BLOCK)
    if codebook == format:
        return FourBitTensor(packed, torch.empty(blocks), *plain, None, codebook)
    absmax = torch.empty(blocks, dtype=torch.uint8)
    nested = NestedScales(torch.empty(-(-blocks // NESTED_BLOCK_SIZE)), torch.empty(()))
    return FourBitTensor(packed, absmax, *plain, nested, codebook)
