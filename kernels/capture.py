"""Capturing launches as a CUDA graph; the bookkeeping around it can be tested without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # a function to what replays it


class CudaCapture:
    """Captures a function's launches; calling what it gives replays them. One pool for all."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run it twice on a stream of its own, to compile and to choose; then capture it."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=aside):
            run()
        return graph.replay
