"""QuantizedLinear: a Linear with a frozen, quantized weight; gradients reach its input and bias.

    forward   W = dequantize(q);  y = x W^T + b        W is decoded into a scratch buffer
    backward  W = dequantize(q);  dx = dy W            and decoded again, not kept

Nothing of W's size stays alive between the two, which is what makes QLoRA fit; all layers share one
scratch buffer (scratch.py). On CUDA a four-bit product is one operator of Triton kernels (ops.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorax.backend import bound, uses_triton
from lorax.quant.scratch import dequantize_into_scratch
from lorax.quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from lorax.kernels.weight import PackedWeight


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.decode = weight, bound(dequantize_into_scratch)
        return weight.linear(x, bias)  # (..., out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (dy,) = gradients  # (..., out)
        dx = dy @ ctx.decode(ctx.weight, dy.dtype)  # (..., in)
        return dx, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W (out, in) quantized and frozen, b (out,) or None, frozen at first.

    W is decoded to the dtype of x (..., in); `.to(dtype)` does not change its codes and scales.
    `dtype` is the default of `dense`. `state_dict` uses checkpoint names (state_dict.py).
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None):
        super().__init__()
        self.quantized = weight
        self.dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.compiler.is_compiling():
            from lorax.quant import traced

            return traced.linear(x, self.quantized, self.bias)
        weight = self.kernel_weight(x)
        if weight is None:
            return _FrozenLinear.apply(x, self.quantized, self.bias)
        from lorax.quant.ops import matmul_4bit

        return matmul_4bit(x, self.bias, weight)

    def kernel_weight(self, x: Tensor) -> PackedWeight | None:
        """The weight for the operators of ops.py if they take x (four bits, CUDA); else None."""
        if torch.compiler.is_compiling() or not uses_triton(x):
            return None
        return self.quantized.operands()

    def dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The same layer as a frozen nn.Linear with W dequantized to `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        W = self.quantized.dequantize(dtype or self.dtype)
        linear.weight = nn.Parameter(W, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        self.quantized = self.quantized.to(fn(self.quantized.tensors()[0]).device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + k: v for k, v in self.quantized.state_dict().items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        from lorax.quant.state_dict import load_linear

        load_linear(self, state_dict, prefix)

    def extra_repr(self) -> str:
        """Sizes and format, for `print(model)`."""
        size = getattr(self.quantized, "block_size", "by row")
        return f"{self.in_features}, {self.out_features}, {self.quantized.format}, blocks={size}"
