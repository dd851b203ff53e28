"""Allocators of optimizer state: ordinary memory here, CUDA unified memory in paged.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorax.optim.flat import Page


class Memory(ABC):
    """Allocates state memory and wraps the loop over pages.

    one_by_one: each page must be stepped before the next one is requested from `walk`.
    """

    one_by_one = False

    @abstractmethod
    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """(nbytes,) uint8 on `device`, zeroed; freed with the last tensor that views it."""

    @abstractmethod
    def walk(self, pages: Sequence[Page]) -> Iterator[Page]:
        """Yield the pages in order, each once the device may access it."""

    @abstractmethod
    def fresh(self) -> Memory:
        """A new allocator with the same settings and no allocations."""


class OrdinaryMemory(Memory):
    """Plain torch allocations; `walk` yields the pages as they are."""

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """(nbytes,) uint8 of torch's allocator, zeroed."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def walk(self, pages: Sequence[Page]) -> Iterator[Page]:
        """The pages in order."""
        yield from pages

    def fresh(self) -> Memory:
        """Another one; nothing to carry over."""
        return OrdinaryMemory()
