"""AdapterLayer, the base class of the variants: a frozen module and a trainable branch beside it.

Every variant of LoRA is one such layer and says five things: how it starts, what it computes, which
tensors it trains, and which dense weight and bias it amounts to. Files, merging, switching off and
comparing need nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorax.errors import AdapterError
from lorax.quant.linear import QuantizedLinear


class AdapterLayer(nn.Module):
    """A frozen module with something trainable beside it.

    base_layer: the module that stood here. It is never written to.
    enabled: False computes as the base alone.
    merged: where set, base and path in one dense module, which computes instead of them.
    starts_exact: whether an untrained layer's effective weight is the base's, bit for bit.
    moves_base: whether PEFT holds another weight for the base (`stored_base`); decomposes: whether
        a decomposition lies between the two, whose last bits differ from machine to machine.
    has_path: whether its tensors' names in a file begin with the module's path.
    file_base: what a file calls `base_layer`.
    """

    starts_exact = True
    moves_base = False
    decomposes = False
    has_path = True
    file_base = "base_layer"

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        self.merged: nn.Module | None = None
        self.enabled = True

    @classmethod
    def prepare(cls, model: nn.Module, targets: Mapping[str, nn.Module], config: Any) -> Any:
        """Once, before the layers of this class are made: what they share, if anything.

        targets: the modules that they are put around, by their paths.

        Raises:
            AdapterError: the variant does not go with this model or these modules.
        """
        return None

    @classmethod
    def wrap(cls, base: nn.Module, name: str, config: Any, shared: Any) -> Self:
        """The layer around the module of that path, as the config asks; not yet initialized.

        shared: what `prepare` gave.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """What the base computes, changed by the adapter; shapes are the base's."""
        if not self.enabled:
            return self.base_layer(x)
        if self.merged is not None:
            return self.merged(x)
        return self.adapted(x)

    def initialize(self, how: bool | str) -> None:
        """Set the tensors, in place, as `LoRAConfig.init_lora_weights` says."""
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

    def copies(self) -> list[nn.Module]:
        """Modules of its own that stand for parameters of the base, and are not counted again."""
        return []

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in), B (out, r) and s, where the layer is W + s B A and nothing else; copies.

        Raises:
            AdapterError: it is something else.
        """
        raise AdapterError(f"is a {type(self).__name__}; expected LoRA on Linears")

    def plain_tensors(self) -> dict[str, Tensor]:
        """`tensors` as those of a plain LoRA over the same base, where that computes the same."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    def plain_layer(self) -> AdapterLayer | None:
        """A plain LoRA layer that computes the same; None for one that has no need of it."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        if isinstance(self.base_layer, QuantizedLinear):
            return self.base_layer.quantized.device
        return next(self.base_layer.parameters()).device
