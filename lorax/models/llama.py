"""Llama, and what is built like it: Llama 2 and 3.x, SmolLM, TinyLlama; Mistral with its window.

    x = embed_tokens[ids]                                       (B, T, C)
    for each layer:
        x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))    n = norm(x)
        x = x + down_proj(silu(gate_proj(n)) * up_proj(n))                        n = norm(x)
    logits = lm_head(norm(x))                                   (B, T, V)

Touvron et al. 2023 (arXiv:2302.13971): RMSNorm before each half, rotary positions
(lorax/models/rope.py), SwiGLU (arXiv:2002.05202). In Mistral (arXiv:2310.06825) a token sees no
more than `sliding_window` tokens, itself included. Parameter names are those of transformers'
`LlamaForCausalLM`. The dropout of attention that a config may ask for in training is left out.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorax.models.activations import ACTIVATIONS
from lorax.models.attention import KVCache, causal_attention, merge_heads, split_heads
from lorax.models.origin import Origin
from lorax.models.prefix import Prefix
from lorax.models.rope import DynamicScaling, Llama3Scaling, YarnScaling, rotate, rotations


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and options of a Llama, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # "linear" scaling: positions are divided by it
    llama3_scaling: Llama3Scaling | None = None
    dynamic_scaling: DynamicScaling | None = None
    yarn_scaling: YarnScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None


class Llama(nn.Module):
    """A Llama with its head: input_ids (B, T) int64 -> logits (B, T, V)."""

    embedding_name = "model.embed_tokens.weight"

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.name_or_path = ""  # where it was loaded from, for the files that point back to it
        self.loaded_from: Path | None = None  # its files; None once its weights are not theirs
        self.origin: Origin | None = None  # its files still, for what they say beside the weights
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    @property
    def max_positions(self) -> int:
        """How many tokens the positions cover; growing rotations stretch that by their factor."""
        places = self.config.max_position_embeddings
        if self.config.dynamic_scaling is not None:
            places = int(places * self.config.dynamic_scaling.factor)
        return places - self.model.prefix.length

    def tie_weights(self) -> None:
        """Let the head be the embedding where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute each layer in the backward pass instead of keeping its insides."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.model.gradient_checkpointing = on

    def hidden_states(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head reads: (B, T) -> (B, T, C)."""
        return self.model(input_ids, cache)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) -> (B, T, V); with a cache the T tokens follow those that it holds."""
        return self.lm_head(self.hidden_states(input_ids, cache))

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens."""
        c, norm = self.config, self.model.norm.weight
        places = self.model.prefix.length + max_length
        sizes = (c.num_hidden_layers, batch, c.num_key_value_heads, places, c.head_dim)
        return KVCache(*sizes, norm.dtype, norm.device)


class LlamaModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.prefix = Prefix()
        self.layers = nn.ModuleList(
            LlamaLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, C)
        start = cache.length if cache is not None else 0
        if start == 0:
            x = self.prefix(x)
        rope = rotations(self.config, start, x.shape[1], x)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, cache, use_reentrant=False)
            else:
                x = layer(x, rope, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x[:, -input_ids.shape[1] :])


class LlamaLayer(nn.Module):
    """Attention and MLP, each behind its norm and added to the stream."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, index)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaAttention(nn.Module):
    """H query heads over K key / value heads of width D."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        C, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(C, query_width, bias=bias)
        self.k_proj = nn.Linear(C, kv_width, bias=bias)
        self.v_proj = nn.Linear(C, kv_width, bias=bias)
        self.o_proj = nn.Linear(query_width, C, bias=bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        query = rotate(split_heads(self.q_proj(x), self.head_dim), *rope)  # (B, H, T, D)
        key = rotate(split_heads(self.k_proj(x), self.head_dim), *rope)  # (B, K, T, D)
        value = split_heads(self.v_proj(x), self.head_dim)
        if cache is not None:
            key, value = cache.append(self.index, key, value)  # (B, K, S, D)
        attended = causal_attention(query, key, value, window=self.window)
        return self.o_proj(merge_heads(attended))


class LlamaMLP(nn.Module):
    """SwiGLU, or the same with another activation."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(C, inner, bias=bias)
        self.up_proj = nn.Linear(C, inner, bias=bias)
        self.down_proj = nn.Linear(inner, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the root mean square in float32, rounded before the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)
