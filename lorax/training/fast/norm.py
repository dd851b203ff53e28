"""RMSNorm, forward and backward by hand: x and one number a row are kept.

    n = x / rms(x)     y = w n     dx = (w dy - n mean(w dy n)) / rms(x)

autograd keeps x, its square, n and what lies between, each as wide as x and in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, (..., C), for a frozen weight (C,)."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        n = x.to(scale.dtype) * scale
        dn = gradients[0].to(scale.dtype) * weight
        mean = (dn * n).mean(-1, keepdim=True)
        return dn.sub_(n.mul_(mean)).mul_(scale).to(x.dtype), None, None
