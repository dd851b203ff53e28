"""Attention whose scores are capped in front of the softmax, as in Gemma 2 (arXiv:2408.00118).

It is written out: torch's operator has no place between scores and softmax.
"""

import torch
from torch import Tensor

from lorax.models.attention import soft_cap


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float
) -> Tensor:
    """softmax(cap * tanh(Q K^T * scale / cap)) V: (B, H, T, D).

    query (B, H, T, D); key and value (B, K, S, D). mask (T, S) bool: where a query sees; None is
    everywhere. The scores (B, H, T, S) are kept for the backward pass.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))  # (B, H, S, D)
    scores = soft_cap(query @ key.transpose(2, 3) * scale, cap)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
