"""How the GPU suite times and checks: graphs of several calls, and an error beside each time.

A replay costs 3 us and a small kernel hardly more; and a weight that has just been read lies in L2.
So a side is a list of calls, on as many weights, captured as one CUDA graph; what is told is the
graph's time over their number. With 20 weights nothing is in L2 by itself. Sides are interleaved
replay by replay; median, p20 and p80.

No time without a right output: `checked` compares one call of each side with float32 at the very
shape that is timed. On a CPU (`--tiny`) calls are run as they are, and the numbers mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

Calls = Sequence[Callable[[], Any]]
WITHIN = 1.5  # of the error that the plain product has, as in the tests


class Timer:
    """Times lists of calls on one device."""

    def __init__(self, device: str):
        self.device = device
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def compare(self, sides: dict[str, Calls], repeats: int = 20) -> dict[str, Any]:
        """Microseconds a call: {name: {"cold": {"median_us", "p20_us", "p80_us"}}}."""
        replays = {}
        for name, calls in sides.items():
            try:
                replays[name] = self._replay(calls)
            except Exception as error:  # a rival may fail in its own ways; lorax may not
                if name.startswith("lorax"):
                    raise
                print(f"{name} is not timed: {error!r}")
        times: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(max(2, repeats)):
            for name, replay in replays.items():
                times[name].append(self._microseconds(replay) / len(sides[name]))
        return {name: {"cold": spread(found)} for name, found in times.items()}

    def _replay(self, calls: Calls) -> Callable[[], Any]:
        def run() -> None:
            for call in calls:
                call()

        if self.stream is None:
            run()
            return run
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            run()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay

    def _microseconds(self, replay: Callable[[], Any]) -> float:
        if self.device != "cuda":
            begin = time.perf_counter()
            replay()
            return 1e6 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return 1000 * begin.elapsed_time(end)


def spread(times: Sequence[float]) -> dict[str, float]:
    fifths = quantiles(times, n=5, method="inclusive")
    return {
        "median_us": round(median(times), 2),
        "p20_us": round(fifths[0], 2),
        "p80_us": round(fifths[3], 2),
    }


def checked(found: Tensor, plain: Tensor, truth: Tensor) -> dict[str, Any]:
    """Relative errors of a side and of the plain product, and whether the side's is within."""
    scale = truth.float().norm()
    mine, its = ((y.float() - truth.float()).norm() / scale for y in (found, plain))
    good = bool(mine <= WITHIN * its) and bool(found.isfinite().all())
    return {"error": float(mine), "plain_error": float(its), "ok": good}


def ceilings(timer: Timer, tiny: bool) -> dict[str, float]:
    """What this device reaches: bytes copied a second (both ways), bf16 operations a second."""
    size, width = (2**16, 64) if tiny else (2**30, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=timer.device).bfloat16() for _ in range(2))
    sides: dict[str, Calls] = {"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]}
    found = timer.compare(sides, 10)
    seconds = {name: 1e-6 * times["cold"]["median_us"] for name, times in found.items()}
    return {
        "bytes_a_second": 2 * size / seconds["copy"],
        "bf16_operations_a_second": 2 * width**3 / seconds["product"],
    }
