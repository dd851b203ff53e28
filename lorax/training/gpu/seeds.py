"""What belongs to a pass through all layers: the seed of its dropout, and which layers it took.

The seed is one for all layers, an int64 in the device's memory.
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
_counts: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


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


def took(body: nn.Module, layer: nn.Module) -> None:
    """The hand-written step computes this layer, in the pass that has begun."""
    if body in _counts:
        _counts[body].append(layer)


@contextmanager
def counted(body: nn.Module) -> Iterator[list[nn.Module]]:
    """The layers that the hand-written step computes inside."""
    _counts[body] = []
    try:
        yield _counts[body]
    finally:
        del _counts[body]
