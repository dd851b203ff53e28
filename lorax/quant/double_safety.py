"""Whether a tensor's scales may be quantized: what double quantization costs, row by row.

A tensor keeps float32 scales where the second level would make the RMS of its rows' relative errors
grow by more than 1.05 times, or any one row's more than double. A row whose error stays below 1 %
counts as that, whatever it grew from. (double.py says why there are such tensors.)

The errors are measured in float32, itself up to a thousandth off where they are smallest. MARGIN is
kept clear of both bounds, so that they hold for errors measured exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorax.quant import codebooks
from lorax.quant.decode import code_values
from lorax.quant.four_bit import FourBitTensor

MAX_RMS_GROWTH = 1.05  # of the root mean square of the rows' relative errors
MAX_ROW_GROWTH = 2.0  # of any one row's
MARGIN = 1 - 2**-9
NEGLIGIBLE = 0.01  # a row that errs by less than this is fine, whatever it grew from
CHUNK_ELEMENTS = 2**19

Values = Callable[[int, int], Tensor]

log = logging.getLogger("lorax")


def keeps_float_scales(
    weight: Tensor, plain: FourBitTensor, double: FourBitTensor, finite: bool, name: str
) -> bool:
    """Whether `plain` must be kept instead of `double`; if so, one line in the log says why.

    Args:
        weight: the tensor before quantization.
        plain, double: the same codes with float32 scales and with double-quantized scales.
        finite: whether the weight's values are all finite.
        name: the tensor's name in the log.
    """
    if not finite or _needs_zero_scales(plain):
        reason = "zero or non-finite blocks need exact scales"
    elif not is_safe(weight, _values_of(plain), plain.absmax, double.scales(), plain.block_size):
        reason = "its rows differ too much in scale for double quantization"
    else:
        return False
    log.warning("%s: %s; it keeps float32 scales", name, reason)
    return True


def _needs_zero_scales(plain: FourBitTensor) -> bool:
    """Whether a zero block needs a scale of exactly zero: the codebook has no zero."""
    has_zero = 0.0 in codebooks.find(plain.quant_type).values
    return not has_zero and bool((plain.absmax == 0).any())


def _values_of(plain: FourBitTensor) -> Values:
    """A function (start, stop) -> codebook values of that flat range, float32; start even."""

    def values(start: int, stop: int) -> Tensor:
        packed = plain.packed[start // 2 : (stop + 1) // 2]
        return code_values(packed, plain.quant_type)[: stop - start]

    return values


def is_safe(weight: Tensor, values: Values, one: Tensor, two: Tensor, block_size: int) -> bool:
    """Whether scales `two` serve the weight's rows nearly as well as scales `one`.

    Args:
        weight: (..., columns), the tensor before quantization; a 1-D tensor is one row.
        values: values(start, stop) gives the code values of that flat range, float32; start even.
        one, two: (blocks,) float32 scales.
        block_size: values that share a scale.

    Returns:
        False where the RMS of the rows' relative errors grows by more than 1.05 times, or any
        row's more than doubles (an error below 1 % does not count).
    """
    if weight.numel() == 0 or torch.equal(one, two):
        return True
    columns = weight.shape[-1] if weight.dim() else 1
    before, after = _row_errors(weight.reshape(-1, columns), values, (one, two), block_size)
    rms_before, rms_after = (errors.square().mean().sqrt().item() for errors in (before, after))
    if rms_after > MARGIN * MAX_RMS_GROWTH * max(rms_before, NEGLIGIBLE):
        return False
    return not bool((after > MARGIN * MAX_ROW_GROWTH * before.clamp_min(NEGLIGIBLE)).any())


def _row_errors(
    weight: Tensor, values: Values, scales: tuple[Tensor, ...], block_size: int
) -> list[Tensor]:
    """||back - row|| / ||row|| for each row of weight (rows, columns), under each of the scales.

    With code values c and a scale a, a piece of a row that lies in one block has the squared error
    sum (a c - x)^2 = a^2 sum c^2 - 2 a sum c x + sum x^2. The three sums do not depend on the
    scale, so one pass over the weight serves all scales.
    """
    rows, columns = weight.shape
    piece = math.gcd(columns, block_size)  # such a piece never crosses a row or a block
    step = max(2, CHUNK_ELEMENTS // columns // 2 * 2)
    errors = [torch.empty(rows, device=weight.device) for _ in scales]
    buffer = torch.empty(min(step, rows) * columns // piece, piece, device=weight.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        x = weight[start:stop].float().view(-1, piece)
        c = values(start * columns, stop * columns).view(-1, piece)
        products = buffer[: len(c)]
        cx = torch.mul(c, x, out=products).sum(1)
        xx = torch.mul(x, x, out=products).sum(1)
        cc = c.square_().sum(1)
        first = start * columns // piece
        block = torch.arange(first, first + len(cc), device=weight.device) * piece // block_size
        size = xx.view(stop - start, -1).sum(1)
        for found, scale in zip(errors, scales, strict=True):
            a = scale[block]
            squares = (a * a * cc - 2 * a * cx + xx).view(stop - start, -1).sum(1)
            found[start:stop] = (squares.clamp_min(0) / size).sqrt().nan_to_num(0.0)
    return errors
