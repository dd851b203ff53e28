"""The save protocol: files that a crash or a loss of power leaves whole, or not there at all.

    .tmp-x/         made beside the target
    .tmp-x/FILE     written, then flushed to the disk, one after the other
    .tmp-x/         flushed: the names are on the disk too
    target          by one rename of .tmp-x
    parent          flushed: the rename is on the disk too

Whatever happens in between, a reader finds the target as it was or the new one. `Disk` is all that
the protocol does to a file system; a test puts another one in its place, which stops at each
operation in turn and forgets what was not flushed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lorax.errors import EnvironmentProblem
from lorax.formats.litter import hidden_directory

Writer = Callable[[Path], object]  # writes one whole file at the path that it is given


class Disk:
    """The operations of the save protocol, on the real file system."""

    def make_directory(self, path: Path) -> None:
        """Make a directory with the mode that the umask leaves."""
        path.mkdir(parents=True)

    def write(self, path: Path, writer: Writer) -> None:
        """Let `writer` write the file; what it wrote may still be in memory only."""
        writer(path)
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)  # safetensors leaves 0600

    def sync(self, path: Path) -> None:
        """Flush a file's content, or a directory's names, to the disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or directory another name, in one step."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """Remove a directory with all that is in it."""
        shutil.rmtree(path, ignore_errors=True)


def write_whole(target: Path, files: dict[str, Writer], disk: Disk) -> None:
    """Write a directory of files by the protocol; `target` must not be there.

    The files are written in the order given, so the last one can speak of the others. Where
    something goes wrong nothing is left.

    Raises:
        OSError: the disk is full or refuses.
    """
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    disk.remove(temporary)
    try:
        disk.make_directory(temporary)
        for name, writer in files.items():
            disk.write(temporary / name, writer)
            disk.sync(temporary / name)
        disk.sync(temporary)
        disk.rename(temporary, target)
    except BaseException:
        disk.remove(temporary)
        raise
    disk.sync(target.parent)


def write_file_whole(target: Path, writer: Writer, disk: Disk) -> None:
    """Write a single large file by the protocol, out of a hidden directory beside it.

    Raises:
        OSError: the disk is full or refuses; nothing is left of the attempt.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with hidden_directory(target.name, target.parent) as temporary:
        disk.write(temporary / target.name, writer)
        disk.sync(temporary / target.name)
        disk.rename(temporary / target.name, target)
    disk.sync(target.parent)


def write_text_whole(path: Path, text: str) -> None:
    """`write_bytes_whole` of a text in UTF-8."""
    write_bytes_whole(path, text.encode())


def write_report(path: Path, content: bytes) -> None:
    """`write_bytes_whole` of a page or picture that a user asked for.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    try:
        write_bytes_whole(path, content)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: cannot be written ({error.strerror}); give another path"
        ) from None


def write_bytes_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole, or not at all; what was there stays till then.

    Raises:
        OSError: the disk is full or refuses; nothing is left of the attempt.
    """
    if path.exists() and not path.is_file():  # a pipe, a terminal
        path.write_bytes(content)
        return
    target = path.resolve()  # through a link
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
