"""Two directories that change places in one step, so that a reader sees the one or the other.

    renameat2(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE)       Linux, most file systems

Python has no name for it.
"""

import ctypes
import errno
import os
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Swap them; False where this system or this file system cannot.

    Raises:
        OSError: it can, and refuses: one of them is not there, or the directory is not ours.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # no glibc of 2018 or later
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(other))
