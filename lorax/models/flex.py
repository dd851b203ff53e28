"""Attention over packed documents on CUDA: FlexAttention with a mask of blocks.

What a query sees is one run of keys: from `first`, where its document or its window begins, to
itself. `first` never falls from one query to the next. So in a row of blocks, 128 queries against
128 keys each, those that are seen form one run as well, and no (T, T) tensor is needed:

    nothing    before the block of the first query's `first`
    in part    up to where the last query's `first` is behind
    whole      from there on, up to
    in part    the queries' own block, the last that is seen

Nothing is computed of the first kind, and no mask of the third. FlexAttention is compiled by torch
to Triton, with its backward; grouped heads, softcaps and float32 are covered.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lorax.models.packed import Documents

BLOCK = 128


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    compiled: bool = True,
) -> Tensor:
    """Each document's causal attention over query (1, H, T, D), key and value (1, K, T, D).

    Gives (1, H, T, D). window, scale, cap: see `lorax.models.attention.causal_attention`.
    compiled: False runs torch's plain form of the same, which has no backward on a CPU.
    """
    if (window, query.device) not in documents.masks:
        documents.masks[window, query.device] = block_mask(documents, window, query.device)
    attention = _compiled() if compiled else flex_attention
    out: Tensor = attention(
        query,
        key,
        value,
        score_mod=None if cap is None else _soft_cap(cap),
        block_mask=documents.masks[window, query.device],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


@cache
def _soft_cap(cap: float) -> Any:
    """One function for each cap, so that nothing is compiled twice."""

    def soft_cap(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return soft_cap


def first_seen(documents: Documents, window: int | None) -> Tensor:
    """The first place that each token sees: (T,) int64 on the CPU."""
    lengths = torch.tensor(documents.lengths)
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    if window is None:
        return starts
    return torch.maximum(starts, torch.arange(len(starts)) - window + 1)


def block_mask(documents: Documents, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of 128 queries x 128 keys are seen in part, and which as a whole."""
    first = first_seen(documents, window)
    T = len(first)
    own = torch.arange(-(-T // BLOCK))  # each row's own block, R rows
    last = own * BLOCK + BLOCK - 1  # each row's last query
    low = first[own * BLOCK] // BLOCK
    whole = torch.minimum(-(-first[last.clamp(max=T - 1)] // BLOCK), own)
    whole = torch.where(last < T, whole, own)  # a row that ends early is masked throughout
    block, low, whole, own = own[None], low[:, None], whole[:, None], own[:, None]
    in_part = ((block >= low) & (block < whole)) | (block == own)  # (R, R)
    as_whole = (block >= whole) & (block < own)
    part_count, part_blocks = _listed(in_part, device)
    whole_count, whole_blocks = _listed(as_whole, device)
    seen = first.to(device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= seen[q])

    return BlockMask.from_kv_blocks(
        part_count,
        part_blocks,
        whole_count,
        whole_blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(T, T),
    )


def _listed(held: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row of held (R, R): how many columns hold, (1, 1, R); the columns, those first."""
    columns = torch.argsort(~held, dim=1, stable=True)
    return (
        held.sum(1)[None, None].to(device, torch.int32),
        columns[None, None].to(device, torch.int32),
    )
