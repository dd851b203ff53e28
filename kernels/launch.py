"""How a kernel is started: one door for running, and for compiling without a GPU.

Every host function of this package allocates through `empty` and starts kernels through `launch`.
So a test can put canaries around each buffer, and `compile_only` can ask the shipped host code,
with the shipped configurations, what it would have started on a GPU that is not there:

    with compile_only(90) as compiled:          # sm_90: an H100
        dequantize(packed, absmax, ...)         # returns without computing anything
    compiled[0].asm["cubin"]                    # what ptxas made for that GPU

Nothing here asks CUDA anything when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARP_SIZE = 32

_compiled: list[Any] | None = None  # where `compile_only` collects
_capability: int | None = None  # the GPU that `compile_only` pretends to have
_allocate = torch.empty  # a test puts an allocator with canaries here
_counters: dict[tuple[torch.device, int], Tensor] = {}


def empty(
    shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """A buffer with nothing in it, for an output or a scratch."""
    return _allocate(shape, dtype=dtype, device=device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` over `grid`, on its first tensor's device; an empty grid starts nothing."""
    if 0 in grid:
        return
    if _compiled is not None:
        _compiled.append(kernel.warmup(*args, grid=grid, **options))
        return
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*args, **options)


def capability(device: torch.device) -> int:
    """The compute capability kernels are made for, as 10 * major + minor: 90 on an H100.

    Without a GPU (the interpreter) it is 90, so that the interpreter runs the tiles of an H100.
    """
    if _capability is not None:
        return _capability
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv, called from the host, takes ten microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def runs_assembly(device: torch.device) -> bool:
    """Whether inline assembly runs, or is compiled: not in the interpreter."""
    return _capability is not None or device.type == "cuda"


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros: one buffer a device and stream, or one for this launch alone.

    Programs that share a tile count their arrivals here; the last one sets its counter to zero
    again, so a stream's buffer needs no launch to clear it. A captured launch has its own: graphs
    captured on one stream may be replayed side by side, and memory made during a capture is the
    graph's. It costs the graph one more node, a memset.
    """
    if capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, _stream(device))
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return _counters[key]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph takes down what this stream is given, instead of doing it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def split_buffers(
    device: torch.device, tiles: int, splits: int, size: int
) -> tuple[Tensor | None, Tensor | None]:
    """What common.sum_of_splits needs: the programs' parts and the arrival counters."""
    if splits == 1:
        return None, None
    return empty((tiles * splits * size,), torch.float32, device), counters(device, tiles)


class _Driver:
    """Answers what Triton asks a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # the key of Triton's cache: one for each capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, WARP_SIZE)


@contextmanager
def compile_only(capability: int) -> Iterator[list[Any]]:
    """Inside, `launch` compiles for sm_`capability` and collects Triton's compiled kernels.

    Host functions still allocate; their outputs hold nothing. No GPU and no CUDA driver is needed.
    Not for use beside real launches: Triton's driver is a global.
    """
    global _compiled, _capability
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(capability))
    _compiled, _capability = [], capability
    try:
        yield _compiled
    finally:
        _compiled, _capability = None, None
        driver._active = before
