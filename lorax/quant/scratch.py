"""One buffer for decoded weights, used again by every layer.

The scratch is one buffer per thread, device and dtype, grown to the largest weight: a fresh 64 MB
buffer costs 20 ms in page faults on a CPU, more than the decoding itself.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class Decodable(Protocol):
    """What the scratch needs of a quantized weight."""

    shape: torch.Size

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes and scales."""

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Decode, into `out`."""


_scratch = threading.local()


def dequantize_into_scratch(weight: Decodable, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, of its shape, in this thread's scratch buffer.

    Valid until the next call, never to be kept or written to. What the buffer still holds is not
    decoded again: DoRA asks twice for the same weight.
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


def _versions(weight: Decodable) -> list[int] | None:
    """How often each of its tensors was written to; None where torch does not count that."""
    tensors = weight.tensors()
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [tensor._version for tensor in tensors]
