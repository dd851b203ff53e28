"""Causal attention with rotary positions, forward and backward by hand.

    S = scale rope(Q) rope(K)^T        P = softmax of S, causal        O = P V
    dV = P^T dO     dS = P * (dO V^T - rowsum(dO V^T * P))     dQ = scale dS K     dK = scale dS^T Q

The G query heads that read one key head stand below each other in one matrix, token by token, so a
key head is one product and not G of them:

    rows (T * G, D)     t0 g0 | t0 g1 | ... | t1 g0 | ...          keys (S, D)

A tile is a stretch of queries with all the keys that one of them sees; what no query of a tile sees
is not computed. P is kept for the backward pass up to KEPT keys and computed again beyond: it grows
with the square of the length, where all else that is kept grows with the length. torch's own
attention on a CPU computes it again always, which is slower where P is short (66 against 86 ms of 2
rows of 512 tokens, 9 heads over 3) and faster where it is long; so beyond KEPT it is preferred,
but for bfloat16 without products (67 against 493 ms).

Packed documents (lorax/models/packed.py) are tiles that end where a document ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorax.training.fast import products

TILE = 128  # queries; measured best of 128, 256, 512
KEPT = 512  # keys


def is_faster(dtype: torch.dtype, longest: int) -> bool:
    """Than torch's own, for sequences of up to so many tokens."""
    return longest <= KEPT or products.computing_dtype(dtype) != dtype


class Tile(NamedTuple):
    """Queries first ... last, which see the keys from `start` on, each up to its own place."""

    start: int
    first: int
    last: int


def tiles_of(lengths: Sequence[int]) -> list[Tile]:
    """The tiles of sequences behind each other, of so many tokens each."""
    found, start = [], 0
    for length in lengths:
        stops = [*range(start, start + length, TILE), start + length]
        found += [Tile(start, *ends) for ends in pairwise(stops)]
        start += length
    return found


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Attention over the turned queries and keys: (B, T, H * D).

    query: (B, T, H, D), key and value (B, T, K, D), not turned yet; query head h reads key head
        h // (H / K). rope: cosine and sine, (T, D) each.
    lengths: of the sequences that stand behind each other in T and do not see each other.
    scale: None is 1 / sqrt(D).
    """
    scale = query.shape[3] ** -0.5 if scale is None else scale
    found: Tensor = _Attention.apply(query, key, value, *rope, tiles_of(lengths), scale)
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        tiles: Sequence[Tile],
        scale: float,
    ) -> Tensor:
        dtype, heads, groups = query.dtype, key.shape[2], query.shape[2] // key.shape[2]
        q, k = turned(query, cos, sin, heads), turned(key, cos, sin, heads)
        v = by_head(value.to(q.dtype), heads).contiguous().flatten(0, 1).flatten(1, 2)
        out, kept = torch.empty_like(q), []
        for tile in tiles:
            P = probabilities(q, k, tile, groups, scale)
            rows, keys = parts(tile, groups)
            out[:, rows] = P @ v[:, keys]
            if tile.last - tile.start <= KEPT:
                kept.append(P.to(dtype))
        ctx.tiles, ctx.scale, ctx.groups = tiles, scale, groups
        ctx.save_for_backward(*(x.to(dtype) for x in (q, k, v)), cos, sin, *kept)
        return by_token(out, query.shape[0], groups).flatten(2).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, cos, sin, *kept = ctx.saved_tensors
        dtype, groups, scale = q.dtype, ctx.groups, ctx.scale
        computing = _computing(dtype)
        q, k, v = (x.to(computing) for x in (q, k, v))  # (B * K, T * G, D), (B * K, T, D)
        B, T = gradients[0].shape[:2]
        heads = len(q) // B
        do = by_head(gradients[0].view(B, T, heads * groups, -1).to(computing), heads)
        do = do.contiguous().flatten(0, 1).flatten(1, 2)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        saved = iter(kept)
        for tile in ctx.tiles:
            rows, keys = parts(tile, groups)
            is_kept = tile.last - tile.start <= KEPT
            P = next(saved).to(computing) if is_kept else probabilities(q, k, tile, groups, scale)
            dv[:, keys].baddbmm_(P.mT, do[:, rows])
            dP = do[:, rows] @ v[:, keys].mT
            dS = torch._softmax_backward_data(dP, P, -1, computing)
            dq[:, rows] = (dS @ k[:, keys]).mul_(scale)
            dk[:, keys].baddbmm_(dS.mT, q[:, rows], alpha=scale)
        back = [by_token(x, B, g) for x, g in ((dq, groups), (dk, 1), (dv, 1))]
        dquery, dkey = (turned_back(x, cos, sin) for x in back[:2])
        return *(x.to(dtype) for x in (dquery, dkey, back[2])), None, None, None, None


def _computing(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16: a score of 8 has steps of 1/16 there, and stands in an exponent."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def parts(tile: Tile, groups: int) -> tuple[slice, slice]:
    """The tile's rows of queries, and its keys."""
    return slice(tile.first * groups, tile.last * groups), slice(tile.start, tile.last)


def probabilities(q: Tensor, k: Tensor, tile: Tile, groups: int, scale: float) -> Tensor:
    """P of a tile: (B * K, queries * G, keys). q (B * K, T * G, D), k (B * K, T, D)."""
    rows, keys = parts(tile, groups)
    scores = (q[:, rows] @ k[:, keys].mT).mul_(scale)
    t, s = tile.last - tile.first, tile.last - tile.start
    unseen = torch.ones(t, s, dtype=torch.bool).triu_(1 + tile.first - tile.start)
    scores.view(-1, t, groups, s).masked_fill_(unseen[:, None], -torch.inf)
    return scores.softmax(-1)


def by_head(x: Tensor, heads: int) -> Tensor:
    """(B, T, K * G, D) -> (B, K, T, G, D), not copied."""
    B, T, width, D = x.shape
    return x.view(B, T, heads, width // heads, D).transpose(1, 2)


def by_token(x: Tensor, batch: int, groups: int) -> Tensor:
    """(B * K, T * G, D) -> (B, T, K * G, D)."""
    x = x.view(batch, -1, x.shape[1] // groups, groups, x.shape[2]).transpose(1, 2)
    return x.flatten(2, 3)


def turned(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """x (B, T, K * G, D) turned by its positions, by head: (B * K, T * G, D), float32."""
    x = by_head(x, heads).to(_computing(x.dtype))
    turned = x.new_empty(x.shape)
    _turn(x, cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None], turned)
    return turned.flatten(0, 1).flatten(1, 2)


def turned_back(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient in front of the turn, of that behind it: (B, T, heads, D)."""
    dx = torch.empty_like(dy)
    _turn(dy, cos.to(dy.dtype)[:, None], -sin.to(dy.dtype)[:, None], dx)
    return dx


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """`rotate` of lorax/models/rope.py, over whole heads, into `out`."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
