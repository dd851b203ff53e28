"""QuantizedTensor: what every format offers, whatever its codes and scales are.

    FourBitTensor   four_bit.py   nf4, fp4 and registered codebooks; each with "-dq" too
    Int8Tensor      int8.py       int8
    AffineTensor    affine.py     int8-symmetric, int8-affine, int4-symmetric, int4-affine

A subclass registers itself by being defined: `from_bitsandbytes` asks each whether it `reads` the
tensors at hand. `quantize.py` imports all three, and is where `lorax.QuantizedTensor` comes from.

A quantized tensor never changes: its tensors are written once, by the format's `quantize` or from a
checkpoint, and moved between devices as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.kernels.weight import PackedWeight
from lorax.quant.scratch import dequantize_into_scratch


class QuantizedTensor(ABC):
    """A tensor in few bits. Built by `lorax.quantize` or `from_bitsandbytes`.

    shape and dtype are those of the tensor that was quantized; `dequantize` gives them back.
    """

    shape: torch.Size
    dtype: torch.dtype
    kinds: ClassVar[list[type[QuantizedTensor]]] = []

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        QuantizedTensor.kinds.append(cls)

    @property
    @abstractmethod
    def format(self) -> str:
        """The name that `lorax.quantize` takes."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that must be kept: the codes first, in whole numbers, then what scales them."""

    @abstractmethod
    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Move to another device; a dtype never changes, for these are no plain numbers."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The values, computed in float32 and rounded once.

        Args:
            dtype: of the result; by default the dtype before quantization.
            out: a contiguous tensor of `shape` to write into, which saves the page faults of a
                fresh one (20 ms for 64 MB). Its dtype wins.

        Raises:
            QuantizationError: `out` has another shape or device, or is not contiguous.
        """

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x W^T + b, without gradients: (..., in) -> (..., out), in x's dtype.

        The weight is decoded to x's dtype, into the scratch buffer. A format that multiplies in
        another way (int8) overrides this.
        """
        return F.linear(x, dequantize_into_scratch(self, x.dtype), bias)

    def operands(self) -> PackedWeight | None:
        """The tensors as the Triton kernels take them; None for a format without kernels."""
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors as a checkpoint names them, with "weight" for the codes."""

    @staticmethod
    @abstractmethod
    def reads(tensors: Mapping[str, Tensor]) -> bool:
        """Whether these names are those of this format's `state_dict`."""

    @staticmethod
    @abstractmethod
    def from_state_dict(
        tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        """Read what `state_dict` gives; `dtype` (before quantization) where the tensors lack it."""

    def to_bitsandbytes(self) -> dict[str, Tensor]:
        """The tensors as bitsandbytes stores them.

        Raises:
            QuantizationError: bitsandbytes has no such format.
        """
        raise QuantizationError(
            f"bitsandbytes has no format {self.format}; `state_dict` gives the tensors under "
            "lorax's own names"
        )

    @staticmethod
    def from_bitsandbytes(
        tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        """Read what `to_bitsandbytes` or `state_dict` gives, or the same keys from a checkpoint.

        Args:
            tensors: with "weight" for the codes.
            dtype: before quantization; asked for "int8" only, whose files do not say it.

        Raises:
            QuantizationError: a tensor is missing, of the wrong dtype or size, or of no format.
        """
        for kind in QuantizedTensor.kinds:
            if kind.reads(tensors):
                return kind.from_state_dict(tensors, dtype)
        raise QuantizationError(
            "weight: expected one tensor weight.quant_state.bitsandbytes__nf4 or fp4 beside it, "
            f"or SCB, or one of lorax's own; found {sorted(tensors)}"
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together; codebooks, the same for all tensors, not counted."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def describe(self) -> str:
        """What `print(model)` shows of this tensor."""
        return self.format

    def output(self, dtype: torch.dtype | None, out: Tensor | None) -> Tensor:
        """Where `dequantize` writes: `out`, if it fits, or a new tensor of `shape`."""
        if out is None:
            return torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        if out.shape != self.shape or not out.is_contiguous() or out.device != self.device:
            raise QuantizationError(
                f"dequantize: out is {tuple(out.shape)} on {out.device}"
                f"{'' if out.is_contiguous() else ', not contiguous'}; "
                f"expected a contiguous {tuple(self.shape)} on {self.device}"
            )
        return out
