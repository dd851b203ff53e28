"""LoRALinear: a frozen base, held, and a low-rank path beside it (Hu et al., arXiv:2106.09685).

    y = base(x) + scaling * (dropout(x) A^T) B^T

    x (M, in) --+-- base: W (out, in), frozen, of any kind -------------+--> y (M, out)
                |                                                       |
                +-- dropout -- A (r, in) --- (M, r) --- B (out, r) --*s-+

B starts at zero, so the adapted model is the base model at first. A and B are float32, whatever the
base is; on a 16-bit base they are cast to the base's dtype for the product, so that gradients reach
float32 masters while the matrix work runs in 16 bits. (PEFT casts the input up instead.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.initialize import fresh
from lorax.adapters.layer import AdapterLayer
from lorax.quant import ops
from lorax.quant.linear import QuantizedLinear
from lorax.quant.nf4 import FourBitTensor


class LoRALinear(AdapterLayer):
    """A frozen Linear with a trainable low-rank path.

    Args:
        base: any frozen layer with in_features and out_features that maps (..., in) to (..., out).
        r: the rank.
        scaling: what the path is multiplied by.
        dropout: the probability with which the path's inputs are zeroed in training mode.
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__(base)
        self.in_features = int(base.in_features)  # type: ignore[arg-type]
        self.out_features = int(base.out_features)  # type: ignore[arg-type]
        self.r = r
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.zeros(r, self.in_features, device=self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.device))

    def initialize(self, how: bool | str) -> None:
        """Draw A and B from torch's global generator; see initialize.py."""
        fresh(self.lora_A, self.lora_B, how)

    def factors(self) -> tuple[Tensor, Tensor]:
        """What the path computes with: A (ranks, in) and B (out, ranks), float32."""
        return self.lora_A, self.lora_B

    @property
    def frozen(self) -> nn.Module:
        """What the path stands beside: the base, or what a variant computes with instead."""
        return self.base_layer

    def frozen_weight(self) -> Tensor:
        """The dense weight of `frozen`, (out, in), in the base's dtype."""
        return self.base_weight()

    def adapted(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        A, B = self.factors()
        if self._is_fused(x):
            return self._fused(x, A, B)
        y = self.frozen(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        h = F.linear(x, A.to(x.dtype))  # (..., r)
        B = B.to(x.dtype)
        path = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.t(), alpha=self.scaling)
        return path.view(y.shape)

    def _is_fused(self, x: Tensor) -> bool:
        """Whether base and path are one operator: a frozen four-bit base on CUDA, no dropout."""
        base = self.frozen
        dropping = self.dropout > 0 and self.training
        if not isinstance(base, QuantizedLinear) or base.trains_bias:
            return False
        return base.has_kernels(x) and not dropping

    def _fused(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = self.frozen
        assert isinstance(base, QuantizedLinear)
        assert isinstance(base.quantized, FourBitTensor)
        weight = base.quantized.operands()
        return ops.lora_linear_4bit(x, A, B, self.scaling, base.bias, *weight)

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def delta(self) -> Tensor:
        """What the path adds to the weight: scaling * B A, (out, in) float32."""
        A, B = self.factors()
        return (B.detach() @ A.detach()).mul_(self.scaling)

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W + scaling * B A, (out, in)."""
        return self.frozen_weight().to(dtype) + self.delta().to(dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"
