"""Damaged files: what a bad disk or a stranger makes of good ones."""

import gc
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lorax.errors import LoraxError

# `make nightly` asks for 5,000 of each kind.
MUTATIONS = int(os.environ.get("LORAX_MUTATIONS", "200"))
MAX_SECONDS, MAX_MEGABYTES = 1.0, 512

SCRAPS = [
    *(b"", b"\x00", b"\xff", b"\n", b'"', b"{}", b"[]", b"null", b"true", b"-1", b"0", b"1e400"),
    *(b"99999999999999999999", b"\\ud800", b"[[[[", b"\xff" * 8, b"\x00" * 8, b"NaN", b"1.5"),
    *(b"2147483648", b"9223372036854775807", b"\xef\xbb\xbf", b'""', b"={", b"''''", b","),
]


def refused_mutations(file: Path, load: Callable[[], object], name: str) -> int:
    """Load the file wounded in MUTATIONS ways; how many of them a LoraxError refuses.

    Fails where anything else escapes, or a file takes more than a second of computing, or all of
    them together make the process grow by more than half a gigabyte.
    """
    content, chance = file.read_bytes(), random.Random(name)
    load()  # unharmed, it loads
    with nothing_to_collect():
        return _refused(file, content, chance, load)


@contextmanager
def nothing_to_collect() -> Iterator[None]:
    """Inside, the collector passes over what other tests left, which is no file's time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _refused(file: Path, content: bytes, chance: random.Random, load: Callable[[], object]) -> int:
    before, refused = psutil.Process().memory_info().rss, 0
    for number in range(MUTATIONS):
        file.write_bytes(mutated(content, chance))
        started = time.process_time()
        try:
            load()
        except LoraxError:
            refused += 1
        except BaseException as error:
            pytest.fail(f"mutation {number}: {error!r} escaped from {file.read_bytes()[:3000]!r}")
        seconds = time.process_time() - started
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        if seconds > MAX_SECONDS or grown > MAX_MEGABYTES:
            pytest.fail(
                f"mutation {number}: {seconds:.1f} s, {grown:.0f} MB: {file.read_bytes()[:3000]!r}"
            )
    file.write_bytes(content)
    return refused


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with one to three wounds: a flipped byte, a cut, a scrap, a value replaced."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 3])):
        # Binary files keep their structure at the beginning: wound that more often.
        end = len(data) if chance.random() < 0.3 else min(len(data), 2000)
        place = chance.randrange(end + 1)
        kind = chance.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = chance.randrange(256)
        elif kind == 2:
            del data[place : place + chance.choice([1, 2, 8, 100])]
        elif kind == 3:
            data[place:place] = chance.choice(SCRAPS)
        elif kind == 4:
            scrap = chance.choice(SCRAPS)
            data[place : place + len(scrap)] = scrap
        elif chance.random() < 0.2:
            del data[place:]
        else:
            _replace_value(data, chance)
    return bytes(data)


def _replace_value(data: bytearray, chance: random.Random) -> None:
    """Put a scrap where a JSON or TOML value stands."""
    starts = [i + 1 for i, byte in enumerate(data[:4000]) if byte in b":="]
    if starts:
        start = chance.choice(starts)
        stop = next((i for i in range(start, len(data)) if data[i] in b",}\n"), len(data))
        data[start:stop] = b" " + chance.choice(SCRAPS)
