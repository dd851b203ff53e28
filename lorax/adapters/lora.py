"""LoRALinear: a frozen base, held, and a low-rank path beside it (Hu et al., arXiv:2106.09685).

    y = base(x) + scaling * (dropout(x) A^T) B^T

    x (M, in) --+-- base: W (out, in), frozen, of any kind -------------+--> y (M, out)
                |                                                       |
                +-- dropout -- A (r, in) --- (M, r) --- B (out, r) --*s-+

With `lora_bias` B has a bias b (out,) of its own, scaled like the path: y gains scaling * b.

B starts at zero, so the adapted model is the base model at first. A and B are float32, whatever the
base is; on a 16-bit base they are cast to the base's dtype for the product, so that gradients reach
float32 masters while the matrix work runs in 16 bits. (PEFT casts the input up instead.)
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.layer import AdapterLayer
from lorax.quant.linear import QuantizedLinear


class LoRALinear(AdapterLayer):
    """A frozen Linear with a trainable low-rank path.

    Args:
        base: any frozen layer with in_features and out_features that maps (..., in) to (..., out).
        r: the rank.
        scaling: what the path is multiplied by.
        dropout: the probability with which the path's inputs are zeroed in training mode.
        lora_bias: whether B has a bias.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        lora_bias: bool = False,
    ):
        super().__init__(base)
        linear: Any = base
        self.in_features, self.out_features = int(linear.in_features), int(linear.out_features)
        self.r = r
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.zeros(r, self.in_features, device=self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.device))
        self.lora_B_bias: nn.Parameter | None = None
        if lora_bias:
            self.lora_B_bias = nn.Parameter(torch.zeros(self.out_features, device=self.device))

    @classmethod
    def wrap(cls, base: nn.Module, name: str, config: LoRAConfig, shared: Any) -> Self:
        """The layer around a Linear, with the config's rank and scale for its path."""
        more = {"lora_bias": True} if config.lora_bias else {}
        return cls(base, config.rank(name), config.scaling(name), config.lora_dropout, **more)

    def initialize(self, how: bool | str) -> None:
        """Draw A (r, in) and B (out, r) from torch's global generator; see `fresh`."""
        fresh(self.lora_A, self.lora_B, how)
        if self.lora_B_bias is not None:
            bound = 1 / math.sqrt(self.r) if how is False else 0.0
            nn.init.uniform_(self.lora_B_bias, -bound, bound)

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """What the path computes with: A (ranks, in) and B (out, ranks), in dtype or their own."""
        return self.lora_A.to(dtype), self.lora_B.to(dtype)

    @property
    def frozen(self) -> nn.Module:
        """The module to whose output the path is added: the base, or a variant's own."""
        return self.base_layer

    def frozen_weight(self) -> Tensor:
        """The dense weight of `frozen`, (out, in), in the base's dtype."""
        return self.base_weight()

    def adapted(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        fused = self._fused(x)
        if fused is not None:
            return self._with_bias(fused)
        return self.path_onto(self.frozen(x), self.dropped(x))

    def dropped(self, x: Tensor) -> Tensor:
        """The path's input: x (..., in), with dropout while training."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def path_onto(self, y: Tensor, x: Tensor) -> Tensor:
        """y + the path of x: (..., out), (..., in) -> (..., out)."""
        A, B = self.factors()
        h = F.linear(x, A.to(x.dtype))  # (..., r)
        B = B.to(x.dtype)
        flat = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])  # a single vector is a row
        path = torch.addmm(*flat, B.t(), alpha=self.scaling)
        return self._with_bias(path.view(y.shape))

    def _with_bias(self, y: Tensor) -> Tensor:
        if self.lora_B_bias is None:
            return y
        return y + (self.scaling * self.lora_B_bias).to(y.dtype)

    @property
    def drops(self) -> bool:
        """Whether dropout is at work."""
        return self.dropout > 0 and self.training

    def _fused(self, x: Tensor) -> Tensor | None:
        """Base and path as one operator: over four bits on CUDA, without dropout; else None."""
        base = self.frozen
        if not isinstance(base, QuantizedLinear) or self.drops:
            return None
        weight = base.kernel_weight(x)
        if weight is None:
            return None
        from lorax.quant.ops import lora_linear_4bit

        return lora_linear_4bit(x, *self.factors(), self.scaling, base.bias, weight)

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B, and B's bias."""
        found = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        if self.lora_B_bias is not None:
            found["lora_B.bias"] = self.lora_B_bias
        return found

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the path adds to the weight: scaling * B A, (out, in), computed in dtype."""
        A, B = self.factors(dtype)
        return (B.detach() @ A.detach()).mul_(self.scaling)

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W + scaling * B A, (out, in)."""
        return self.frozen_weight().to(dtype) + self.delta(dtype)

    def effective_bias(self) -> Tensor | None:
        """b0 + scaling * b, (out,) in the base's dtype; a base without a bias gains one."""
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        if self.lora_B_bias is None:
            return bias
        own = self.scaling * self.lora_B_bias.detach()
        return (own if bias is None else bias.detach() + own).to(self.base_weight().dtype)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """Copies of `factors`, and the scale."""
        A, B = self.factors()
        return A.detach().clone(), B.detach().clone(), self.scaling

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def fresh(A: Tensor, B: Tensor, how: bool | str) -> None:
    """Draw A (r, in) and B (out, r) in place from torch's global generator.

    how: True: A kaiming-uniform, B zero, so that the model starts as its base (arXiv:2106.09685).
        "gaussian": A ~ N(0, 1/r) in standard deviation, B zero. False: both kaiming-uniform; the
        adapter changes the model from the start.
    """
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
        nn.init.zeros_(B)
        return
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)
