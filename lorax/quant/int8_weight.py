"""A weight in eight bits as bitsandbytes' LLM.int8 stores it (Dettmers et al., arXiv:2208.07339).

Each row of W (out, in) has one scale, its largest magnitude, and 127 steps to either side:

    weight         int8    (out, in)     round(W * (127 / SCB))
    SCB            float32 (out,)        max |row|; the name means "scale of CB", CB being the codes
    weight_format  uint8   ()            0: rows in their plain order

    back:  W = (code * SCB) * float32(1 / 127)      in float32, rounded after each product, in this
                                                    order; then once more to the wanted dtype

The file does not say which dtype the weight had; it gets the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorax.errors import QuantizationError

_INVERSE_127 = 7.874015718698502e-3  # float32(1 / 127), as bitsandbytes writes it
_NAMES = ("weight", "SCB", "weight_format")


@dataclass(frozen=True)
class Int8Weight:
    """A matrix in eight bits a value, with a scale for each row.

    packed: int8 (out, in); absmax: float32 (out,); dtype: what `dequantize` gives.
    """

    packed: Tensor
    absmax: Tensor
    dtype: torch.dtype = torch.float32

    format = "int8"

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.packed.shape

    @property
    def block_size(self) -> int:
        """Values that share a scale: a row."""
        return self.packed.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """All that must be kept: codes and scales."""
        return self.packed, self.absmax

    def to(self, device: torch.device | str) -> Int8Weight:
        """Move to another device; codes and scales keep their dtypes."""
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device))

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """code * scale / 127 as bitsandbytes rounds it, in `dtype` or into `out` (out, in)."""
        values = (self.packed * self.absmax[:, None]).mul_(_INVERSE_127)
        return values.to(dtype or self.dtype) if out is None else out.copy_(values)

    def to_bitsandbytes(self) -> dict[str, Tensor]:
        """The tensors under bitsandbytes' names: "weight", "SCB", "weight_format"."""
        plain = torch.zeros((), dtype=torch.uint8, device=self.device)
        return {"weight": self.packed, "SCB": self.absmax, "weight_format": plain}

    @staticmethod
    def from_bitsandbytes(
        tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Int8Weight:
        """Read what `to_bitsandbytes` gives, or the same keys from a checkpoint.

        Raises:
            QuantizationError: a tensor is missing, has the wrong dtype or size, or its rows stand
                in one of the GPU layouts of older versions.
        """
        for name in _NAMES[:2]:  # the third came with bitsandbytes 0.39; before it, rows were plain
            if name not in tensors:
                raise QuantizationError(f"{name} is missing; found {sorted(tensors)}")
        weight, scales = tensors["weight"], tensors["SCB"]
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise QuantizationError(
                f"weight: {weight.dtype} {tuple(weight.shape)}; expected int8 (out, in)"
            )
        if scales.dtype != torch.float32 or scales.numel() != len(weight):
            raise QuantizationError(
                f"SCB: {scales.dtype} with {scales.numel()} values; "
                f"expected float32 with {len(weight)}, one for each row"
            )
        layout = tensors.get("weight_format")
        if layout is not None and (layout.numel() != 1 or layout.item() != 0):
            raise QuantizationError(
                f"weight_format: {layout.flatten().tolist()[:4]}; expected 0, rows in plain order "
                "(save the model again with bitsandbytes 0.45 or later)"
            )
        return Int8Weight(weight.contiguous(), scales.flatten(), dtype)
