"""`lorax.quantize`: a tensor into any format by its name (names.py has the table of names).

Whoever needs every format imports this file: with it all subclasses of QuantizedTensor are there.
"""

from typing import Any

from torch import Tensor, nn

from lorax.errors import QuantizationError
from lorax.quant import affine, four_bit, int8, names
from lorax.quant.checks import check_block_size
from lorax.quant.linear import QuantizedLinear
from lorax.quant.tensor import QuantizedTensor


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
        format: "nf4", "nf4-dq", "fp4", "fp4-dq", a registered codebook's name with or without
            "-dq", "int8", "int8-symmetric", "int8-affine", "int4-symmetric" or "int4-affine".
        block_size: values that share a scale: a power of two from 32 to 4096, by default 64; not
            for "int8", whose scales belong to rows.
        name: what messages call the tensor.
        options: what the format's own `quantize` takes besides.

    Raises:
        QuantizationError: an unknown format or block size, a dtype that is no float, or a value
            that is not finite (with how many there are, and where the first one stands).
    """
    check_request(format, block_size, name)
    if format == names.INT8:
        return int8.quantize(weight, name=name, **options)
    home = affine if format in names.AFFINE else four_bit
    return home.quantize(weight, format, block_size or 64, name=name, **options)


def check_request(format: str, block_size: int | None = None, name: str = "weight") -> None:
    """Refuse a format or block size that does not exist, before anything is computed."""
    known = names.formats()
    if format not in known:
        raise QuantizationError(f"{name}: format {format!r} is unknown; expected one of {known}")
    if block_size is None:
        return
    if format == names.INT8:
        raise QuantizationError(f"{name}: format 'int8' uses per-row scales; remove block_size")
    check_block_size(block_size, name)


def stored_format(model: nn.Module) -> str | None:
    """The format of the model's first QuantizedLinear, or None."""
    found = (m.quantized.format for m in model.modules() if isinstance(m, QuantizedLinear))
    return next(found, None)
