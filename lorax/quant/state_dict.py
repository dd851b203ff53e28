"""A four-bit tensor's names on disk: bitsandbytes', and lorax's own for other codebooks.

    weight                               uint8 (ceil(n / 2), 1), older files (1, ceil(n / 2))
    weight.absmax                        float32 (blocks,), or uint8 with double quantization
    weight.quant_map                     float32 (16,), the codebook
    weight.nested_absmax                 float32 (ceil(blocks / 256),)    double quantization only
    weight.nested_quant_map              float32 (256,)                   double quantization only
    weight.quant_state.bitsandbytes__nf4 uint8: a JSON text, one byte an element (or __fp4)
    weight.quant_state.lorax__sym4       the same, for a codebook that bitsandbytes does not have

The JSON holds quant_type, blocksize, dtype and shape and, with double quantization,
nested_blocksize, nested_dtype and nested_offset, in this order and with default spacing. For NF4
and FP4 these are the bytes that bitsandbytes writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant import codebooks, names
from lorax.quant.blockwise import BLOCK_SIZES
from lorax.quant.double import NestedScales
from lorax.quant.dynamic_map import dynamic_map
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from lorax.quant.linear import QuantizedLinear

_STATE = "weight.quant_state."
_OURS = "lorax__int"  # integers, which affine.py reads
Reader = Callable[[Mapping[str, Tensor], torch.dtype], QuantizedTensor]
_READERS: list[tuple[Callable[[Mapping[str, Tensor]], bool], Reader]] = []
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def reader(
    recognizes: Callable[[Mapping[str, Tensor]], bool],
) -> Callable[[Reader], Reader]:
    """Register a function that reads one format's `state_dict`, for `read`.

    recognizes: whether tensors with these names are of that format.
    """

    def register(function: Reader) -> Reader:
        _READERS.append((recognizes, function))
        return function

    return register


def read(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    """Inverse of `QuantizedTensor.state_dict`, and so of `to_bitsandbytes`.

    Args:
        tensors: a weight's tensors by checkpoint name, with "weight" for the codes.
        dtype: before quantization; used for "int8" only, whose tensors do not state it.

    Raises:
        QuantizationError: a tensor is missing, has the wrong dtype or size, or the names belong to
            no format.
    """
    for recognizes, function in _READERS:
        if recognizes(tensors):
            return function(tensors, dtype)
    raise QuantizationError(
        f"weight: expected one tensor {_STATE}bitsandbytes__nf4 or fp4 beside it, "
        f"or SCB, or one of lorax's own; found {sorted(tensors)}"
    )


def to_bitsandbytes(q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors under bitsandbytes' names.

    Raises:
        QuantizationError: bitsandbytes has no such format.
    """
    if q.format not in names.bitsandbytes_formats():
        raise QuantizationError(
            f"bitsandbytes has no format {q.format}; expected one of "
            f"{names.listed(names.bitsandbytes_formats())}; use state_dict for lorax's own names"
        )
    return q.state_dict()


def is_state(name: str) -> bool:
    """Whether a tensor of that name holds a four-bit tensor's JSON."""
    return name.startswith(_STATE) and not name.startswith(_STATE + _OURS)


def state_name(quant_type: str) -> str:
    """The name of the JSON for a codebook.

    Raises:
        QuantizationError: there is no such codebook.
    """
    known = codebooks.find(quant_type).bitsandbytes
    return f"{_STATE}bitsandbytes__{known}" if known else f"{_STATE}lorax__{quant_type}"


def pack(q: FourBitTensor) -> dict[str, Tensor]:
    """The tensors of a four-bit weight under the names above."""
    state: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {
        "weight": q.packed.view(-1, 1),
        "weight.absmax": q.absmax,
        # a copy each time: safetensors refuses tensors that share memory
        "weight.quant_map": codebooks.four_bit(q.quant_type).to(q.device, copy=True),
    }
    if q.nested is not None:
        tensors["weight.nested_absmax"] = q.nested.absmax
        tensors["weight.nested_quant_map"] = dynamic_map().to(q.device, copy=True)
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": q.nested.offset.item(),
        }
    text = json.dumps(state).encode()
    tensors[state_name(q.quant_type)] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


