"""QuantizedTensor: the interface that every quantized format implements.

FourBitTensor   four_bit.py   nf4, fp4 and registered codebooks; each with "-dq" too
Int8Tensor      int8.py       int8
AffineTensor    affine.py     int8-symmetric, int8-affine, int4-symmetric, int4-affine
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax.quant.scratch import dequantize_into_scratch

if TYPE_CHECKING:
    from lorax.kernels.weight import PackedWeight


class QuantizedTensor(ABC):
    """An immutable tensor in few bits; `shape` and `dtype` are those before quantization."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    @abstractmethod
    def format(self) -> str:
        """The format's name, as `lorax.quantize` takes it."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that must be stored: the integer codes first, then their scales."""

    @abstractmethod
    def replaced(self, tensors: Sequence[Tensor]) -> Self:
        """The same with others in the place of `tensors()`."""

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors to a device; dtypes never change."""
        return self.replaced([tensor.to(device) for tensor in self.tensors()])

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Decode: computed in float32, rounded once.

        Args:
            dtype: of the result; default: the dtype before quantization.
            out: a contiguous tensor of `shape` to write into; its dtype takes precedence.

        Raises:
            QuantizationError: `out` has another shape or device, or is not contiguous.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under their checkpoint names, with "weight" for the codes."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x W^T + b without gradients: (..., in) -> (..., out), in x's dtype.

        Decodes W to x's dtype in the scratch buffer; int8 overrides this with its own product.
        """
        return F.linear(x, dequantize_into_scratch(self, x.dtype), bias)

    def operands(self) -> PackedWeight | None:
        """The tensors as the Triton kernels take them; None for a format without kernels."""
        return None

    def to_bitsandbytes(self) -> dict[str, Tensor]:
        """`state_dict`; QuantizationError if bitsandbytes has no such format."""
        from lorax.quant.state_dict import to_bitsandbytes

        return to_bitsandbytes(self)

    @staticmethod
    def from_bitsandbytes(
        tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        """Inverse of `to_bitsandbytes` and `state_dict`; see `state_dict.read`."""
        from lorax.quant.state_dict import read

        return read(tensors, dtype)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the codebook is shared and not counted."""
        return sum(tensor.nbytes for tensor in self.tensors())
