"""The GPU suite's tests: the kernels' own, in several processes, and those of the device's memory.

Every process has its time; one that is stopped or red marks the report and costs nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STOPPED = 124  # what a command that ran out of time ends with


def run_tests(only: Sequence[str] = (), seconds: float = 240) -> dict[str, Any]:
    """The kernel tests on this device. only: these files alone, in one process."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest"]
    if only:
        groups, alone = [list(only)], []
    else:
        files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
        compiled = [str(file) for file in files if file.stem == "test_kernels_compiled"]
        others = [str(file) for file in files if file.stem != "test_kernels_compiled"]
        names = collected(command, others)
        if not names:
            return {"green": False, "summary": ["the tests could not be collected"], "seconds": 0}
        workers = max(1, min(8, (os.cpu_count() or 2) - 1))
        groups = [compiled, *(names[at::workers] for at in range(workers))]
        alone = [str(ROOT / "tests" / "optim" / "test_optim_gpu.py")]  # the device to itself
    running = [started([*command, "-q", *group]) for group in groups if group]
    outputs = [finished(process, begin + seconds) for process in running]
    if alone:
        last = started([*command, "-q", *alone])
        outputs.append(finished(last, begin + seconds + 60))
    red = [output[-4000:] for code, output in outputs if code]
    for output in red:
        print(output)
    return {
        "green": not red,
        "red": red,
        "summary": [(output.strip().splitlines() or [""])[-1] for _, output in outputs],
        "seconds": round(time.monotonic() - begin, 1),
    }


def collected(command: Sequence[str], files: Sequence[str]) -> list[str]:
    """The tests' names; none if they cannot be collected, which is printed."""
    listing = subprocess.run(
        [*command, *files, "--collect-only", "-q", "-o", "addopts="],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = [line for line in listing.stdout.splitlines() if "::" in line]
    if listing.returncode or not names:
        print(listing.stdout, listing.stderr, sep="\n")
        return []
    return names


def started(command: Sequence[str], **more: Any) -> subprocess.Popen[str]:
    """A process in a group of its own, so that what it starts can be ended with it."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **more,
    )


def finished(process: subprocess.Popen[str], deadline: float) -> tuple[int, str]:
    """Its exit status and output; past the deadline it is ended, with STOPPED."""
    try:
        output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return STOPPED, f"{output}\nended: it was still running when its time was over"
    return process.returncode, output
