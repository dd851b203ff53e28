"""Hidden directories to write into, and what a killed process left of them.

    .tmp-NAME-x3f8     made beside NAME; locked while its process lives, however that ends

The next write to NAME removes those that nobody has locked.
"""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Those of this process: a write inside one may put another directory in its place, without lock.
_ours: set[Path] = set()


@contextmanager
def hidden_directory(name: str, home: Path) -> Iterator[Path]:
    """A directory in `home` for one write to `name`; gone on leaving, if it is still there.

    Raises:
        OSError: it cannot be made.
    """
    prefix = f".tmp-{name[:100]}-"
    for old in home.glob(f"{glob.escape(prefix)}*"):
        if old not in _ours:
            _remove_if_left(old)
    directory, lock = _locked(prefix, home)
    _ours.add(directory)
    try:
        yield directory
    finally:
        _ours.discard(directory)
        shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(prefix: str, home: Path) -> tuple[Path, int | None]:
    while True:  # between the two lines another write may take it for litter
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
        lock = _lock(directory)
        if directory.exists():
            return directory, lock


def _remove_if_left(directory: Path) -> None:
    lock = _lock(directory)
    if lock is not None:  # nobody writes there
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _lock(directory: Path) -> int | None:
    """A lock on the directory; None where another has it, or where there are none."""
    try:
        import fcntl
    except ImportError:  # Windows: litter stays
        return None
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
