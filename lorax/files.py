"""Reading a small file whole: only a regular one, and only up to a size.

Opening a FIFO would block, /dev/zero would never end, and a link may lead to either.
"""

import stat
from pathlib import Path


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
