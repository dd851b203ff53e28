"""Stretched rotations: how a model reads more tokens than it was trained on.

Its turns are slowed down. config.json calls the ways of doing that `rope_type`; here are
transformers' "linear" (all turns by one factor), "dynamic" (theta grows with the sequence), "yarn"
(arXiv:2309.00071), "llama3", and Phi-3's "longrope" (arXiv:2402.13753), which has a factor for each
pair. "yarn" and "llama3" leave the quick turns alone, which tell neighbours apart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Stretching(ABC):
    """One way of slowing the turns down."""

    @abstractmethod
    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        """How far each pair turns with one position, in radians: (D / 2,) float32.

        exponents: (D / 2,) float32, 2 i / D; theta ** -exponents is the turn without stretching.
        length: of the sequence, in tokens.
        """

    @property
    def amplitude(self) -> float:
        """What queries and keys are both multiplied by."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(Stretching):
    """Every turn slowed down by one factor: position t is read as t / factor."""

    factor: float

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        return 1.0 / theta**exponents / self.factor


@dataclass(frozen=True)
class DynamicScaling(Stretching):
    """theta grows with a sequence that is longer than the trained context ("NTK-aware").

    A sequence's first pass decides on its theta; tokens that follow a cache turn by the theta of
    their own length, and those in the cache stay, as transformers generates.
    """

    factor: float
    original_max_position_embeddings: int

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        D, trained = 2 * len(exponents), self.original_max_position_embeddings
        growth = self.factor * max(length, trained) / trained - (self.factor - 1)
        return 1.0 / (theta * growth ** (D / (D - 2))) ** exponents


@dataclass(frozen=True)
class Llama3Scaling(Stretching):
    """Llama 3.1's stretching of the slow rotations, so that a longer context is told apart."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        plain = 1.0 / theta**exponents
        # Waves longer than the trained context are stretched, short ones left, others blended.
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return keep * plain + (1 - keep) * plain / self.factor


@dataclass(frozen=True)
class YarnScaling(Stretching):
    """A ramp over the pairs, and attention_factor, which queries and keys are both multiplied by.

    Pairs that turn more than beta_fast times in the trained context are left, those that turn less
    than beta_slow times are slowed down by `factor`; truncate rounds the ramp's ends to pairs.
    """

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        plain = 1.0 / theta**exponents
        D = 2 * len(plain)

        def pair_that_turns(times: float) -> float:
            waves = self.original_max_position_embeddings / (times * 2 * math.pi)
            return D * math.log(waves) / (2 * math.log(theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        if low == high:
            high += 0.001  # a step; the value is transformers'
        pairs = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
        slowed = ((pairs - low) / (high - low)).clamp(0, 1)  # 0: left alone, 1: slowed down
        return slowed * plain / self.factor + (1 - slowed) * plain


@dataclass(frozen=True)
class LongRopeScaling(Stretching):
    """A factor for each pair, one list for sequences within the trained context, one beyond it.

    Queries and keys are both multiplied by attention_factor.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        is_long = length > self.original_max_position_embeddings
        factors = self.long_factor if is_long else self.short_factor
        each = torch.tensor(factors, dtype=torch.float32, device=exponents.device)
        return 1.0 / (each * theta**exponents)
