"""The formats by name: where `lorax.quantize` and `load_model(quantization=...)` look them up.

    name             bits a weight   what it is                                          its file
    nf4              4.5             quantiles of a normal distribution                  nf4.py
    nf4-dq           4.127           the same, its scales in 8 bits                      nf4.py
    fp4, fp4-dq      4.5, 4.127      a tiny floating-point number                        nf4.py
    int8             8 + 32 / in     LLM.int8: a scale a row, activations in int8 too    llm_int8.py
    int8-symmetric   8.5             equal steps, around zero                            affine.py
    int8-affine      8.625           equal steps, with a zero point                      affine.py
    int4-symmetric   4.5             equal steps, around zero                            affine.py
    int4-affine      4.625           equal steps, with a zero point                      affine.py

(Blocks of 64, where there are blocks.)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant import affine, llm_int8, nf4
from lorax.quant.blockwise import check_block_size
from lorax.quant.tensor import QuantizedTensor

FORMATS = (*nf4.FORMATS, llm_int8.FORMAT, *affine.FORMATS)


def quantize(
    weight: Tensor,
    format: str,
    block_size: int | None = None,
    *,
    name: str = "weight",
    **options: Any,
) -> QuantizedTensor:
    """Quantize a tensor.

    Args:
        weight: float32, float16 or bfloat16; any shape and strides ("int8": a matrix).
        format: one of FORMATS.
        block_size: values that share a scale: a power of two from 32 to 4096, by default 64; not
            for "int8", whose scales belong to rows.
        name: what messages call the tensor.
        options: what the format's own `quantize` takes besides.

    Raises:
        QuantizationError: an unknown format or block size, a dtype that is no float, or a value
            that is not finite (with how many there are, and where the first one stands).
    """
    check_request(format, block_size, name)
    if format == llm_int8.FORMAT:
        return llm_int8.quantize(weight, name=name, **options)
    home = affine if format in affine.FORMATS else nf4
    return home.quantize(weight, format, block_size or 64, name=name, **options)


def check_request(format: str, block_size: int | None = None, name: str = "weight") -> None:
    """Refuse a format or block size that does not exist, before anything is computed."""
    if format not in FORMATS:
        raise QuantizationError(f"{name}: format {format!r} is unknown; expected one of {FORMATS}")
    if block_size is None:
        return
    if format == llm_int8.FORMAT:
        raise QuantizationError(f"{name}: {format} has a scale for each row, and no block_size")
    check_block_size(block_size, name)


def from_state_dict(
    tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """Read a quantized tensor from what its `state_dict` gives.

    Args:
        tensors: with "weight" for the codes.
        dtype: before quantization; asked for "int8" only, whose tensors do not say it.

    Raises:
        QuantizationError: a tensor is missing, of the wrong dtype or size, or of no format.
    """
    if "SCB" in tensors or "weight_format" in tensors:
        return llm_int8.from_state_dict(tensors, dtype)
    if any(name.startswith(affine.STATE) for name in tensors):
        return affine.from_state_dict(tensors)
    return nf4.FourBitTensor.from_state_dict(tensors)
