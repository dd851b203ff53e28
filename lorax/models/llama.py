"""Llama, and what is built like it: Llama 2 and 3.x, SmolLM, TinyLlama; Mistral; Qwen 2 and 3.

    x = embed_tokens[ids]                                       (B, T, C)
    for each layer:
        x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))    n = norm(x)
        x = x + down_proj(silu(gate_proj(n)) * up_proj(n))                        n = norm(x)
    logits = lm_head(norm(x))                                   (B, T, V)

Touvron et al. 2023 (arXiv:2302.13971): RMSNorm before each half, rotary positions
(lorax/models/rope.py), SwiGLU (arXiv:2002.05202). In Mistral (arXiv:2310.06825) a token sees no
more than `sliding_window` tokens, itself included; Qwen 2 has biases on q, k and v, Qwen 3 a norm
over each head of q and k. Parameter names are those of transformers' `LlamaForCausalLM`. The
dropout of attention that a config may ask for in training is left out.

Other families take the parts and put them together in another way (gemma2.py, phi3.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorax.models.attention import Context, merge_heads, split_heads
from lorax.models.model import Body, Layer, Model
from lorax.models.rope import rotate, rotations

if TYPE_CHECKING:
    from lorax.models.llama_config import LlamaConfig

Rope = tuple[Tensor, Tensor]  # cosine and sine, each (T, D)
Norm = Callable[[int, float], nn.Module]


class Llama(Model):
    """A Llama with its head: input_ids (B, T) int64 -> logits (B, T, V)."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = self.new_body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def new_body(self, config: LlamaConfig) -> LlamaModel:
        """Everything but the head; another family overrides this."""
        return LlamaModel(config)


class LlamaModel(Body):
    """Embedding, layers and final norm: input_ids (B, T) int64 -> (B, T, C).

    layer: makes the layer of an index; norm: makes the final norm of a width and epsilon.
    """

    def __init__(self, config: LlamaConfig, layer: Layer | None = None, norm: Norm | None = None):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        make = layer or llama_layer
        self.layers = nn.ModuleList(make(config, i) for i in range(config.num_hidden_layers))
        self.norm = (norm or RMSNorm)(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, context: Context) -> Tensor:
        x = self.scaled(self.embed_tokens(input_ids))  # (B, T, C)
        x, context = context.open(self.prefix, x)
        for layer, rope in zip(self.layers, context.turns(self.ropes, x), strict=True):
            x = self.run(layer, x, rope, context)
        return self.norm(context.close(x, input_ids.shape[1]))

    def ropes(self, start: int, x: Tensor) -> list[Rope]:
        """Each layer's rotations, of the positions start ... start + T."""
        return [rotations(self.config, start, x.shape[1], x)] * len(self.layers)


def llama_layer(config: LlamaConfig, index: int) -> nn.Module:
    """Llama's own layer."""
    return LlamaLayer(config, LlamaAttention(config, index), LlamaMLP(config))


class LlamaLayer(nn.Module):
    """Attention and MLP, each behind its norm and added to the stream: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: LlamaConfig, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, context: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaAttention(nn.Module):
    """H query heads over K key / value heads of width D: (B, T, C) -> (B, T, C).

    norm: makes the norm over a head of q and k, where the config has one.
    scale: of the scores; None is 1 / sqrt(D). cap: of the scores, see `causal_attention`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        index: int,
        norm: Norm | None = None,
        scale: float | None = None,
        cap: float | None = None,
    ):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.window = config.window(index)
        self.scale, self.cap = scale, cap
        self.add_projections(config)
        query_width = config.num_attention_heads * config.head_dim
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        self.has_norms = config.qk_norm
        if config.qk_norm:
            self.q_norm = (norm or RMSNorm)(config.head_dim, config.rms_norm_eps)
            self.k_norm = (norm or RMSNorm)(config.head_dim, config.rms_norm_eps)

    def add_projections(self, config: LlamaConfig) -> None:
        """Make what `project` takes."""
        C, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(C, query_width, bias=bias)
        self.k_proj = nn.Linear(C, kv_width, bias=bias)
        self.v_proj = nn.Linear(C, kv_width, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> query (B, T, H * D), key and value (B, T, K * D)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, rope: Rope, context: Context) -> Tensor:
        query, key, value = (split_heads(part, self.head_dim) for part in self.project(x))
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rope), rotate(key, *rope)  # (B, H, T, D), (B, K, T, D)
        how = {"window": self.window, "scale": self.scale, "cap": self.cap}
        return self.o_proj(merge_heads(context.attend(self.index, query, key, value, **how)))


class LlamaMLP(nn.Module):
    """SwiGLU, or the same with another activation: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gate_proj = nn.Linear(C, inner, bias=bias)
        self.up_proj = nn.Linear(C, inner, bias=bias)
        self.down_proj = nn.Linear(inner, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, (..., C); rms in float32, rounded to x's dtype before the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)
