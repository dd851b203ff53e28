"""Output buffers for decoding, and the scratch buffer that all layers share.

The scratch is one buffer per thread, device and dtype, grown to the largest weight: a fresh 64 MB
buffer costs 20 ms of page faults on a CPU, more than the decoding itself.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorax.errors import QuantizationError

if TYPE_CHECKING:
    from lorax.quant.tensor import QuantizedTensor


def output_of(q: QuantizedTensor, dtype: torch.dtype | None, out: Tensor | None) -> Tensor:
    """The buffer that q's `dequantize` writes: `out`, checked, or a new tensor of q's shape.

    Raises:
        QuantizationError: `out` has another shape or device, or is not contiguous.
    """
    if out is None:
        return torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    if out.shape != q.shape or not out.is_contiguous() or out.device != q.device:
        raise QuantizationError(
            f"dequantize: out is {tuple(out.shape)} on {out.device}"
            f"{'' if out.is_contiguous() else ', not contiguous'}; "
            f"expected a contiguous {tuple(q.shape)} on {q.device}; make it by torch.empty"
        )
    return out


_scratch = threading.local()


def dequantize_into_scratch(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Decode a weight to `dtype` in this thread's scratch buffer; return a view of its shape.

    The view is valid until the next call; do not keep it or write to it. A weight that the buffer
    still holds is not decoded again: DoRA needs the same weight twice.
    """
    if not hasattr(_scratch, "buffers"):
        _scratch.buffers, _scratch.held = {}, {}
    buffers: dict[tuple[torch.device, torch.dtype], Tensor] = _scratch.buffers
    held: dict[tuple[torch.device, torch.dtype], Any] = _scratch.held
    key = (weight.device, dtype)
    size = weight.shape.numel()
    if key not in buffers or buffers[key].numel() < size:
        with torch.inference_mode(False):
            buffers[key] = torch.empty(size, dtype=dtype, device=weight.device)
    out = buffers[key][:size].view(weight.shape)
    versions = _versions(weight)
    ref, then = held.get(key, (lambda: None, None))
    if versions is not None and ref() is weight and then == versions:
        return out
    held.pop(key, None)
    weight.dequantize(out=out)
    held[key] = weakref.ref(weight), versions
    return out


def _versions(weight: QuantizedTensor) -> list[int] | None:
    """torch's write counters of the weight's tensors; inference tensors have none: None."""
    tensors = weight.tensors()
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [tensor._version for tensor in tensors]
