"""What the fast paths stand for, once more: whoever edits the plain code gets what they wrote.

training/fast and inference compute in the place of the functions below without calling them. If one
of those was edited, or replaced in its class, it no longer does what stands here, and the module
computes by itself; a remark says so, once. The two codes are compared, not their text: comments,
docstrings and names of types may change.

If you mean to change what the fast paths compute as well: change them, and the copy here.
"""

from __future__ import annotations

import dis
import logging
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.models import rope as rope_file
from lorax.models.attention import merge_heads, split_heads
from lorax.models.llama import LlamaAttention, LlamaLayer, LlamaMLP, LlamaModel, RMSNorm
from lorax.models.rope import rotate

log = logging.getLogger("lorax")


class _Norm:
    def forward(self: Any, x: Any) -> Any:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class _MLP:
    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class _Attention:
    def project(self: Any, x: Any) -> Any:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self: Any, x: Any, rope: Any, context: Any) -> Any:
        query, key, value = (split_heads(part, self.head_dim) for part in self.project(x))
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rope), rotate(key, *rope)
        how = {"window": self.window, "scale": self.scale, "cap": self.cap}
        return self.o_proj(merge_heads(context.attend(self.index, query, key, value, **how)))


class _Rope:
    @staticmethod
    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        P = cos.shape[-1]
        if x.shape[-1] > P:
            return torch.cat([rotate(x[..., :P], cos, sin), x[..., P:]], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Block:
    def forward(self: Any, x: Any, rope: Any, context: Any) -> Any:
        x = x + self.self_attn(self.input_layernorm(x), rope, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Layer:
    def forward(self: Any, x: Any) -> Any:
        if not self.enabled:
            return self.base_layer(x)
        if self.merged is not None:
            return self.merged(x)
        return self.adapted(x)


class _LoRA:
    def adapted(self: Any, x: Any) -> Any:
        fused = self._fused(x)
        if fused is not None:
            return self._with_bias(fused)
        return self.path_onto(self.frozen(x), self.dropped(x))

    def dropped(self: Any, x: Any) -> Any:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def path_onto(self: Any, y: Any, x: Any) -> Any:
        A, B = self.factors()
        h = F.linear(x, A.to(x.dtype))
        B = B.to(x.dtype)
        flat = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
        path = torch.addmm(*flat, B.t(), alpha=self.scaling)
        return self._with_bias(path.view(y.shape))


# The class that the fast paths replace -> what they take for granted: (where it stands, the copy).
# The MLP and the attention are replaced together with their Linears, a layer with all it has.
_NORM, _LINEAR = ((RMSNorm, _Norm),), ((AdapterLayer, _Layer), (LoRALinear, _LoRA))
_MLPS = ((LlamaMLP, _MLP), *_LINEAR)
_ATTENTION = ((LlamaAttention, _Attention), (rope_file, _Rope), *_LINEAR)
_KNOWN: dict[type, tuple[tuple[Any, Any], ...]] = {
    RMSNorm: _NORM,
    LlamaMLP: _MLPS,
    LlamaAttention: _ATTENTION,
    LlamaModel: ((LlamaLayer, _Block), *_NORM, *_MLPS, *_ATTENTION),
    LoRALinear: _LINEAR,
}
_SAID: set[str] = set()


def is_as_known(kind: type) -> bool:
    """Whether a class that a fast path replaces computes what the fast path stands for.

    kind: RMSNorm, LlamaMLP, LlamaAttention, LlamaModel (for its layers) or LoRALinear; any other is
            its own affair: True.
    """
    for place, copies in _KNOWN.get(kind, ()):
        for name, copied in vars(copies).items():
            known = getattr(copied, "__func__", copied)
            if isinstance(known, FunctionType) and not _are_alike(known, getattr(place, name)):
                _say(f"{place.__name__}.{name}")
                return False
    return True


def _are_alike(known: FunctionType, found: Any) -> bool:
    return isinstance(found, FunctionType) and _instructions(known.__code__) == _instructions(
        found.__code__
    )


@cache
def _instructions(code: CodeType) -> list[tuple[str, Any]]:
    """What a function does, whatever its text looks like and wherever it stands."""
    return [
        (one.opname, _instructions(one.argval) if isinstance(one.argval, CodeType) else one.argval)
        for one in dis.get_instructions(code)
    ]


def _say(name: str) -> None:
    if name not in _SAID:
        _SAID.add(name)
        log.warning("%s was changed: it is computed as it is written, not by the fast path", name)
