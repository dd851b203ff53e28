"""A quantized Linear as torch.compile sees it: one operator, whatever the format.

    y  = frozen_linear(x, bias, tensors, format, sizes)        (..., in) -> (..., out)
    dx = frozen_linear_dx(dy, tensors, format, sizes)          (..., out) -> (..., in)

The compiler cannot look into what `QuantizedLinear` does by itself: a scratch buffer per thread, a
memory of what it holds, columns that are chosen by their values. As an operator with a fake twin
(shapes only) and a gradient it is one node of the graph, so `torch.compile(fullgraph=True)` passes
through, as through bitsandbytes' Linear4bit; and as the operator runs the same code, outputs and
gradients have the bits that they have without the compiler.

A weight goes in as plain values: its tensors in the order of `QuantizedTensor.tensors`, its format,
and its sizes (block_size, or 0; then its shape). Layers of one size then share one compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorax.backend import uses_triton
from lorax.quant import affine, int8, ops
from lorax.quant.double import NestedScales
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.scratch import dequantize_into_scratch
from lorax.quant.tensor import QuantizedTensor


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b for a compiler to trace; gradients for x, and for a bias that is trained."""
    sizes = [getattr(weight, "block_size", 0), *weight.shape]
    y: Tensor = frozen_linear(x, bias, list(weight.tensors()), weight.format, sizes)
    return y


def rebuilt(
    tensors: Sequence[Tensor], format: str, sizes: Sequence[int], dtype: torch.dtype
) -> QuantizedTensor:
    """The weight from its values; see above."""
    block_size, shape = sizes[0], torch.Size(sizes[1:])
    first, scales, *more = tensors
    if format == int8.FORMAT:
        return int8.Int8Tensor(first, scales, dtype)
    if format in affine.FORMATS:
        zeros = more[0] if more else None
        bits = int(format[3])
        return affine.AffineTensor(first, scales, zeros, bits, block_size, shape, dtype)
    nested = NestedScales(*more) if more else None
    kind = format.removesuffix("-dq")
    return FourBitTensor(first, scales, shape, dtype, block_size, nested, kind)


@torch.library.custom_op("lorax::frozen_linear", mutates_args=())
def frozen_linear(
    x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], format: str, sizes: Sequence[int]
) -> Tensor:
    """(..., in) -> (..., out) in x's dtype; see the module."""
    weight = rebuilt(tensors, format, sizes, x.dtype)
    packed = weight.operands() if uses_triton(x) else None
    if packed is None:
        return weight.linear(x, bias)
    return ops.matmul_4bit(x, bias, packed)


@frozen_linear.register_fake
def _(
    x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], format: str, sizes: Sequence[int]
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[1])


@torch.library.custom_op("lorax::frozen_linear_dx", mutates_args=())
def frozen_linear_dx(
    dy: Tensor, tensors: Sequence[Tensor], format: str, sizes: Sequence[int]
) -> Tensor:
    """(..., out) -> (..., in): dy W; see the module."""
    weight = rebuilt(tensors, format, sizes, dy.dtype)
    packed = weight.operands() if uses_triton(dy) else None
    if packed is not None:
        dx: Tensor = ops._matmul_dx(dy, *packed)
        return dx
    return dy @ dequantize_into_scratch(weight, dy.dtype)


@frozen_linear_dx.register_fake
def _(dy: Tensor, tensors: Sequence[Tensor], format: str, sizes: Sequence[int]) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], sizes[2])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, tensors, ctx.format, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = frozen_linear_dx(dy, list(ctx.saved_tensors), ctx.format, ctx.sizes)
    if ctx.needs_input_grad[1]:
        dbias = dy.flatten(0, -2).sum(0)
    return dx, dbias, [None] * len(ctx.saved_tensors), None, None


frozen_linear.register_autograd(_gradients, setup_context=_keep_weight)
