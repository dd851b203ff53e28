"""A Linear of a model as the fast path takes it: a frozen weight, and LoRA's path where it has one.

    y = x W^T + b + scaling * (dropout(x) A^T) B^T        W (out, in), A (r, in), B (out, r)

Only what is exactly this is taken: a Linear or QuantizedLinear, frozen, on a CPU, alone or within a
LoRALinear that is switched on. A variant's layer, a hook, a bias that is trained, a product of its
own (int8): None, and the module computes as it always does. That is asked at each call, because any
of it may change while a run lasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorax.adapters.lora import LoRALinear
from lorax.models.watched import is_watched
from lorax.quant.linear import QuantizedLinear
from lorax.quant.scratch import dequantize_into_scratch
from lorax.quant.tensor import QuantizedTensor
from lorax.training.fast import products

DTYPES = (torch.float32, torch.bfloat16)
PARAMETERS: set[type] = {nn.Parameter}  # exactly; inspect/estimate adds one without memory


@dataclass(frozen=True)
class Part:
    """One Linear. A (r, in) and B (out, r) are None without an adapter.

    dropout: the probability that is at work now.
    """

    base: nn.Module
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, (out,) or None."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def weight(self, dtype: torch.dtype, computing: torch.dtype) -> Tensor:
        """W (out, in): the model's values in `dtype`, as a tensor of `computing`.

        It may lie in a buffer that the next call writes over.
        """
        if isinstance(self.base, QuantizedLinear):
            decoded = dequantize_into_scratch(self.base.quantized, dtype)
            return products.converted(decoded, computing)
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return products.converted(weight.detach(), computing)


def part_of(module: nn.Module, x: Tensor) -> Part | None:
    """The module as a part for inputs like x (..., in); None if it has to compute by itself."""
    if type(module) is not LoRALinear:
        return Part(module) if _is_frozen_base(module, x) else None
    base = module.base_layer
    plain = module.enabled and module.merged is None and module.lora_B_bias is None
    if not plain or is_watched(module) or not _is_frozen_base(base, x):
        return None
    dropout = module.dropout if module.drops else 0.0
    return Part(base, module.lora_A, module.lora_B, module.scaling, dropout)


def takes(x: Tensor) -> bool:
    """Whether tensors like this one are computed here at all."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _is_frozen_base(module: nn.Module, x: Tensor) -> bool:
    if type(module) is nn.Linear:
        weight = module.weight
        known = type(weight) in PARAMETERS and weight.dtype == x.dtype
        known = known and not weight.requires_grad and weight.device == x.device
    elif type(module) is QuantizedLinear:
        stored = module.quantized
        known = type(stored).linear is QuantizedTensor.linear and stored.device == x.device
    else:
        return False
    bias_is_frozen = module.bias is None or not module.bias.requires_grad
    return known and bias_is_frozen and not is_watched(module)
