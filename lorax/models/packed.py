"""Documents behind each other in one sequence, without padding and without seeing each other.

    tokens      a0 a1 a2 | b0 b1 | c0 c1 c2 c3          lengths 3, 2, 4: (1, 9)
    positions    0  1  2    0  1    0  1  2  3
    sees        a0 ...     b0 ..   c0 ...               never across a seam

Everything but attention and positions works token by token and does not notice. Positions begin
anew with each document, and each attends by itself: T_1^2 + T_2^2 + ... scores in the place of T^2,
as if it stood alone. On a CPU that is a call for each document: of 8 documents in 2,260 tokens it
takes 116 ms forward and backward, one call with a dense block mask 736, one over padded rows 320.
On CUDA it is one call of FlexAttention (flex.py).

A model takes `Documents` where it takes a `KVCache`: both say what stands before a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lorax.backend import uses_triton
from lorax.errors import UnsupportedModel
from lorax.models.attention import Context, causal_attention

FLEX_WIDTH = 16  # FlexAttention's narrowest head on CUDA


class Documents(Context):
    """How many tokens each document of a packed sequence (1, T) has, in their order.

    in_front: how many of each are a prefix's, which the hidden states leave out.
    """

    def __init__(self, lengths: Sequence[int], in_front: int = 0):
        self.lengths, self.in_front = tuple(lengths), in_front
        self.masks: dict[Any, Any] = {}  # what flex.py makes of them, kept for the next layer

    def split(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        """Each document's part of x, whose tokens are along `dim`."""
        return x.split(self.lengths, dim)

    def open(self, prefix: Any, x: Tensor) -> tuple[Tensor, Context]:
        """Put the prefix in front of each document."""
        if not prefix.length:
            return x, self
        x = torch.cat([prefix(part) for part in self.split(x, 1)], dim=1)
        return x, Documents([n + prefix.length for n in self.lengths], prefix.length)

    def places(self, x: Tensor) -> Tensor:
        """Each token's place in its document."""
        return torch.cat([torch.arange(length, device=x.device) for length in self.lengths])

    def turns(self, ropes: Callable[[int, Tensor], list[Any]], x: Tensor) -> list[Any]:
        """Those of every document alone, behind each other: its length may decide on them."""
        made = {length: ropes(0, x[:, :length]) for length in set(self.lengths)}
        joined: dict[tuple[int, ...], tuple[Tensor, ...]] = {}  # layers that share theirs still do
        found = []
        for parts in zip(*(made[length] for length in self.lengths), strict=True):
            key = tuple(map(id, parts))
            if key not in joined:
                joined[key] = tuple(torch.cat(side) for side in zip(*parts, strict=True))
            found.append(joined[key])
        return found

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """Each document by itself: a call for each, or on CUDA one for all."""
        if query.is_cuda and uses_triton(query) and query.shape[3] >= FLEX_WIDTH:
            from lorax.models.flex import packed_attention

            return packed_attention(query, key, value, self, **how)
        parts = zip(*(self.split(x, 2) for x in (query, key, value)), strict=True)
        return torch.cat([causal_attention(*part, **how) for part in parts], dim=2)

    def close(self, x: Tensor, tokens: int) -> Tensor:
        """Without what stands in front of each document."""
        if not self.in_front:
            return x
        return torch.cat([part[:, self.in_front :] for part in self.split(x, 1)], dim=1)

    def append(self, layer: int, key: Tensor, value: Tensor) -> NoReturn:
        """Only a family's own attention asks for this, which knows no documents.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel(
            "this family's attention does not keep packed documents apart; set data.packing = "
            "false, or let it call context.attend (lorax/models/attention.py)"
        )
