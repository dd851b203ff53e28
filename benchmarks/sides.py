"""Two programs measured against each other in one run.

Each side lives in a process of its own, so that its memory is its own, and does a step when it is
asked for one. The parent asks the sides in turn, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Side:
    """A process that prepares once and then makes a step whenever it is asked."""

    def __init__(self, script: str, name: str, *arguments: str):
        command = [sys.executable, script, "--side", name, *arguments]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answers: list[dict[str, float]] = []

    @property
    def seconds(self) -> list[float]:
        """Of each step since the last warm one."""
        return [answer["seconds"] for answer in self.answers]

    def ready(self) -> None:
        self._answer()

    def step(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.answers.append(self._answer())
        return self.answers[-1]["seconds"]

    def finish(self) -> dict[str, Any]:
        """Median of what each step said, and the peak of resident memory in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write("finish\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.process.wait()
        said = {key: [step[key] for step in self.answers] for key in self.answers[0]}
        return {**{key: statistics.median(values) for key, values in said.items()}, **answer}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # libraries print what they like in between
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with {self.process.wait()}; see above")


def serve(step: Callable[[], float | dict[str, float] | None]) -> None:
    """The side's end: answer the parent until it has enough.

    step: gives its seconds where a part of it only is to be timed; or several numbers by their
        names, "seconds" among them.
    """
    before = _peak_bytes()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "finish":
            peak = _peak_bytes()
            print(json.dumps({"peak_bytes": peak, "grown_bytes": peak - before}), flush=True)
            return
        started = time.perf_counter()
        said = step()
        if said is None:
            said = time.perf_counter() - started
        print(json.dumps(said if isinstance(said, dict) else {"seconds": said}), flush=True)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(sides: list[Side], warm: int, steps: int) -> dict[str, dict[str, Any]]:
    """Warm up, then `steps` rounds of one step of each; {side: median seconds, peak bytes}."""
    for side in sides:
        side.ready()
        for _ in range(warm):
            side.step()
        side.answers.clear()
    for _ in range(steps):
        for side in sides:
            side.step()
    return {side.name: side.finish() for side in sides}


def machine(*packages: str) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    from importlib.metadata import version

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "python": platform.python_version(),
        "commit": commit,
        "packages": {name: version(name) for name in packages},
    }


def write_results(name: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
