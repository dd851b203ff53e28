"""glibc's heap, as far as large blocks go: what a process holds beyond what is in use.

Tensors on a CPU are blocks of malloc's. It serves a block from the smallest hole that fits, else
from the heap's end, which grows; a block above a threshold that no hole fits is mapped by itself.
The threshold starts at 128 kB and rises to the size of each mapped block that is freed, up to 32
MB, so in the end nearly all lie in the heap; holes between blocks that live longer stay resident.

torch asks for blocks at multiples of 64 bytes. For that malloc looks for 96 bytes more and gives
back what it does not need, so a hole that a block has left is too small for the next one of its
size (malloc.c of glibc 2.36: `_int_memalign`, `_int_malloc`, `sysmalloc`, `_int_free`, `systrim`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

_THRESHOLD, _MOST = 128 * 1024, 32 * 1024**2
_TOP_PAD, _PAGE, _ALIGNMENT, _LEAST = 128 * 1024, 4096, 64, 32


class Heap:
    """Blocks by name; `resident` is what heap and mapped blocks take, `peak` its largest."""

    def __init__(self) -> None:
        self._threshold = self._trim = _THRESHOLD
        self._end = self._top = 0  # of the heap; of its used part
        self._blocks: dict[Hashable, tuple[int, int]] = {}  # (address, size); mapped: -1
        self._by_size: list[tuple[int, int]] = []  # holes: (size, address)
        self._starts: dict[int, int] = {}  # hole's address -> size
        self._stops: dict[int, int] = {}  # hole's end -> address
        self._mapped = 0
        self.peak = 0

    @property
    def resident(self) -> int:
        """Bytes."""
        return self._end + self._mapped

    def allocate(self, name: Hashable, nbytes: int) -> None:
        """A block, by the name under which it is freed."""
        size = -(-(nbytes + 8) // 16) * 16
        asked = size + _ALIGNMENT + _LEAST
        at = bisect_left(self._by_size, (asked, -1))
        if at < len(self._by_size):
            hole, address = self._by_size[at]
            self._take(address)
        elif self._end - self._top >= asked:
            hole, address = asked, self._top
            self._top += asked
        elif asked >= self._threshold:
            hole, address = -(-asked // _PAGE) * _PAGE, -1
            self._mapped += hole
        else:
            hole, address = asked, self._top
            self._top += asked
            self._end = -(-(self._top + _TOP_PAD) // _PAGE) * _PAGE
        self._blocks[name] = address, hole
        if address >= 0:
            self._cut(name, address, hole, size)
        self.peak = max(self.peak, self.resident)

    def _cut(self, name: Hashable, address: int, hole: int, size: int) -> None:
        """Keep the aligned part of a hole, and give back what lies before and behind it."""
        before = -(address + 16) % _ALIGNMENT
        if 0 < before < _LEAST:
            before += _ALIGNMENT
        start, stop = address + before, address + hole
        if stop - start - size >= _LEAST:
            self._give(start + size, stop)
            stop = start + size
        if before:
            self._give(address, start)
        self._blocks[name] = start, stop - start

    def free(self, name: Hashable) -> None:
        """Give the block back: to the holes, or to the system."""
        address, size = self._blocks.pop(name)
        if address < 0:
            self._mapped -= size
            if self._threshold < size <= _MOST:
                self._threshold, self._trim = size, 2 * size
            return
        self._give(address, address + size)
        if self._end - self._top >= self._trim:
            self._end = -(-(self._top + _TOP_PAD) // _PAGE) * _PAGE

    def _give(self, address: int, stop: int) -> None:
        """A stretch becomes a hole, together with those that it touches, or a part of the top."""
        if stop in self._starts:
            stop += self._take(stop)
        if address in self._stops:
            before = self._stops[address]
            self._take(before)
            address = before
        if stop < self._top:
            self._put(address, stop - address)
        else:
            self._top = address

    def _put(self, address: int, size: int) -> None:
        insort(self._by_size, (size, address))
        self._starts[address], self._stops[address + size] = size, address

    def _take(self, address: int) -> int:
        size = self._starts.pop(address)
        del self._stops[address + size]
        del self._by_size[bisect_left(self._by_size, (size, address))]
        return size
