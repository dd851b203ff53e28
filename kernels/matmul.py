"""Products with a four-bit weight: y = x W^T + b and dx = dy W.

    up to tuning.crossover   skinny.py, product_dx.py    W decoded on the way, never written
    above                    decoded.py                  W decoded into a scratch, then cuBLAS

At small M the weight is what is read: 0.516 bytes a value against bf16's 2, so the limit is 3.87
times as fast. Several Linears over 1 to 16 rows are a kernel of their own (narrow.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorax.kernels import tuning
from lorax.kernels.decoded import unfused, unfused_dx
from lorax.kernels.launch import capability
from lorax.kernels.operands import Path, is_fusable
from lorax.kernels.product_dx import fused_dx
from lorax.kernels.skinny import fused
from lorax.kernels.weight import PackedWeight

__all__ = ["fused", "fused_dx", "linear", "matmul", "matmul_dx", "unfused", "unfused_dx"]


def matmul(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, path: Path | None = None
) -> Tensor:
    """y = x W^T + b, by the kernel that suits M; no gradients here.

    Args:
        x: (..., K), any strides; bfloat16, float16 or float32.
        weight: (N, K).
        bias: (N,) or None.
        path: (h, up, scaling) with h (..., r) in x's dtype and up (N, r): y also gets
            scaling * h up^T.

    Returns:
        (..., N) in x's dtype.
    """
    M = math.prod(x.shape[:-1])
    if is_fusable(weight) and M <= tuning.crossover(capability(x.device), x.dtype):
        return fused(x, weight, bias, path)
    return unfused(x, weight, bias, path)


def matmul_dx(dy: Tensor, weight: PackedWeight, path: Path | None = None) -> Tensor:
    """dx = dy W, by the kernel that suits M.

    Args:
        dy: (..., N), any strides.
        weight: (N, K).
        path: (h, up, scaling) with h (..., r) and up (K, r): dx also gets scaling * h up^T.

    Returns:
        (..., K) in dy's dtype.
    """
    M = math.prod(dy.shape[:-1])
    crossover = tuning.crossover(capability(dy.device), dy.dtype)
    if is_fusable(weight) and 1 <= M <= crossover and dy.dtype != torch.float32:
        return fused_dx(dy, weight, path)
    return unfused_dx(dy, weight, path)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return matmul(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return matmul_dx(gradients[0], ctx.weight), None, None


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`matmul` with a gradient for x."""
    y: Tensor = _Linear.apply(x, weight, bias)
    return y
