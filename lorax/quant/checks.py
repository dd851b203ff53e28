"""Input checks: the tensor and block size to quantize, and the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant.blockwise import BLOCK_SIZES

SOURCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_block_size(block_size: int, name: str) -> None:
    """Raise QuantizationError, with `name` in it, unless block_size is one of BLOCK_SIZES."""
    if block_size not in BLOCK_SIZES:
        raise QuantizationError(
            f"{name}: block_size {block_size} is not supported; expected one of {BLOCK_SIZES}"
        )


def check_input(
    weight: Tensor, format: str, formats: tuple[str, ...], block_size: int, name: str,
    nonfinite: str,
) -> bool:  # fmt: skip
    """All checks of a blockwise `quantize`; return whether the weight's values are all finite.

    Raises:
        QuantizationError: `format` is not one of `formats`, or see the two checks.
    """
    if format not in formats:
        raise QuantizationError(f"{name}: format {format!r} is unknown; expected one of {formats}")
    check_block_size(block_size, name)
    return check_source(weight, name, nonfinite)


def check_source(weight: Tensor, name: str, nonfinite: str = "raise") -> bool:
    """Check that a tensor can be quantized; return whether all its values are finite.

    Args:
        weight: the tensor to quantize, any shape.
        name: the tensor's name in messages.
        nonfinite: "raise", or "allow": then NaN and infinity are reported by returning False.

    Raises:
        QuantizationError: a dtype other than float32, float16 and bfloat16, an unknown `nonfinite`,
            or non-finite values (the message counts them and gives the first one's index).
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
        f"({weight[tuple(first)].item()}); a quantized block cannot hold them; mend the weight"
    )


def take(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """tensors[name]; QuantizationError if it is missing or has another dtype or shape."""
    if name not in tensors:
        raise QuantizationError(
            f"{name} is missing; found {sorted(tensors)}; get the file anew, or quantize anew"
        )
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise QuantizationError(
            f"{name}: {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {tuple(shape)}; "
            "get the file anew, or quantize anew"
        )
    return tensor
