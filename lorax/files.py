"""A path that must be there; and a small file read whole, only a regular one, up to a size.

Opening a FIFO would block, /dev/zero would never end, and a link may lead to either.
"""

import codecs
import os
import stat
from pathlib import Path

from lorax.errors import EnvironmentProblem


def read_bounded(path: Path, max_bytes: int | None = None) -> bytes:
    """The file's bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than max_bytes; the message
            says which.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise OSError("it is no regular file")
    if max_bytes is not None and info.st_size > max_bytes:
        raise OSError(f"{info.st_size} bytes; expected at most {max_bytes}")
    with path.open("rb") as file:
        return file.read() if max_bytes is None else file.read(max_bytes)


def as_text(data: bytes) -> str:
    """UTF-8 with or without its mark, or UTF-16 with it; line ends stay as they are.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf16 else "utf-8-sig")


def read_start(path: Path, size: int) -> bytes:
    """The first bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")
    with path.open("rb") as file:
        return file.read(size)


def why_unreadable(path: Path, error: object) -> str:
    """What is wrong with a file: that it is another one under this name, else the error.

    A clone without Git LFS leaves pointers of three lines, a failed download a page of HTML.
    """
    try:
        start = read_start(path, 200)
    except OSError:
        return str(error)
    if start.startswith(b"version ") and b"git-lfs" in start:
        return "it is a pointer of Git LFS: git lfs pull brings the file"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page"
    packed = [name for name, magic in _PACKED.items() if start.startswith(magic)]
    return f"it is packed by {packed[0]}: unpack it first" if packed else str(error)


_PACKED = {
    "gzip": b"\x1f\x8b",
    "zip": b"PK\x03\x04",
    "zstd": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ",
    "bzip2": b"BZh",
}


def require(path: str | os.PathLike[str]) -> Path:
    """The path with `~` filled in, if something is there.

    Raises:
        EnvironmentProblem: nothing is, or a directory above it cannot be looked into. Every command
            gives a path that is missing the same exit code.
    """
    found = Path(path).expanduser()
    try:
        found.lstat()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(
            f"{found}: cannot be read ({reason}); give a path that exists"
        ) from None
    return found
