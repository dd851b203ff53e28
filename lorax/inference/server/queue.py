"""Who waits for a slot, and whose turn it is.

The turn is that of the adapter with the fewest answers under way; among those with as few, of the
one whose first request has waited longest. So an adapter with a thousand requests leaves the others
their share of the slots, and within an adapter it is first come, first served.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from lorax.inference.server.answer import Answer


class FairQueue:
    """Answers without a slot, by their adapters. One thread at a time."""

    def __init__(self) -> None:
        self._waiting: dict[str | None, deque[tuple[int, Answer]]] = {}
        self._came = 0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, answer: Answer) -> None:
        """Behind all others of its adapter."""
        self._came += 1
        self._waiting.setdefault(answer.row.adapter, deque()).append((self._came, answer))

    def first(self, running: Iterable[str | None]) -> Answer:
        """Whose turn it is, beside answers with these adapters; it stays in the queue."""
        counts = Counter(running)
        line = min(self._waiting.values(), key=lambda line: (counts[_adapter(line)], line[0][0]))
        return line[0][1]

    def remove(self, answer: Answer) -> None:
        """Take one out, wherever it stands."""
        adapter = answer.row.adapter
        line = self._waiting[adapter]
        if line[0][1] is answer:
            line.popleft()
        else:
            self._waiting[adapter] = line = deque(one for one in line if one[1] is not answer)
        if not line:
            del self._waiting[adapter]

    def all(self) -> list[Answer]:
        """Everyone who waits."""
        return [answer for line in self._waiting.values() for _, answer in line]


def _adapter(line: deque[tuple[int, Answer]]) -> str | None:
    return line[0][1].row.adapter
