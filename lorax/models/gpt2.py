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

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lorax.errors import FormatError, UnsupportedModel
from lorax.models.activations import ACTIVATIONS, read_activation
from lorax.models.attention import Context, merge_heads, split_heads
from lorax.models.config import ModelConfig, Sizes
from lorax.models.config_values import flag, number, size
from lorax.models.model import Body, Model


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """The sizes and options of a GPT-2, under Hugging Face's names."""

    model_type: ClassVar[str] = "gpt2"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    aliases: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

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

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        width = size(values, "n_embd", where)
        heads = size(values, "n_head", where)
        if width % heads:
            raise FormatError(
                f"{where}: n_embd {width} is no multiple of n_head {heads}"
                "; mend the config, or get it anew"
            )
        if flag(values, "add_cross_attention", where):
            raise UnsupportedModel(
                f"{where}: add_cross_attention is not covered; choose a model without it"
            )
        by_layer = "scale_attn_by_inverse_layer_idx"
        return cls(
            vocab_size=size(values, "vocab_size", where),
            n_positions=size(values, "n_positions", where),
            n_embd=width,
            n_layer=size(values, "n_layer", where),
            n_head=heads,
            n_inner=size(values, "n_inner", where, null=4 * width),
            layer_norm_epsilon=number(values, "layer_norm_epsilon", where),
            tie_word_embeddings=flag(values, "tie_word_embeddings", where),
            activation_function=read_activation(values, "activation_function", where),
            scale_attn_weights=flag(values, "scale_attn_weights", where),
            scale_attn_by_inverse_layer_idx=flag(values, by_layer, where),
        )

    @property
    def sizes(self) -> Sizes:
        """Layers, heads and widths."""
        heads = self.n_head
        return Sizes(self.n_embd, self.n_layer, heads, heads, self.n_embd // heads)

    @property
    def positions(self) -> int:
        """How many tokens the positions cover."""
        return self.n_positions


class GPT2(Model):
    """A GPT-2 with its head: input_ids (B, T) int64 -> logits (B, T, V)."""

    config: GPT2Config
    body_name = "transformer"
    embedding_name = "transformer.wte.weight"
    norm_name = "ln_f"
    default_targets = ("c_attn",)
    transposed = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # transformers' Conv1D

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = GPT2Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()


class GPT2Transformer(Body):
    """Embeddings, blocks and final norm."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, index) for index in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor, context: Context) -> Tensor:
        x, context = context.open(self.prefix, self.wte(input_ids))  # (B, T, C)
        x = x + self.wpe(context.places(x))
        for block in self.h:
            x = self.run(block, x, context)
        return self.ln_f(context.close(x, input_ids.shape[1]))


class GPT2Block(nn.Module):
    """Attention and MLP, each behind its norm and added to the stream."""

    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, index)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn(self.ln_1(x), context)
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

    def forward(self, x: Tensor, context: Context) -> Tensor:
        query, key, value = (
            split_heads(part, self.head_dim) for part in self.c_attn(x).chunk(3, dim=-1)
        )  # each (B, H, T, D)
        attended = context.attend(self.index, query, key, value, scale=self.scale)
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
