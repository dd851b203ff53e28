"""What the C library's heap keeps of freed tensors, for programs that pass many through."""

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_THRESHOLD = 128 * 1024  # bytes; glibc's own first value


def give_memory_back() -> None:
    """Make glibc return every freed block of 128 kB or more to the system, from now on.

    By itself glibc raises that threshold to the size of the blocks that it sees freed, up to 32 MB:
    a process that passes a model through then holds two or three shards, by luck of the order
    (writing shards of 40 MB: 71 to 209 MB in five runs, 65 MB with the threshold fixed). It costs
    page faults, so it is for converting files, not for training. Without glibc nothing happens.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
    except (AttributeError, OSError, TypeError):
        return