@reader(lambda names: any(is_state(name) for name in names))
def unpack(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FourBitTensor:
    """Inverse of `pack`, also for tensors that bitsandbytes wrote; `dtype` is unused.

    Raises:
        QuantizationError: a tensor is missing or has the wrong dtype or size, the codebook is not
            registered, or its values are not those of the file.
    """
    state = _read_state(tensors)
    shape, block_size = torch.Size(state["shape"]), state["blocksize"]
    n = math.prod(shape)
    blocks = -(-n // block_size)
    double = "nested_offset" in state
    packed = _take(tensors, "weight").contiguous().flatten().view(torch.uint8)
    if packed.numel() != (n + 1) // 2:
        raise QuantizationError(
            f"weight: {packed.numel()} bytes, but shape {list(shape)} needs {(n + 1) // 2}; "
            "get the file anew, or quantize anew"
        )
    code = codebooks.four_bit(state["quant_type"])
    _check_code(_take(tensors, "weight.quant_map"), code, "weight.quant_map")
    scale_dtype = torch.uint8 if double else torch.float32
    return FourBitTensor(
        packed=packed,
        absmax=_sized(tensors, "weight.absmax", blocks, scale_dtype),
        shape=shape,
        dtype=_DTYPES[state["dtype"]],
        block_size=block_size,
        nested=_nested(tensors, blocks, state["nested_offset"]) if double else None,
        quant_type=state["quant_type"],
    )


def _nested(tensors: Mapping[str, Tensor], blocks: int, offset: float) -> NestedScales:
    name = "weight.nested_quant_map"
    _check_code(_take(tensors, name), dynamic_map(), name)
    absmax = _sized(tensors, "weight.nested_absmax", -(-blocks // 256), torch.float32)
    device = tensors["weight"].device
    return NestedScales(absmax, torch.tensor(offset, dtype=torch.float32, device=device))


def _read_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    found = [name for name in tensors if is_state(name)]
    quant_type = found[0].partition("__")[2] if len(found) == 1 else ""
    if len(found) == 1 and found[0] == f"{_STATE}lorax__{quant_type}":
        codebooks.find(quant_type)  # says how to register it
    if quant_type not in codebooks.CODEBOOKS or found != [state_name(quant_type)]:
        raise QuantizationError(
            f"expected one tensor {_STATE}bitsandbytes__nf4 or fp4, found {found or 'none'}"
        )
    try:
        state = json.loads(bytes(tensors[found[0]].cpu().tolist()))
        shape = [int(size) for size in state["shape"]]
        block_size = int(state["blocksize"])
        valid = (
            state["quant_type"] == quant_type
            and state["dtype"] in _DTYPES
            and min(shape, default=0) >= 0
            and block_size in BLOCK_SIZES
            and state.get("nested_blocksize", 256) == 256
            and state.get("nested_dtype", "float32") == "float32"
            and math.isfinite(state.get("nested_offset", 0.0))
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise QuantizationError(
            f"{found[0]}: not a bitsandbytes state ({error!r}); get the file anew, or quantize anew"
        ) from None
    if not valid:
        raise QuantizationError(
            f"{found[0]}: values that lorax does not read: {state}; "
            "expected those that bitsandbytes writes"
        )
    return {**state, "shape": shape, "blocksize": block_size}


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise QuantizationError(
            f"{name} is missing; found {sorted(tensors)}; get the file anew, or quantize anew"
        )
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
        raise QuantizationError(
            f"{name}: not the table that the format defines; get the file anew, or quantize anew"
        )


def load_linear(linear: QuantizedLinear, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Fill a layer from a state_dict, where its tensors' names begin with `prefix`.

    Raises:
        QuantizationError: they are no quantized weight; see `read`.
    """
    names = (prefix + "weight", prefix + "SCB")
    tensors = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(names)}
    quantized = read(tensors, linear.quantized.dtype)
    linear.quantized = quantized.to(linear.quantized.device)
    bias = state_dict.get(prefix + "bias")
    if linear.bias is not None and bias is not None:
        linear.bias.data.copy_(bias)
