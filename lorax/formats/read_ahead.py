"""Tensors that have to be decoded, by two threads, a few of them ahead of who asks.

numpy and torch let other threads run while they compute, so that two decode SmolLM2's GGUF in 0.8 s
where one takes 1.7.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

WORKERS = 2
AHEAD = 4  # tensors that wait, decoded: a few, because a quantized model keeps none of them


def read_ahead(read: Callable[[str], Tensor], names: Iterable[str]) -> Callable[[str], Tensor]:
    """`read` for these names, which have to be asked for in their order.

    An error of `read` comes where its tensor is asked for.
    """
    tensors = _in_order(read, names)
    return lambda name: next(tensors)


def _in_order(read: Callable[[str], Tensor], names: Iterable[str]) -> Iterator[Tensor]:
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for name in names:
                waiting.append(pool.submit(read, name))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()
