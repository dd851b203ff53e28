"""Rotary positions (arXiv:2104.09864): each pair of a head's values turns with its position.

Pair i of a head of width D turns by theta^(-2i / D) radians a position. What was trained on short
contexts reads longer ones when the turns are slowed down. config.json calls the ways of doing that
`rope_type`; here are transformers' "linear" (all turns by one factor), "dynamic" (theta grows with
the sequence), "yarn" (arXiv:2309.00071), "llama3", and Phi-3's "longrope" (arXiv:2402.13753), which
has a factor for each pair. "yarn" and "llama3" leave the quick turns alone, which tell neighbours
apart. Where a model turns a part of each head only, the first values are that part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorax.models.llama_config import LlamaConfig


@dataclass(frozen=True)
class DynamicScaling:
    """theta grows with a sequence that is longer than the trained context ("NTK-aware").

    A sequence's first pass decides on its theta; tokens that follow a cache turn by the theta of
    their own length, and those in the cache stay, as transformers generates.
    """

    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the slow rotations, so that a longer context is told apart."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
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


@dataclass(frozen=True)
class LongRopeScaling:
    """A factor for each pair, one list for sequences within the trained context, one beyond it.

    Queries and keys are both multiplied by attention_factor.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int


def inverse_frequencies(config: LlamaConfig, device: torch.device, length: int = 0) -> Tensor:
    """How far each pair of a head turns with one position: (D / 2,) float32, in radians.

    D is the width of the part that turns. length: of the sequence, in tokens; "dynamic" and
    "longrope" ask for it.
    """
    D = config.rotary_dim
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=device) / D
    theta = config.rope_theta
    if config.dynamic_scaling is not None:
        theta = _grown_theta(theta, D, config.dynamic_scaling, length)
    if config.longrope_scaling is not None:
        return 1.0 / (_long_factors(config.longrope_scaling, length, device) * theta**exponents)
    plain = 1.0 / theta**exponents / config.rope_factor
    if config.llama3_scaling is not None:
        return _llama3(plain, config.llama3_scaling)
    if config.yarn_scaling is not None:
        return _yarn(plain, config.rope_theta, config.yarn_scaling)
    return plain


def _grown_theta(theta: float, head_dim: int, scaling: DynamicScaling, length: int) -> float:
    trained = scaling.original_max_position_embeddings
    growth = scaling.factor * max(length, trained) / trained - (scaling.factor - 1)
    return theta * growth ** (head_dim / (head_dim - 2))


def _long_factors(scaling: LongRopeScaling, length: int, device: torch.device) -> Tensor:
    is_long = length > scaling.original_max_position_embeddings
    factors = scaling.long_factor if is_long else scaling.short_factor
    return torch.tensor(factors, dtype=torch.float32, device=device)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Waves longer than the trained context stretched, short ones left, those between blended."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(plain: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """Blended along the pairs, from those left alone to those slowed down."""
    D = 2 * len(plain)

    def pair_that_turns(times: float) -> float:
        waves = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return D * math.log(waves) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001  # a step; the value is transformers'
    pairs = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
    slowed = ((pairs - low) / (high - low)).clamp(0, 1)
    return slowed * plain / scaling.factor + (1 - slowed) * plain


def rotations(config: LlamaConfig, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions start ... start + length: each (T, D) in `like`'s dtype."""
    end = start + length
    positions = torch.arange(start, end, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, inverse_frequencies(config, like.device, end))
    angles = torch.cat([angles, angles], dim=1)
    scaling = config.yarn_scaling or config.longrope_scaling
    size = scaling.attention_factor if scaling is not None else 1.0
    return (angles.cos() * size).to(like.dtype), (angles.sin() * size).to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D / 2) of x (B, heads, T, D) by its position's angle.

    Where cos and sin (T, P) are narrower than a head, its first P values turn, the rest stays.
    """
    P = cos.shape[-1]
    if x.shape[-1] > P:
        return torch.cat([rotate(x[..., :P], cos, sin), x[..., P:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
