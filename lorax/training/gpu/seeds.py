"""The seed of a pass's dropout, one for all its layers: an int64 in the device's memory.

It is drawn from torch's generator of the CPU, so `torch.manual_seed` decides about it and a resumed
run draws what it would have drawn. A captured graph reads a seed that stays in its place and is
written before each replay (graphs.py holds it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorax.training.gpu.known import drops

_seeds: WeakKeyDictionary[nn.Module, Tensor | None] = WeakKeyDictionary()
_held: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def begin_pass(body: nn.Module, device: torch.device) -> None:
    """A new seed for the layers of `body`, where one of them drops."""
    if body in _held:
        _seeds[body] = _held[body]
    else:
        _seeds[body] = torch.full((1,), drawn(), device=device) if drops(body) else None


def seed_of(body: nn.Module) -> Tensor | None:
    """Of the pass that has begun, (1,) int64."""
    return _seeds.get(body)


def drawn() -> int:
    """A seed from torch's generator of the CPU."""
    return int(torch.randint(2**62, ()))


@contextmanager
def held(body: nn.Module, seed: Tensor) -> Iterator[None]:
    """Inside, every pass takes this seed, from where it stands."""
    _held[body] = seed
    try:
        yield
    finally:
        del _held[body]
