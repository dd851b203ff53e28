"""LoRA that starts inside the weight: PiSSA, OLoRA and LoftQ. The base is never written to.

**PiSSA and OLoRA** take s B0 A0 out of the base and train it. Instead of a second dense weight,
the residual W - s B0 A0, the layer keeps the start and adds the difference to the untouched base:

    y = W x + s (B A - B0 A0) x
      = W x + s [B, B - B0] [A - A0; A0] x            one product, of rank 2r

Both lines are exact. The second one loses nothing to rounding: at the start its products are zero
and the model is its base bit for bit, and on a 16-bit base the two differences, taken in float32,
keep updates that are smaller than the last bit of A. It works over any base, quantized ones too;
switching the adapter off gives the original; r (in + out) more float32 numbers are all it costs.

**LoftQ** computes with a quantized weight in the base's place and keeps the base beside it, so
that disabling and unloading give it back: the memory of a plain base and of a quantized one (on
bfloat16 1.28 times the plain base's). `convert_to_lora` lets the original go.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.initialize import components, loftq
from lorax.adapters.lora import LoRALinear
from lorax.errors import AdapterError
from lorax.quant.linear import QuantizedLinear


class ResidualLoRALinear(LoRALinear):
    """PiSSA's or OLoRA's layer: W x + s (B A - B0 A0) x.

    start_a (r, in), start_b (out, r): A0 and B0, float32 buffers.
    """

    start_a: Tensor
    start_b: Tensor

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__(base, r, scaling, dropout)
        self.register_buffer("start_a", torch.zeros_like(self.lora_A.data))
        self.register_buffer("start_b", torch.zeros_like(self.lora_B.data))

    def initialize(self, how: bool | str) -> None:
        """Decompose the base's weight; "pissa", "pissa_niter_K" or "olora"."""
        A, B = components(self.base_weight(), self.r, self.scaling, str(how))
        for tensor, start in ((self.start_a, A), (self.start_b, B)):
            tensor.copy_(start)
        self.lora_A.data.copy_(A)
        self.lora_B.data.copy_(B)

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """[A - A0; A0] (2r, in) and [B, B - B0] (out, 2r): their product is B A - B0 A0."""
        A, B = super().factors(dtype)
        A0, B0 = self.start_a.to(dtype), self.start_b.to(dtype)
        return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)

    def adapted(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). Dropout is the path's alone: the residual sees all of x."""
        if not (self.dropout and self.training):
            return super().adapted(x)
        y = self.base_layer(x)
        kept = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
        start = F.linear(x, self.start_a.to(x.dtype))  # (..., r)
        h = torch.cat([kept - start, start], dim=-1)  # (..., 2r)
        return y + self.scaling * F.linear(h, self.factors()[1].to(x.dtype))

    def stored_base(self) -> Tensor:
        """The residual W - s B0 A0, (out, in), which PEFT takes for the base."""
        weight = self.base_weight()
        start = (self.start_b @ self.start_a).mul_(self.scaling)
        return (weight.float() - start).to(weight.dtype)


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

    def initialize(self, how: bool | str) -> None:
        """Quantize the base's weight and decompose what that lost."""
        weight = self.base_weight()
        quantized, A, B = loftq(weight, self.r, self.scaling, self.iterations, self.format)
        self.lora_A.data.copy_(A)
        self.lora_B.data.copy_(B)
        self.quantized = QuantizedLinear(quantized)
        self.quantized.dtype = weight.dtype
        self.quantized.bias = self.dense_base().bias  # type: ignore[assignment]

    @property
    def frozen(self) -> nn.Module:
        """The quantized copy, with the bias that the base has now (it may be trained)."""
        assert self.quantized is not None
        self.quantized.bias = self.dense_base().bias  # type: ignore[assignment]
        return self.quantized

    def frozen_weight(self) -> Tensor:
        """Q, dequantized to the base's dtype."""
        assert self.quantized is not None
        return self.quantized.dense().weight

    def stored_base(self) -> Tensor:
        """Q, which PEFT takes for the base."""
        return self.frozen_weight()
