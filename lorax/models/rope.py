"""Rotary positions (arXiv:2104.09864): each pair of a head's values turns with its position.

    angle of pair i of D / 2 at position t      t * theta^(-2i / D), in radians
    (x_i, x_{i + D/2})  ->  (x_i cos - x_{i + D/2} sin,  x_{i + D/2} cos + x_i sin)

So the product of a query and a key depends on the distance of their positions alone. Where a model
turns a part of each head only, the first values are that part. Models that read more than they were
trained on slow the turns down: stretching.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorax.models.llama_config import LlamaConfig


def inverse_frequencies(config: LlamaConfig, device: torch.device, length: int = 0) -> Tensor:
    """How far each pair of a head turns with one position: (D / 2,) float32, in radians.

    D is the width of the part that turns. length: of the sequence, in tokens; some ways of
    stretching ask for it.
    """
    D, theta = config.rotary_dim, config.rope_theta
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=device) / D  # (D / 2,)
    if config.stretching is not None:
        return config.stretching.frequencies(theta, exponents, length)
    return 1.0 / theta**exponents


def rotations(config: LlamaConfig, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions start ... start + length: each (T, D) in `like`'s dtype.

    They are computed in float32: in bfloat16 neighbouring positions would have the same angle.
    """
    end = start + length
    positions = torch.arange(start, end, dtype=torch.float32, device=like.device)  # (T,)
    angles = torch.outer(positions, inverse_frequencies(config, like.device, end))  # (T, D / 2)
    angles = torch.cat([angles, angles], dim=1)  # one of each pair's two values, then the other
    size = 1.0 if config.stretching is None else config.stretching.amplitude
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
