"""What is refused before a tensor is quantized, or while one is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorax.errors import QuantizationError

SOURCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
