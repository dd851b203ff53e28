"""What an adapter puts where a module stood: that module, frozen, and its own path beside it.

Every variant of LoRA is one such layer and says five things: how it starts, what it computes, which
tensors it trains, and which dense weight and bias it amounts to. Files, merging, switching off and
comparing need nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorax.quant.linear import QuantizedLinear


class AdapterLayer(nn.Module):
    """A frozen module with something trainable beside it.

    base_layer: the module that stood here. It is never written to.
    enabled: False computes as the base alone.
    merged: where set, base and path in one dense module, which computes instead of them.
    starts_exact: whether an untrained layer's effective weight is the base's, bit for bit.
    """

    starts_exact = True

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        self.merged: nn.Module | None = None
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """What the base computes, changed by the adapter."""
        if not self.enabled:
            return self.base_layer(x)
        if self.merged is not None:
            return self.merged(x)
        return self.adapted(x)

    def initialize(self, how: bool | str) -> None:
        """Set the tensors as `LoRAConfig.init_lora_weights` says."""
        raise NotImplementedError

    def adapted(self, x: Tensor) -> Tensor:
        """Base and path, unmerged."""
        raise NotImplementedError

    def tensors(self) -> dict[str, nn.Parameter]:
        """What is trained, under PEFT's names below the layer's path ("lora_A.weight", ...)."""
        raise NotImplementedError

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight that base and path amount to, in the base's shape, computed in dtype."""
        raise NotImplementedError

    def effective_bias(self) -> Tensor | None:
        """The bias that goes with it: the base's, unless the variant trains one."""
        return getattr(self.base_layer, "bias", None)

    def dense_base(self) -> nn.Module:
        """The base as a plain Linear or Embedding: itself, or dequantized."""
        if isinstance(self.base_layer, QuantizedLinear):
            return self.base_layer.dense()
        return self.base_layer

    def base_weight(self) -> Tensor:
        """The weight of `dense_base`, in the base's dtype."""
        weight = self.dense_base().weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def stored_base(self) -> Tensor:
        """What PEFT holds for the base: the same, unless the variant starts inside the weight."""
        return self.base_weight()

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        if isinstance(self.base_layer, QuantizedLinear):
            return self.base_layer.quantized.device
        return next(self.base_layer.parameters()).device
