"""LoftQ: a quantized base, and a low-rank path that starts at what quantizing lost (2310.08659).

The quantized weight and A, B are looked for together. It goes around N times (Li et al.):

    Q   <- quantize(W - L R)            L = R = 0 at first
    L R <- the r largest components of W - dequantize(Q)
    B0 = L / s^1/2,  A0 = R / s^1/2     so that Q + s B0 A0 is near W for any lora_alpha

(PEFT leaves s out of the last line: with lora_alpha = 2 r its start is Q + 2 L R, further from W
than Q alone.) All of it in float32, whatever W is.

The layer computes with Q in the base's place and keeps the base beside it, so that disabling and
unloading give it back: the memory of a plain base and of a quantized one (on bfloat16 1.28 times
the plain base's). `convert_to_lora` lets the original go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.lora import LoRALinear
from lorax.adapters.pissa import as_lora, check_components, largest_components
from lorax.adapters.tables import is_tied
from lorax.adapters.variants import Variant, register_variant
from lorax.errors import AdapterError
from lorax.quant.four_bit import FourBitTensor, quantize
from lorax.quant.linear import QuantizedLinear


class LoftQLinear(LoRALinear):
    """A quantized copy of the base, a low-rank path that makes up for it, and the base for later.

    Args:
        base: a plain Linear.
        iterations: how often LoftQ goes around.
        format: "nf4" or "nf4-dq".
        r, scaling, dropout: as in `LoRALinear`.

    quantized: the copy, which computes; base_layer computes where the adapter is disabled.

    Raises:
        AdapterError: the base is quantized already.
    """

    moves_base = True

    def __init__(
        self,
        base: nn.Module,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        *,
        iterations: int,
        format: str = "nf4",
    ):
        if isinstance(base, QuantizedLinear):
            raise AdapterError(
                f"init_lora_weights = 'loftq' on a base in {base.quantized.format}: LoftQ "
                "quantizes the base itself; load the model without quantization"
            )
        super().__init__(base, r, scaling, dropout)
        self.iterations = iterations
        self.format = format
        self.quantized: QuantizedLinear | None = None

    @classmethod
    def prepare(cls, model: nn.Module, targets: Mapping[str, nn.Module], config: Any) -> None:
        """Refuse a tied head: one weight cannot be quantized and stay as it is."""
        if "lm_head" in targets and is_tied(model):
            raise AdapterError(
                "lm_head is tied to the embedding; LoftQ cannot quantize one of them"
                "; leave lm_head out of target_modules"
            )

    @classmethod
    def wrap(cls, base: nn.Module, name: str, config: LoRAConfig, shared: Any) -> Self:
        """The layer around a Linear, with the config's rank, scale and format for its path."""
        return cls(
            base,
            config.rank(name),
            config.scaling(name),
            config.lora_dropout,
            iterations=config.loftq_config["loftq_iter"],
            format=config.loftq_config.get("loftq_format", "nf4"),
        )

    def initialize(self, how: bool | str) -> None:
        """Quantize the base's weight and decompose what that lost."""
        weight = self.base_weight()
        quantized, A, B = loftq(weight, self.r, self.scaling, self.iterations, self.format)
        self.lora_A.data.copy_(A)
        self.lora_B.data.copy_(B)
        self.quantized = QuantizedLinear(quantized)
        self.quantized.dtype = weight.dtype
        self.quantized.bias = self._bias()

    def _bias(self) -> nn.Parameter | None:
        bias = self.dense_base().bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    @property
    def frozen(self) -> nn.Module:
        """The quantized copy, with the bias that the base has now (it may be trained)."""
        assert self.quantized is not None
        self.quantized.bias = self._bias()
        return self.quantized

    def frozen_weight(self) -> Tensor:
        """Q, dequantized to the base's dtype."""
        assert self.quantized is not None
        return self.quantized.dense().weight

    def copies(self) -> list[nn.Module]:
        """The quantized copy."""
        return [] if self.quantized is None else [self.quantized]

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """Refused: the update is one of the quantized base."""
        raise AdapterError(
            "a LoftQ adapter is no low-rank update of the original base; call "
            "lorax.convert_to_lora(model) first"
        )

    def plain_layer(self) -> LoRALinear:
        """The same path over the quantized copy; the original is let go."""
        return as_lora(self, self.frozen)

    def stored_base(self) -> Tensor:
        """Q, the quantized weight, decoded: PEFT loads a LoftQ adapter over it, not over W."""
        return self.frozen_weight()


def loftq(
    weight: Tensor, r: int, scaling: float, iterations: int, format: str = "nf4"
) -> tuple[FourBitTensor, Tensor, Tensor]:
    """LoftQ's quantized weight, and A0 (r, in), B0 (out, r) for what it lost, float32.

    Args:
        weight: (out, in), any float.
        r: the rank; at most min(out, in).
        scaling: s, above zero.
        iterations: how often to go around; 1 quantizes W itself.
        format: "nf4", as PEFT, or "nf4-dq".

    Raises:
        AdapterError: as `components`.
    """
    weight = weight.float()
    check_components(weight, r, scaling, "loftq")
    rest = weight
    for _ in range(iterations):
        quantized = quantize(rest, format)
        U, S, Vt = largest_components(weight - quantized.dequantize(torch.float32), r, "loftq")
        root = S.sqrt()
        L, R = U * root, root[:, None] * Vt
        rest = weight - L @ R
    return quantized, R / math.sqrt(scaling), L / math.sqrt(scaling)


def _saving(config: LoRAConfig) -> str | None:
    if config.loftq_config.get("loftq_format", "nf4") == "nf4":
        return None
    return "PEFT knows no loftq_format and will quantize this base to plain NF4"


register_variant(
    Variant(
        "loftq",
        LoRAConfig,
        title="LoftQ",
        in_peft=True,
        summary=lambda config: f"LoftQ of rank {config.r}, lora_alpha {config.lora_alpha:g}",
        layer=LoftQLinear,
        chosen=lambda config: config.init_lora_weights == "loftq",
        tags=("lora",),
        saving=_saving,
        no_matrix_alone="init_lora_weights = 'loftq', so what it adds depends on its base; "
        "load it there and take lorax.convert_to_lora(model)",
    )
)
