"""A frozen Linear over a quantized weight; the gradient goes to its input, and to a trained bias.

    forward   W = dequantize(q);  y = x W^T + b        W lives in a scratch buffer, then is gone
    backward  W = dequantize(q);  dx = dy W            so it is decoded again

Nothing of W's size is kept between the two, which is what makes QLoRA fit. All layers share one
buffer (scratch.py).

On CUDA a four-bit weight is not decoded here at all: the product is one operator (ops.py), whose
kernels decode in registers for few rows and into a scratch of their own beyond.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lorax.backend import uses_triton
from lorax.quant import traced
from lorax.quant.ops import matmul_4bit
from lorax.quant.scratch import dequantize_into_scratch
from lorax.quant.tensor import QuantizedTensor


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return weight.linear(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (dy,) = gradients  # (..., out)
        dx = dy @ dequantize_into_scratch(ctx.weight, dy.dtype)  # (..., in)
        wants_bias = ctx.needs_input_grad[2]
        return dx, None, dy.flatten(0, -2).sum(0) if wants_bias else None


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W (out, in) quantized and frozen, b (out,) or None, frozen at first.

    x is (..., in) in the compute dtype; W is dequantized to that dtype. `state_dict` writes and
    reads the weight under the names that a checkpoint gives it, bitsandbytes' where it has the
    format. `.to(dtype)` leaves codes and scales as they are. `dtype`, the weight's own unless it is
    set, is what `dense` gives.
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None):
        super().__init__()
        self.quantized = weight
        self.dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        self.bias: nn.Parameter | None = (
            None if bias is None else nn.Parameter(bias, requires_grad=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.compiler.is_compiling():
            return traced.linear(x, self.quantized, self.bias)
        weight = self.quantized.operands() if uses_triton(x) else None
        if weight is None:
            return _FrozenLinear.apply(x, self.quantized, self.bias)
        if self.bias is not None and self.bias.requires_grad:
            return matmul_4bit(x, None, weight) + self.bias
        return matmul_4bit(x, self.bias, weight)

    def has_kernels(self, x: Tensor) -> bool:
        """Whether a Triton kernel takes this layer's product with x: four bits, on CUDA."""
        if torch.compiler.is_compiling():
            return False  # traced.py's operator takes it
        return uses_triton(x) and self.quantized.operands() is not None

    @property
    def trains_bias(self) -> bool:
        """Whether the bias is trained; the fused operators give it no gradient."""
        return self.bias is not None and self.bias.requires_grad

    def dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The same layer with its weight dequantized, frozen."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.quantized.dequantize(dtype or self.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)
        self.quantized = self.quantized.to(fn(self.quantized.tensors()[0]).device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.quantized.state_dict().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        bias = state_dict.get(prefix + "bias")
        mine_start = (prefix + "weight", prefix + "SCB")
        names = [name for name in state_dict if name.startswith(mine_start)]
        mine = {name.removeprefix(prefix): state_dict[name] for name in names}
        quantized = QuantizedTensor.from_bitsandbytes(mine, self.quantized.dtype)
        self.quantized = quantized.to(self.quantized.device)
        if self.bias is not None and bias is not None:
            self.bias.data.copy_(bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        q = self.quantized
        return f"{self.in_features}, {self.out_features}, {q.describe()}"


def stored_format(model: nn.Module) -> str | None:
    """The format of a model's quantized Linears (of the first, where they differ), or None."""
    found = (m.quantized.format for m in model.modules() if isinstance(m, QuantizedLinear))
    return next(found, None)
