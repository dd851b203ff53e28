"""A path that must be there; and a small file read whole, only a regular one, up to a size.

Opening a FIFO would block, /dev/zero would never end, and a link may lead to either.
"""

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
