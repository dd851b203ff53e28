"""The products with a four-bit weight as operators of torch.library, which torch.compile traces.

    lorax::matmul_4bit                y = x W^T + b                        gradient to x
    lorax::matmul_4bit_dx             dx = dy W
    lorax::lora_linear_4bit           y = x W^T + b + s (x A^T) B^T        gradients to x, A, B
    lorax::lora_linear_4bit_backward

lorax's layers call `matmul_4bit` and `lora_linear_4bit` for tensors on CUDA, where they run Triton
(lorax/backend.py has the switch); on a CPU a layer decodes into its scratch and multiplies. An
operator costs the host ten times what a plain autograd Function does, so only a compiler gets one;
without it the kernels' own Functions run, whose backward takes the kernels that the forward took.

torch.library takes no objects: behind each operator's own arguments stand the fields of
`PackedWeight`, in its order, and the functions for callers take the weight as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorax.backend import kernels_for
from lorax.kernels.weight import PackedWeight

WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor code, SymInt[] shape, SymInt block_size, "
    "Tensor? nested_absmax=None, Tensor? nested_map=None, Tensor? nested_offset=None"
)


def _weight(*fields: Any, **named: Any) -> PackedWeight:
    weight = PackedWeight(*fields, **named)
    return weight._replace(shape=tuple(weight.shape))


@torch.library.custom_op(
    "lorax::matmul_4bit",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {WEIGHT}) -> Tensor",
)
def _matmul(x: Tensor, bias: Tensor | None, *weight: Any, **named: Any) -> Tensor:
    y: Tensor = kernels_for(x, "matmul").matmul(x, _weight(*weight, **named), bias)
    return y


@_matmul.register_fake
def _(x: Tensor, bias: Tensor | None, *weight: Any, **named: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], _weight(*weight, **named).shape[0])


@torch.library.custom_op(
    "lorax::matmul_4bit_dx", mutates_args=(), schema=f"(Tensor dy, {WEIGHT}) -> Tensor"
)
def _matmul_dx(dy: Tensor, *weight: Any, **named: Any) -> Tensor:
    dx: Tensor = kernels_for(dy, "matmul").matmul_dx(dy, _weight(*weight, **named))
    return dx


@_matmul_dx.register_fake
def _(dy: Tensor, *weight: Any, **named: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], _weight(*weight, **named).shape[1])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.weight = inputs[2:]


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _matmul_dx(dy, *ctx.weight), *[None] * (1 + len(ctx.weight))


_matmul.register_autograd(_matmul_backward, setup_context=_keep_weight)


def matmul_4bit(x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
    """y = x W^T + b: (..., K) -> (..., N), in x's dtype, with gradients for x and a trained b."""
    trained = bias if bias is not None and bias.requires_grad else None
    frozen = None if trained is not None else bias
    if torch.compiler.is_compiling():
        y: Tensor = _matmul(x, frozen, *weight)
    else:
        y = kernels_for(x, "matmul").linear(x, weight, frozen)
    return y if trained is None else y + trained


@torch.library.custom_op(
    "lorax::lora_linear_4bit",
    mutates_args=(),
    schema=f"(Tensor x, Tensor A, Tensor B, float scaling, Tensor? bias, {WEIGHT}) "
    "-> (Tensor, Tensor)",
)
def _lora_linear(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None, *weight: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    packed = _weight(*weight, **named)
    y, h = kernels_for(x, "lora").forward(x, packed, bias, A, B, scaling)
    return y, h


@_lora_linear.register_fake
def _(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, *weight: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    return x.new_empty(*leading, B.shape[0]), x.new_empty(*leading, A.shape[0])


@torch.library.custom_op(
    "lorax::lora_linear_4bit_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor h, Tensor A, Tensor B, float scaling, "
    f"bool wants_dx, {WEIGHT}) -> (Tensor, Tensor, Tensor)",
)
def _lora_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wants_dx: bool,
    *weight: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, or an empty tensor where nobody wants it; dA; dB."""
    packed = _weight(*weight, **named)
    dx, dA, dB = kernels_for(dy, "lora").backward(dy, x, h, packed, A, B, scaling, wants_dx)
    return x.new_empty(0) if dx is None else dx, dA, dB


@_lora_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wants_dx: bool,
    *rest: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if wants_dx else x.new_empty(0)
    return dx, torch.empty_like(A), torch.empty_like(B)


def _keep_lora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, ctx.scaling = inputs[:4]
    ctx.weight = inputs[5:]
    ctx.save_for_backward(x, output[1], A, B)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros of h's shape would be made for nobody


def _lora_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    none = [None] * (2 + len(ctx.weight))
    if dy is None:
        return None, None, None, *none
    x, h, A, B = ctx.saved_tensors
    wants_dx = ctx.needs_input_grad[0]
    dx, dA, dB = _lora_backward(dy, x, h, A, B, ctx.scaling, wants_dx, *ctx.weight)
    return dx if wants_dx else None, dA, dB, *none


_lora_linear.register_autograd(_lora_gradients, setup_context=_keep_lora)


def lora_linear_4bit(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None, weight: PackedWeight
) -> Tensor:
    """y = x W^T + b + scaling * (x A^T) B^T, with gradients for x, A, B and a trained b.

    x (..., K); W (N, K); A (r, K) and B (N, r), of any floating dtype; y (..., N) in x's dtype.
    """
    trained = bias if bias is not None and bias.requires_grad else None
    frozen = None if trained is not None else bias
    if torch.compiler.is_compiling():
        y: Tensor = _lora_linear(x, A, B, scaling, frozen, *weight)[0]  # (..., N)
    else:
        y = kernels_for(x, "lora").lora_linear(x, weight, frozen, A, B, scaling)
    return y if trained is None else y + trained
