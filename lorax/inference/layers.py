"""A Llama's attention and MLP for one token a row, in fewer calls.

    q, k and v        one call of native.c, which reads x once
    rope, attention   one call: queries and keys are turned where they are used
    gate, up, silu    one call

At 30 layers it is the calls that cost, not the work: 19 of PyTorch's a layer less.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lorax.adapters.as_known import is_as_known
from lorax.inference.products import Together
from lorax.inference.rows import Step
from lorax.models.attention import Context, merge_heads, split_heads
from lorax.models.llama import LlamaAttention, LlamaMLP, Rope


def in_fewer_calls(twin: Any) -> None:
    """Make a copy of a LlamaAttention or LlamaMLP, around twins, one of those below."""
    kind = type(twin)
    if not is_as_known(kind):
        return
    if kind is LlamaAttention:
        twin.__class__ = FastAttention
        twin.together = Together([twin.q_proj, twin.k_proj, twin.v_proj])
    elif kind is LlamaMLP and twin.activation is F.silu:
        twin.__class__ = FastMLP
        twin.together = Together([twin.gate_proj, twin.up_proj], gated=True)


class FastAttention(LlamaAttention):
    """LlamaAttention, see above."""

    together: Together

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> query (B, T, H * D), key and value (B, T, K * D)."""
        query, key, value = self.together(x)
        return query, key, value

    def forward(self, x: Tensor, rope: Rope, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if not isinstance(context, Step) or not context.is_native_for(x):
            return super().forward(x, rope, context)
        query, key, value = (split_heads(part, self.head_dim) for part in self.project(x))
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        how = {"window": self.window, "scale": self.scale, "cap": self.cap, "rope": rope}
        y: Tensor = self.o_proj(merge_heads(context.attend(self.index, query, key, value, **how)))
        return y


class FastMLP(LlamaMLP):
    """LlamaMLP with silu, see above."""

    together: Together

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        y: Tensor = self.down_proj(self.together(x)[0])
        return y
