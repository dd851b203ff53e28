"""Paged optimizers (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3), made visible.

Optimizer states are used once a step and lie idle through forward and backward, when activations
need the memory. So they live in CUDA's unified memory (`unified_memory.py`), on the host, and visit
the GPU for their step:

    side stream    in 0 | in 1 |      out 0 | in 2 |      out 1 | in 3 | ...
    main stream         | step page 0 | wait, step page 1 | wait, step page 2 | ...

One page ahead is prefetched while the page before is stepped; a page that has been stepped goes
back at once, behind the next forward pass. A page is `flat.py`'s: many small tensors, so that LoRA
matrices are paged like any other state. (bitsandbytes pages tensor by tensor, and none below
100,000 elements.)

What moved is counted in `optimizer.paging`. `forced_pressure=True` drives all pages out before each
step and waits until they are gone, as a GPU short of memory would: the numbers must not change by a
bit, and the counters must.

On a machine without CUDA the same classes work on ordinary memory, and the counters stay at zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorax.optim.adamw import AdamW
from lorax.optim.adamw8bit import AdamW8bit
from lorax.optim.flat import Page
from lorax.optim.memory import Memory, OrdinaryMemory
from lorax.optim.unified_memory import HOST, ManagedBlock, cuda_runtime


@dataclass
class PagingCounters:
    """Bytes moved and seconds waited since the optimizer was built.

    managed_bytes: unified memory held now.
    waited_seconds: time that the GPU's main stream waited for pages.
    """

    managed_bytes: int = 0
    prefetched_in_bytes: int = 0
    prefetched_out_bytes: int = 0
    waited_seconds: float = 0.0


class PagedMemory(Memory):
    """Managed memory where the device is a GPU, ordinary memory elsewhere.

    Args:
        write_back: prefetch each page to the host after its step; otherwise the driver evicts it
            when other allocations need GPU memory.
        forced_pressure: move all pages to the host before each step, and wait until they are there.
    """

    one_by_one = True

    def __init__(self, write_back: bool = True, forced_pressure: bool = False):
        self.write_back = write_back
        self.forced_pressure = forced_pressure
        self._counters = PagingCounters()
        self._pagers: dict[torch.device, Pager] = {}
        self._blocks: weakref.WeakSet[ManagedBlock] = weakref.WeakSet()
        self._ordinary = OrdinaryMemory()

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """(nbytes,) uint8, zeroed: managed memory on CUDA, plain memory elsewhere."""
        if device.type != "cuda":
            return self._ordinary.allocate(nbytes, device)
        if device not in self._pagers:
            self._pagers[device] = Pager(device, self._counters)
        with torch.cuda.device(device):
            block = ManagedBlock(nbytes, self._pagers[device].number)
            self._blocks.add(block)
            return block.tensor(device)

    def walk(self, pages: Sequence[Page]) -> Iterator[Page]:
        """The pages in order; on CUDA the next one is fetched while this one is used."""
        for device in dict.fromkeys(page.memory.device for page in pages):
            here = [page for page in pages if page.memory.device == device]
            if device in self._pagers:
                yield from self._walk(self._pagers[device], here)
            else:
                yield from here

    def fresh(self) -> Memory:
        """Empty, with the same settings."""
        return PagedMemory(self.write_back, self.forced_pressure)

    def __reduce__(self) -> tuple[type[PagedMemory], tuple[bool, bool]]:
        """Pickle the settings only; allocations stay in this process."""
        return PagedMemory, (self.write_back, self.forced_pressure)

    def counters(self) -> PagingCounters:
        """The paging counters, up to date."""
        for pager in self._pagers.values():
            pager.add_up_waits()
        self._counters.managed_bytes = sum(block.nbytes for block in self._blocks)
        return self._counters

    def _walk(self, pager: Pager, pages: list[Page]) -> Iterator[Page]:
        if self.forced_pressure:
            pager.drive_out([page.memory for page in pages])
        arrival = pager.bring_in(pages[0].memory)
        for page, following in zip(pages, [*pages[1:], None], strict=True):
            arrived = arrival
            if following is not None:
                arrival = pager.bring_in(following.memory)
            pager.wait_for(arrived)
            yield page
            if self.write_back:
                pager.send_back(page.memory)


class Pager:
    """Prefetches pages of one GPU on a side stream and updates the counters.

    Args:
        device: the GPU.
        counters: shared by the pagers of an optimizer.
    """

    def __init__(self, device: torch.device, counters: PagingCounters):
        self.number = torch.cuda.current_device() if device.index is None else device.index
        self._runtime = cuda_runtime()
        self._side = torch.cuda.Stream(device)
        self._counters = counters
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def bring_in(self, memory: Tensor) -> torch.cuda.Event:
        """Start moving a page to the GPU; the event is its arrival."""
        self._move(memory, self.number)
        self._counters.prefetched_in_bytes += memory.nbytes
        return self._side.record_event()

    def wait_for(self, arrival: torch.cuda.Event) -> None:
        """Let the main stream wait for an arrival, and time it."""
        main = torch.cuda.current_stream(self.number)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(main)
        main.wait_event(arrival)
        after.record(main)
        self._waits.append((before, after))
        self.add_up_waits()

    def send_back(self, memory: Tensor) -> None:
        """Move a page to the host once the main stream is done with it."""
        self._side.wait_stream(torch.cuda.current_stream(self.number))
        self._move(memory, HOST)
        self._counters.prefetched_out_bytes += memory.nbytes

    def drive_out(self, memories: list[Tensor]) -> None:
        """Move pages to the host and return when they are there."""
        for memory in memories:
            self.send_back(memory)
        self._side.synchronize()

    def add_up_waits(self) -> None:
        """Count the waits that are over; those in flight are counted later."""
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.pop(0)
            self._counters.waited_seconds += before.elapsed_time(after) / 1000

    def _move(self, memory: Tensor, device: int) -> None:
        stream = self._side.cuda_stream
        self._runtime.prefetch(memory.data_ptr(), memory.nbytes, device, stream)


class PagedAdamW(AdamW):
    """AdamW with its states in paged memory: `AdamW`'s arguments, and `PagedMemory`'s.

    `paging` are the counters.
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        write_back: bool = True,
        forced_pressure: bool = False,
        **kwargs: Any,
    ):
        memory = PagedMemory(write_back, forced_pressure)
        super().__init__(params, *args, memory=memory, **kwargs)

    @property
    def paging(self) -> PagingCounters:
        """The paging counters, up to date."""
        return paging_counters(self)


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit with its states in paged memory: `AdamW8bit`'s arguments, and `PagedMemory`'s.

    `paging` are the counters.
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        write_back: bool = True,
        forced_pressure: bool = False,
        **kwargs: Any,
    ):
        memory = PagedMemory(write_back, forced_pressure)
        super().__init__(params, *args, memory=memory, **kwargs)

    @property
    def paging(self) -> PagingCounters:
        """The paging counters, up to date."""
        return paging_counters(self)


def paging_counters(optimizer: AdamW) -> PagingCounters:
    """The counters of an optimizer whose states are in paged memory."""
    assert isinstance(optimizer.memory, PagedMemory)
    return optimizer.memory.counters()
