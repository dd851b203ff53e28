"""A four-bit tensor as bitsandbytes stores it in safetensors, and back.

    weight                               uint8 (ceil(n / 2), 1), older files (1, ceil(n / 2))
    weight.absmax                        float32 (blocks,), or uint8 with double quantization
    weight.quant_map                     float32 (16,), the codebook
    weight.nested_absmax                 float32 (ceil(blocks / 256),)    double quantization only
    weight.nested_quant_map              float32 (256,)                   double quantization only
    weight.quant_state.bitsandbytes__nf4 uint8: a JSON text, one byte an element (or __fp4)

The JSON holds quant_type, blocksize, dtype and shape and, with double quantization,
nested_blocksize, nested_dtype and nested_offset, in this order and with default spacing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant import codebooks

if TYPE_CHECKING:
    from lorax.quant.nf4 import FourBitTensor

_STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pack(tensor: FourBitTensor) -> dict[str, Tensor]:
    """Give the tensors under bitsandbytes' names, with "weight" for the weight."""
    state: dict[str, Any] = {
        "quant_type": tensor.quant_type,
        "blocksize": tensor.block_size,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    tensors = {
        "weight": tensor.packed.view(-1, 1),
        "weight.absmax": tensor.absmax,
        # a copy each time: safetensors refuses tensors that share memory
        "weight.quant_map": codebooks.four_bit(tensor.quant_type).to(tensor.device, copy=True),
    }
    if tensor.nested is not None:
        tensors["weight.nested_absmax"] = tensor.nested.absmax
        tensors["weight.nested_quant_map"] = codebooks.dynamic_map().to(tensor.device, copy=True)
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": tensor.nested.offset.item(),
        }
    text = json.dumps(state).encode()
    tensors[_STATE + tensor.quant_type] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Give QuantizedTensor's fields (the nested ones flat) from bitsandbytes' tensors.

    Raises:
        QuantizationError: a tensor is missing, has the wrong dtype or size, or is no NF4 or FP4.
    """
    state = _read_state(tensors)
    shape = torch.Size(state["shape"])
    block_size = state["blocksize"]
    n = math.prod(shape)
    blocks = -(-n // block_size)
    double = "nested_offset" in state
    scale_dtype = torch.uint8 if double else torch.float32
    packed = _take(tensors, "weight").contiguous().flatten().view(torch.uint8)
    if packed.numel() != (n + 1) // 2:
        raise QuantizationError(
            f"weight: {packed.numel()} bytes, but shape {list(shape)} needs {(n + 1) // 2}"
        )
    code = codebooks.four_bit(state["quant_type"])
    _check_code(_take(tensors, "weight.quant_map"), code, "weight.quant_map")
    fields: dict[str, Any] = {
        "packed": packed,
        "absmax": _sized(tensors, "weight.absmax", blocks, scale_dtype),
        "shape": shape,
        "dtype": _DTYPES[state["dtype"]],
        "block_size": block_size,
        "quant_type": state["quant_type"],
        "nested_absmax": None,
        "nested_offset": None,
    }
    if double:
        _check_code(
            _take(tensors, "weight.nested_quant_map"),
            codebooks.dynamic_map(),
            "weight.nested_quant_map",
        )
        name = "weight.nested_absmax"
        fields["nested_absmax"] = _sized(tensors, name, -(-blocks // 256), torch.float32)
        fields["nested_offset"] = torch.tensor(
            state["nested_offset"], dtype=torch.float32, device=packed.device
        )
    return fields


def _read_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    names = [name for name in tensors if name.startswith(_STATE)]
    if names not in ([_STATE + "nf4"], [_STATE + "fp4"]):
        raise QuantizationError(f"expected one tensor {_STATE}nf4 or fp4, found {names or 'none'}")
    try:
        state = json.loads(bytes(tensors[names[0]].cpu().tolist()))
        shape = [int(size) for size in state["shape"]]
        block_size = int(state["blocksize"])
        valid = (
            state["quant_type"] == names[0].removeprefix(_STATE)
            and state["dtype"] in _DTYPES
            and min(shape, default=0) >= 0
            and block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096)
            and state.get("nested_blocksize", 256) == 256
            and state.get("nested_dtype", "float32") == "float32"
            and math.isfinite(state.get("nested_offset", 0.0))
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise QuantizationError(f"{names[0]}: not a bitsandbytes state ({error!r})") from None
    if not valid:
        raise QuantizationError(f"{names[0]}: values that lorax does not read: {state}")
    return {**state, "shape": shape, "blocksize": block_size}


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise QuantizationError(f"{name} is missing; found {sorted(tensors)}")
    return tensors[name]


def _sized(tensors: Mapping[str, Tensor], name: str, size: int, dtype: torch.dtype) -> Tensor:
    tensor = _take(tensors, name)
    if tensor.dtype != dtype or tensor.numel() != size:
        raise QuantizationError(
            f"{name}: {tensor.dtype} with {tensor.numel()} values; expected {dtype} with {size}"
        )
    return tensor.flatten()


def _check_code(found: Tensor, expected: Tensor, name: str) -> None:
    if found.dtype != torch.float32 or not torch.equal(found.cpu().flatten(), expected):
        raise QuantizationError(f"{name}: not the table that the format defines")
