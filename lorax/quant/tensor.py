"""QuantizedTensor: the face that every format shows, whatever its codes and scales are.

    FourBitTensor   nf4.py        nf4, nf4-dq, fp4, fp4-dq
    Int8Tensor      llm_int8.py   int8
    AffineTensor    affine.py     int8-symmetric, int8-affine, int4-symmetric, int4-affine

What stands behind the face never changes: a format's tensors are written once, by its `quantize`
or from a checkpoint, and moved between devices as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lorax.errors import QuantizationError

SOURCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class QuantizedTensor(ABC):
    """A tensor in few bits. Built by `lorax.quantize` or `from_bitsandbytes`.

    shape and dtype are those of the tensor that was quantized; `dequantize` gives them back.
    """

    shape: torch.Size
    dtype: torch.dtype

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
            out: a contiguous tensor of `shape` to write into. Its dtype wins.

        Raises:
            QuantizationError: `out` has another shape or device, or is not contiguous.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors as a checkpoint names them, with "weight" for the codes."""

    def to_bitsandbytes(self) -> dict[str, Tensor]:
        """The tensors as bitsandbytes stores them.

        Raises:
            QuantizationError: bitsandbytes has no such format.
        """
        raise QuantizationError(f"bitsandbytes has no format {self.format}")

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
        from lorax.quant.formats import from_state_dict

        return from_state_dict(tensors, dtype)

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


def check_source(weight: Tensor, name: str, nonfinite: str = "raise") -> bool:
    """Whether a tensor's values are all finite; refuse what cannot be quantized.

    Args:
        weight: the tensor that is to be quantized, of any shape.
        name: what messages call it.
        nonfinite: "raise", or "allow", and the answer may be False.

    Raises:
        QuantizationError: a dtype that is no float, an unknown policy, or values that are not
            finite, with how many there are and where the first one stands.
    """
    if nonfinite not in ("raise", "allow"):
        raise QuantizationError(f"nonfinite is {nonfinite!r}; expected 'raise' or 'allow'")
    if weight.dtype not in SOURCE_DTYPES:
        raise QuantizationError(
            f"{name}: dtype {weight.dtype} cannot be quantized; "
            "expected float32, float16 or bfloat16"
        )
    # A sum is finite only if all its terms are; it can overflow without them, so look again then.
    # (bfloat16 is summed in float32 anyway; asking for that dtype makes a float32 copy first.)
    wide = torch.float32 if weight.dtype == torch.float16 else None
    if weight.numel() == 0 or torch.isfinite(weight.sum(dtype=wide)):
        return True
    bad = (~torch.isfinite(weight)).nonzero()
    if len(bad) == 0:
        return True
    if nonfinite == "allow":
        return False
    first = bad[0].tolist()
    raise QuantizationError(
        f"{name}: {len(bad)} of {weight.numel()} values are not finite, the first at {first} "
        f"({weight[tuple(first)].item()}); a quantized block cannot hold them"
    )


def take(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """The tensor of that name, whose dtype and shape must be these."""
    if name not in tensors:
        raise QuantizationError(f"{name} is missing; found {sorted(tensors)}")
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise QuantizationError(
            f"{name}: {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {tuple(shape)}"
        )
    return tensor
