"""Where an optimizer's states live: in ordinary memory here, in paged memory in `paged.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorax.optim.flat import Page


class Memory(ABC):
    """Gives out memory, and knows what must happen before and after a page is stepped.

    `one_by_one`: a page must have been stepped before `walk` is asked for the next one.
    """

    one_by_one = False

    @abstractmethod
    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """(nbytes,) uint8 on `device`, zeroed; freed with the last tensor that looks into it."""

    @abstractmethod
    def walk(self, pages: Sequence[Page]) -> Iterator[Page]:
        """The pages in their order, each when the device may work on it."""

    @abstractmethod
    def fresh(self) -> Memory:
        """Another one with the same settings, that has given out nothing yet."""


class OrdinaryMemory(Memory):
    """What torch allocates; nothing happens around a step."""

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """See `Memory`."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def walk(self, pages: Sequence[Page]) -> Iterator[Page]:
        """See `Memory`."""
        yield from pages

    def fresh(self) -> Memory:
        """See `Memory`."""
        return OrdinaryMemory()
