"""CUDA unified memory: one address, pages that move between the GPU's memory and the host's.

    cudaMallocManaged      an address that CPU and GPU both may use; a page (4 KiB to 2 MiB) lies on
                           one side and moves when the other side touches it
    cudaMemAdvise          where pages should stay, and who maps them
    cudaMemPrefetchAsync   move pages now, on a stream, instead of one fault after the other

torch takes no managed memory through DLPack, but it does by `__cuda_array_interface__`: a tensor
made from a `ManagedBlock` looks into its pages and holds the block, and the block's memory is freed
when the last such tensor is gone.

Two forms of the calls are in use. CUDA 12 names a place by a device's number (-1 is the host), CUDA
13 by a location with a type. `Runtime` knows both, and is the only one that talks to cuda-bindings,
which is imported when the first block is asked for.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorax.errors import EnvironmentProblem

HOST = -1  # a device number, as CUDA 12 writes it
_live_bytes = 0


def live_bytes() -> int:
    """The managed bytes that this process holds now, over all optimizers."""
    return _live_bytes


class Runtime:
    """The few calls of the CUDA runtime that paging needs.

    Args:
        runtime: `cuda.bindings.runtime`, or what behaves like it.
        major: the major version of cuda-bindings: 12 or 13 decides the calls' form.
    """

    def __init__(self, runtime: Any, major: int):
        self._runtime = runtime
        self._by_location = major >= 13

    def malloc(self, nbytes: int) -> int:
        """A pointer to `nbytes` managed bytes, not cleared."""
        flags = self._runtime.cudaMemAttachGlobal
        return int(self._call("cudaMallocManaged", nbytes, flags))

    def free(self, pointer: int) -> None:
        """Give a managed pointer back; waits for the work on it."""
        self._call("cudaFree", pointer)

    def keep_on_host(self, pointer: int, nbytes: int, device: int) -> None:
        """Say that pages belong to the host when nobody needs them, and that `device` uses them."""
        advice = self._runtime.cudaMemoryAdvise
        preferred, used_by = (
            advice.cudaMemAdviseSetPreferredLocation,
            advice.cudaMemAdviseSetAccessedBy,
        )
        self._call("cudaMemAdvise", pointer, nbytes, preferred, self._place(HOST))
        self._call("cudaMemAdvise", pointer, nbytes, used_by, self._place(device))

    def prefetch(self, pointer: int, nbytes: int, device: int, stream: int) -> None:
        """Move pages to `device` (or `HOST`), in the order of `stream`."""
        flags = (0,) if self._by_location else ()
        self._call("cudaMemPrefetchAsync", pointer, nbytes, self._place(device), *flags, stream)

    def can_page(self, device: int) -> bool:
        """Whether CPU and GPU may use managed memory at once, page by page (Linux, Pascal on)."""
        attribute = self._runtime.cudaDeviceAttr.cudaDevAttrConcurrentManagedAccess
        return bool(self._call("cudaDeviceGetAttribute", attribute, device))

    def is_managed(self, pointer: int) -> bool:
        """Whether a pointer is managed memory."""
        kind = self._call("cudaPointerGetAttributes", pointer).type
        return bool(kind == self._runtime.cudaMemoryType.cudaMemoryTypeManaged)

    def _place(self, device: int) -> Any:
        if not self._by_location:
            return device
        kinds = self._runtime.cudaMemLocationType
        location = self._runtime.cudaMemLocation()
        on_host = device == HOST
        location.type = (
            kinds.cudaMemLocationTypeHost if on_host else kinds.cudaMemLocationTypeDevice
        )
        location.id = 0 if on_host else device
        return location

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._runtime, name)(*arguments)
        if int(error) != 0:
            raise EnvironmentProblem(
                f"{name} failed with {error.name}; paged optimizers need managed memory: use adamw "
                "or adamw-8bit instead"
            )
        return results[0] if results else None


@cache
def cuda_runtime() -> Runtime:
    """The machine's CUDA runtime.

    Raises:
        EnvironmentProblem: cuda-bindings is not installed.
    """
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
        version = importlib.metadata.version("cuda-bindings")
    except ImportError as error:
        raise EnvironmentProblem(
            f"paged optimizers on a GPU need cuda-bindings ({error}): "
            f"pip install 'cuda-bindings=={torch.version.cuda}.*'"
        ) from None
    return Runtime(runtime, int(version.split(".")[0]))


class ManagedBlock:
    """Managed memory that torch can look into, zeroed, its pages on the host at first.

    Args:
        nbytes: above 0.
        device: the GPU's number.
        runtime: for tests; the machine's otherwise.
    """

    def __init__(self, nbytes: int, device: int, runtime: Runtime | None = None):
        runtime = runtime or cuda_runtime()
        if not runtime.can_page(device):
            raise EnvironmentProblem(
                f"cuda:{device} cannot page managed memory while the CPU uses it (Linux and a GPU "
                "from Pascal on can); use adamw or adamw-8bit instead"
            )
        self.pointer = runtime.malloc(nbytes)
        self.nbytes = nbytes
        _count(nbytes)
        self._finalizer = weakref.finalize(self, _free, runtime, self.pointer, nbytes)
        self._finalizer.atexit = False  # the driver is gone by then, and frees all itself
        runtime.keep_on_host(self.pointer, nbytes, device)
        ctypes.memset(self.pointer, 0, nbytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
        }

    def tensor(self, device: torch.device) -> Tensor:
        """(nbytes,) uint8 on `device`, in these pages; it keeps the block alive."""
        return torch.as_tensor(self, device=device)


def _free(runtime: Runtime, pointer: int, nbytes: int) -> None:
    runtime.free(pointer)
    _count(-nbytes)


def _count(nbytes: int) -> None:
    global _live_bytes
    _live_bytes += nbytes
