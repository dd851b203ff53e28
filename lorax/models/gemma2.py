"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118).

    x = embed_tokens[ids] * sqrt(C)                                     (B, T, C)
    for each layer:
        x = x + norm(o_proj(attention(rope(q), rope(k), v)))            q, k, v of norm(x)
        x = x + norm(down_proj(gelu(gate_proj(n)) * up_proj(n)))        n = norm(x)
    logits = cap(lm_head(norm(x)))                                      (B, T, V)

Unlike a Llama: a norm behind each half as well as before it; norms that multiply by 1 + weight; a
cap c * tanh(s / c) on the scores of attention and on the logits; scores scaled by
query_pre_attn_scalar^-1/2; and every other layer sees no more than `sliding_window` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lorax.errors import UnsupportedModel
from lorax.models.attention import Context
from lorax.models.config import GGUFLayout
from lorax.models.config_values import flag, number, size
from lorax.models.llama import Llama, LlamaAttention, LlamaMLP, LlamaModel, Rope
from lorax.models.llama_config import (
    FULL,
    SLIDING,
    LlamaConfig,
    head_dim,
    read_layer_types,
    read_sizes,
    read_window,
)
from lorax.models.model import Layer
from lorax.models.rope_config import read_rope

GEMMA: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
KEYS = {"attention.sliding_window": "sliding_window"}


def scalar_of(layers_of_27b: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """query_pre_attn_scalar as llama.cpp has it: a head's width, but in the models of 27B."""

    def derived(values: dict[str, Any]) -> dict[str, Any]:
        by_head = values.get("head_dim", GEMMA["head_dim"])
        if values["num_hidden_layers"] == layers_of_27b:
            by_head = values["hidden_size"] // values["num_attention_heads"]
        return {"query_pre_attn_scalar": by_head}

    return derived


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(LlamaConfig):
    """The sizes and options of a Gemma 2; the two softcaps may be None."""

    model_type: ClassVar[str] = "gemma2"
    defaults: ClassVar[Mapping[str, Any]] = GEMMA
    bias_words: ClassVar[Mapping[str, str]] = {"self_attn": "attention_bias"}
    gguf: ClassVar[GGUFLayout | None] = GGUFLayout(
        "gemma2",
        NAMES,
        {
            **KEYS,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        norm_offset=1.0,
        derived=scalar_of(46),
    )

    query_pre_attn_scalar: int = 256
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        rope = read_rope(values, head_dim(values, where), where)
        layers = size(values, "num_hidden_layers", where)
        types = read_layer_types(values, where) or alternating(layers, 2)
        return cls(**read_gemma(values, where), **rope, layer_types=types)

    def write(self) -> dict[str, Any]:
        types = None if self.layer_types is None else list(self.layer_types)
        return {**super().write(), "hidden_activation": self.hidden_act, "layer_types": types}


def alternating(layers: int, period: int) -> tuple[str, ...]:
    """Every `period`-th layer sees everything, those before it a window."""
    return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))


def read_gemma(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 share."""
    if values["use_bidirectional_attention"] not in (None, False):
        raise UnsupportedModel(
            f"{where}: use_bidirectional_attention is not covered; choose a model without it"
        )
    values = {**values, "hidden_act": values["hidden_activation"]}
    caps = {
        key: None if values[key] is None else number(values, key, where)
        for key in ("final_logit_softcapping", "attn_logit_softcapping")
    }
    return {
        **read_sizes(values, where),
        **caps,
        "attention_bias": flag(values, "attention_bias", where),
        "query_pre_attn_scalar": size(values, "query_pre_attn_scalar", where),
        "sliding_window": read_window(values, where),
    }


class Gemma2(Llama):
    """A Gemma 2 with its head: input_ids (B, T) int64 -> logits (B, T, V)."""

    config: Gemma2Config

    def new_body(self, config: LlamaConfig) -> LlamaModel:
        return GemmaModel(config, gemma2_layer)

    @property
    def logit_cap(self) -> float | None:
        """The cap behind the head."""
        return self.config.final_logit_softcapping


class GemmaModel(LlamaModel):
    """Embedding, scaled by sqrt(C), layers and final norm."""

    def __init__(self, config: LlamaConfig, layer: Layer):
        super().__init__(config, layer, GemmaRMSNorm)
        self.embedding_scale = config.hidden_size**0.5


def gemma2_layer(config: Gemma2Config, index: int) -> nn.Module:
    """Gemma 2's attention and MLP between four norms."""
    scale, cap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
    return GemmaLayer(config, LlamaAttention(config, index, GemmaRMSNorm, scale, cap))


class GemmaLayer(nn.Module):
    """Attention and MLP, each between two norms and added to the stream."""

    def __init__(self, config: LlamaConfig, attention: nn.Module):
        super().__init__()
        self.self_attn = attention
        self.mlp = LlamaMLP(config)
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(C, eps)
        self.post_attention_layernorm = GemmaRMSNorm(C, eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(C, eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(C, eps)

    def forward(self, x: Tensor, rope: Rope, context: Context) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rope, context)
        x = x + self.post_attention_layernorm(attended)
        changed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(changed)


class GemmaRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), all in float32, rounded at the end."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * (1.0 + self.weight.float())).to(x.dtype)
