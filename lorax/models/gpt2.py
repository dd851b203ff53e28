"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each half, GELU.

    x = wte[ids] + wpe[0 ... T]                                 (B, T, C)
    for each block:
        x = x + c_proj(attention(c_attn(ln_1(x))))              c_attn gives query, key and value
        x = x + c_proj(gelu(c_fc(ln_2(x))))                     or another activation
    logits = lm_head(ln_f(x))                                   (B, T, V)

Parameter names are transformers' `GPT2LMHeadModel`'s, but every weight is (out, in): its Conv1D
holds them the other way round, and `lorax.formats` transposes on the way in and out. The dropout of
GPT-2's pre-training is left out; an adapter has its own.
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


@dataclass(frozen=True)
class GPT2Config:
    """The sizes and options of a GPT-2, under Hugging Face's names."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    activation_function: str = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False


class GPT2(nn.Module):
    """A GPT-2 with its head: input_ids (B, T) int64 -> logits (B, T, V)."""

    embedding_name = "transformer.wte.weight"

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.name_or_path = ""  # where it was loaded from, for the files that point back to it
        self.loaded_from: Path | None = None  # its files; None once its weights are not theirs
        self.origin: Origin | None = None  # its files still, for what they say beside the weights
        self.transformer = GPT2Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()

    @property
    def max_positions(self) -> int:
        """How many tokens the positions cover."""
        return self.config.n_positions - self.transformer.prefix.length

    def tie_weights(self) -> None:
        """Let the head be the embedding where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute each block in the backward pass instead of keeping its insides."""
        return self.transformer.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.transformer.gradient_checkpointing = on

    def hidden_states(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head reads: (B, T) -> (B, T, C)."""
        return self.transformer(input_ids, cache)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) -> (B, T, V); with a cache the T tokens follow those that it holds."""
        return self.lm_head(self.hidden_states(input_ids, cache))

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens."""
        c, norm = self.config, self.transformer.ln_f.weight
        places = self.transformer.prefix.length + max_length
        sizes = (c.n_layer, batch, c.n_head, places, c.n_embd // c.n_head)
        return KVCache(*sizes, norm.dtype, norm.device)


class GPT2Transformer(nn.Module):
    """Embeddings, blocks and final norm."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.prefix = Prefix()
        self.h = nn.ModuleList(GPT2Block(config, index) for index in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        T = input_ids.shape[1]
        start = cache.length if cache is not None else 0
        x = self.wte(input_ids)  # (B, T, C)
        if start == 0:
            x = self.prefix(x)
        positions = torch.arange(start, start + x.shape[1], device=input_ids.device)
        x = x + self.wpe(positions)
        for block in self.h:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cache, use_reentrant=False)
            else:
                x = block(x, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.ln_f(x[:, -T:])


class GPT2Block(nn.Module):
    """Attention and MLP, each behind its norm and added to the stream."""

    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, index)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Attention(nn.Module):
    """H heads of width D = C / H, their three projections in one matrix."""

    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.n_embd // config.n_head
        self.scale = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= index + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        query, key, value = (
            split_heads(part, self.head_dim) for part in self.c_attn(x).chunk(3, dim=-1)
        )  # each (B, H, T, D)
        if cache is not None:
            key, value = cache.append(self.index, key, value)
        attended = causal_attention(query, key, value, scale=self.scale)
        return self.c_proj(merge_heads(attended))


class GPT2MLP(nn.Module):
    """Two Linears around an activation: GELU in its tanh form, if the config names no other."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))
