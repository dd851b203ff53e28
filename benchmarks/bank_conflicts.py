"""How often a warp reads shared memory for one look-up in a byte's table, simulated.

Shared memory has 32 banks of 4 bytes. In one wavefront each bank gives one word to all threads that
want that word; threads that want different words of a bank wait for another wavefront. Which entry
a thread wants is random. A table may hold each entry several times, so that threads with different
copies meet in different banks; which copy a thread takes hangs on the layout that the compiler
chose for the look-up's index. So the number of copies and the layout are read from what was
compiled.
"""

from __future__ import annotations

import random
import re

BANKS, LANES, ENTRIES = 32, 32, 256
GATHER = re.compile(
    r"tt\.gather .*\(tensor<(\d+)xi(32|64), #\w+>, tensor<\d+xi32, (#\w+)>\) -> tensor"
)
WORDS = 4  # neighbouring places that take one copy: place // WORDS % copies


def positions(ttgir: str, layout: str) -> list[int]:
    """Which place of the flat index each lane of the first warp holds first."""
    (line,) = re.findall(rf"^{layout} = (.*)$", ttgir, re.M)
    if blocked := re.search(r"sizePerThread = \[(\d+)\], threadsPerWarp = \[32\]", line):
        return [lane * int(blocked[1]) for lane in range(LANES)]
    (lanes,) = re.findall(r"lane = \[((?:\[\d+\](?:, )?)+)\]", line)
    bases = [int(base) for base in re.findall(r"\d+", lanes)]
    return [sum(base for bit, base in enumerate(bases) if lane >> bit & 1) for lane in range(LANES)]


def wavefronts_a_gather(ttgir: str, draws: int = 400) -> float | None:
    """The mean over random bytes, of the kernel's first look-up; None where it has none.

    The least is 1 for a table of 32-bit entries, 2 for one of 64 bits.
    """
    found = GATHER.search(ttgir)
    if found is None:
        return None
    size, words, layout = int(found[1]), int(found[2]) // 32, found[3]
    copies = size // ENTRIES
    places = positions(ttgir, layout)
    chosen = random.Random(0)
    total = 0
    for _ in range(draws):
        entries = [chosen.randrange(ENTRIES) * copies + place // WORDS % copies for place in places]
        for begin in range(0, LANES, LANES // words):  # 64-bit words: half a warp at a time
            total += _wavefronts(entries[begin : begin + LANES // words], words)
    return round(total / draws, 2)


def _wavefronts(entries: list[int], words: int) -> int:
    wanted: dict[int, set[int]] = {}
    for entry in entries:
        wanted.setdefault(entry % (BANKS // words), set()).add(entry)
    return max(len(different) for different in wanted.values())
