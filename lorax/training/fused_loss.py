"""The cross entropy behind a frozen head as one operator, whose softmax is a Triton kernel.

    lorax::cross_entropy_frozen_head    sum of -log softmax(x W^T)[target], and dX, in one pass

loss.py calls it for tensors on CUDA. Hidden states (N, C) and head (V, C) meet a chunk of rows at a
time, so no (N, V) tensor is made (`kernels/cross_entropy.py`). The operator is for a compiler:
without one a plain autograd Function does the same with less work of the host.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lorax.backend import kernels_for


@torch.library.custom_op("lorax::cross_entropy_frozen_head", mutates_args=())
def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    kernels = kernels_for(hidden, "cross_entropy")
    loss, dx = kernels.cross_entropy(hidden, weight, targets, gradient)
    return loss, hidden.new_empty(0) if dx is None else dx


@_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    dx = hidden.new_empty(hidden.shape if gradient else 0)
    return hidden.new_empty((), dtype=torch.float32), dx


def _keep_dx(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _scale_dx(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
    (dx,) = ctx.saved_tensors
    return dx * dloss, None, None, None  # a 0-d factor keeps the gradient's dtype


_cross_entropy.register_autograd(_scale_dx, setup_context=_keep_dx)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool
    ) -> Tensor:
        kernels = kernels_for(hidden, "cross_entropy")
        loss, dx = kernels.cross_entropy(hidden, weight, targets, gradient)
        ctx.save_for_backward(dx)
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _scale_dx(ctx, gradients[0])


def cross_entropy_frozen_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy of hidden (N, C) behind a frozen head (V, C): () float32.

    targets: (N,) int64, a negative one counts nothing. dX is computed together with the loss.
    """
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    if torch.compiler.is_compiling():
        loss: Tensor = _cross_entropy(hidden, weight, targets, wants_gradient)[0]
    else:
        loss = _CrossEntropy.apply(hidden, weight, targets, wants_gradient)
    return loss
