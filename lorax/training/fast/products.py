"""The matrix products of a CPU, by the fastest library that is here.

    float32     oneDNN in the place of MKL where the CPU has AVX-512: on AMD's, MKL leaves half of
                the machine idle (190 against 400 GFLOP/s on two cores of a Zen 4)
    bfloat16    in bfloat16 where oneDNN has products for it (AVX-512), else through float32:
                torch's own loop takes ten times as long as that with all conversions

What is taken follows from the CPU alone, not from a clock: a run that goes on in another process
must compute the same bits. oneDNN's product is a private operator of torch, so it is tried once,
and left alone if it is missing or wrong.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PROBE_BOUND = 1e-5  # relative; oneDNN's error against float64 is 3.9e-7, MKL's 2.5e-7


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: (M, in), (out, in) -> (M, out)."""
    if x.dtype == torch.float32 and prefers_onednn():
        return onednn(x, weight)
    return F.linear(x, weight)


def times(dy: Tensor, weight: Tensor) -> Tensor:
    """dy W: (M, out), (out, in) -> (M, in)."""
    if dy.dtype == torch.float32 and prefers_onednn():
        return onednn(dy, weight.t())
    return dy @ weight


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of tensors of that dtype are computed in."""
    return torch.float32 if dtype == torch.bfloat16 and not has_bfloat16() else dtype


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by oneDNN, float32: (M, in), (out, in) of any strides -> (M, out)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN's float32 product is there, right, and on this CPU faster than MKL's."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn_works()


@cache
def onednn_works() -> bool:
    """Whether the private operator is there and multiplies, both ways round."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 70, generator=generator)
    W = torch.randn(50, 70, generator=generator)
    dy = torch.randn(33, 50, generator=generator)
    try:
        found = onednn(x, W), onednn(dy, W.t())
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = x.double() @ W.double().t(), dy.double() @ W.double()
    errors = [(f - e).norm() / e.norm() for f, e in zip(found, expected, strict=True)]
    return bool(max(errors) < PROBE_BOUND)


@cache
def has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products that are worth calling."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


_copies = threading.local()


def converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`: itself, or a copy in this thread's buffer.

    The copy is valid until the next call; do not keep it or write to it.
    """
    if weight.dtype == dtype:
        return weight
    buffers: dict[torch.dtype, Tensor] = _copies.__dict__.setdefault("buffers", {})
    if dtype not in buffers or buffers[dtype].numel() < weight.numel():
        with torch.inference_mode(False):
            buffers[dtype] = torch.empty(weight.numel(), dtype=dtype)
    return buffers[dtype][: weight.numel()].view(weight.shape).copy_(weight)
