"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024, arXiv:2404.14219).

A Llama whose q, k and v are one Linear, and gate and up another. Its long contexts turn by
"longrope" (lorax/models/rope.py): one list of factors up to original_max_position_embeddings
tokens, another beyond, so that a cache made before that border is of no use behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lorax.models.config import GGUFLayout
from lorax.models.config_values import size
from lorax.models.llama import Llama, LlamaAttention, LlamaLayer, LlamaModel
from lorax.models.llama_config import LlamaConfig, head_dim, read_sizes, read_window
from lorax.models.rope_config import read_longrope


@dataclass(frozen=True, kw_only=True)
class Phi3Config(LlamaConfig):
    """The sizes and options of a Phi-3."""

    model_type: ClassVar[str] = "phi3"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
    }
    bias_words: ClassVar[Mapping[str, str]] = {}
    gguf: ClassVar[GGUFLayout | None] = GGUFLayout(
        "phi3",
        {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_gate": None},
        {"attention.sliding_window": "sliding_window"},
        derived=lambda values: {"sliding_window": values.get("sliding_window") or None},
    )

    original_max_position_embeddings: int = 4096

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        return cls(
            **read_sizes(values, where),
            **read_longrope(values, head_dim(values, where), where),
            sliding_window=read_window(values, where),
            original_max_position_embeddings=size(
                {**cls.defaults, **values}, "original_max_position_embeddings", where
            ),
        )


class Phi3(Llama):
    """A Phi-3 with its head: input_ids (B, T) int64 -> logits (B, T, V)."""

    default_targets = None

    def new_body(self, config: LlamaConfig) -> LlamaModel:
        return LlamaModel(config, phi3_layer)

    @property
    def cache_border(self) -> int | None:
        """Where the rotations change."""
        scaling = self.config.longrope_scaling
        return None if scaling is None else scaling.original_max_position_embeddings


def phi3_layer(config: LlamaConfig, index: int) -> nn.Module:
    """Llama's layer around the fused parts."""
    return LlamaLayer(config, Phi3Attention(config, index), Phi3MLP(config))


class Phi3Attention(LlamaAttention):
    """Llama's, with q, k and v in one matrix."""

    def add_projections(self, config: LlamaConfig) -> None:
        """Make what `project` takes."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.widths = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> query (B, T, H * D), key and value (B, T, K * D)."""
        query, key, value = self.qkv_proj(x).split(self.widths, dim=-1)
        return query, key, value


class Phi3MLP(nn.Module):
    """SwiGLU, with gate and up in one matrix."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.activation = config.activation
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # each (B, T, intermediate_size)
        return self.down_proj(up * self.activation(gate))
