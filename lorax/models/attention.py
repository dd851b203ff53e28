"""Causal attention over grouped heads, and what stands before the tokens that attend."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Context:
    """What stands before a sequence's tokens, `length` of them: here none.

    Else a `KVCache` (cache.py), or `Documents`, several of which are one sequence (packed.py).
    """

    length = 0

    def open(self, prefix: Any, x: Tensor) -> tuple[Tensor, "Context"]:
        """Embeddings (B, T, C) with the prefix in front where it is due, and what stands before."""
        return prefix(x), self

    def places(self, x: Tensor) -> Tensor:
        """The position of each of x's (B, T, C): (T,) int64."""
        return torch.arange(self.length, self.length + x.shape[1], device=x.device)

    def turns(self, ropes: Callable[[int, Tensor], list[Any]], x: Tensor) -> list[Any]:
        """Each layer's rotations of x (B, T, C). ropes: a body's."""
        return ropes(self.length, x)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All that is attended to, (B, K, S, D), where key and value are (B, K, T, D)."""
        return key, value

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """`causal_attention` of a layer, with its options, over what stands before as well."""
        return causal_attention(query, *self.append(layer, key, value), **how)

    def close(self, x: Tensor, tokens: int) -> Tensor:
        """The hidden states of the tokens that were given: (B, tokens, C)."""
        return x[:, -tokens:]


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """softmax(Q K^T * scale) V, each query seeing the keys up to its own place.

    query (B, H, T, D); key and value (B, K, S, D) with S >= T: the queries are the last T of the S
    places, and query head h reads key head h // (H / K). Gives (B, H, T, D).

    window: how many places a query sees, its own included; None is all.
    scale: None is 1 / sqrt(D).
    cap: c of c * tanh(scores / c), in front of the softmax; None leaves the scores.
    """
    T = query.shape[2]
    if window is not None and key.shape[2] > window + T - 1:  # what no query here sees
        key, value = (x[:, :, -(window + T - 1) :] for x in (key, value))
    S = key.shape[2]
    windowed = window is not None and window < S
    mask = None
    if T > 1 and (T != S or windowed or cap is not None):
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
        if window is not None:
            mask = mask.triu(S - T - window + 1)
    if cap is not None:
        from lorax.models.capped_attention import capped_attention

        return capped_attention(query, key, value, mask, scale or query.shape[3] ** -0.5, cap)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        is_causal=T == S and not windowed,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap): nearly x while it is small, never beyond +-cap; None leaves x."""
    return x if cap is None else torch.tanh(x / cap) * cap


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * D) -> (B, heads, T, D)."""
    B, T, width = x.shape
    return x.view(B, T, width // head_dim, head_dim).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, D) -> (B, T, heads * D)."""
    B, heads, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, heads * D)
