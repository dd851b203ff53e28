"""The process without a model, and the memory that there is."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

# Pages of torch's libraries that a first step touches, with torch 2.13 on a CPU: what a run of a
# model of next to nothing adds, which `python benchmarks/estimates.py --process` measures.
FIRST_STEP_BYTES = 61_000_000
_STATUS, _LIMITS = Path("/proc/self/status"), Path("/sys/fs/cgroup")


def process_bytes() -> int:
    """What a training's process holds besides its model: its imports, measured here, and a step.

    Ask while this process holds no model. torch's Optimizer imports torch._dynamo when it is made.
    """
    import torch._dynamo  # noqa: F401

    import lorax.training.loop  # noqa: F401

    return resident_bytes() + FIRST_STEP_BYTES


def resident_bytes() -> int:
    """Of this process, now; where the system does not tell, its peak so far."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_bytes()


def peak_bytes() -> int:
    """The most that this process has held resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device: str) -> int | None:
    """What a process can still get of a GPU, or of the machine or container; None: unknown."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    found = [size for size in (_machine(), _container()) if size is not None]
    return min(found, default=None)


def _machine() -> int | None:
    """MemAvailable: free, or a cache that can be dropped."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _container() -> int | None:
    """What a cgroup leaves; a cache of files that it counts can be dropped, so that is added."""
    try:
        limit = (_LIMITS / "memory.max").read_text().strip()
        used = int((_LIMITS / "memory.current").read_text())
        kept = (_LIMITS / "memory.stat").read_text().split()
        files = int(kept[kept.index("file") + 1])
        return None if limit == "max" else int(limit) - used + files
    except (OSError, ValueError):
        return None
