"""The configs of Llama's family: Llama, Mistral, Qwen 2 and Qwen 3.

One dataclass has a field for each thing in which they differ; a class for each model_type says
which of config.json's keys it reads, what a missing one means, and which differences it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from lorax.errors import FormatError, UsageError
from lorax.models.activations import ACTIVATIONS, read_activation
from lorax.models.config import GGUFLayout, ModelConfig, Sizes
from lorax.models.config_values import flag, number, size
from lorax.models.rope_config import read_rope, write_rope
from lorax.models.stretching import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Stretching,
    YarnScaling,
)

SLIDING, FULL = "sliding_attention", "full_attention"

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """The sizes and options of a Llama, and of the models that are built like it.

    sliding_window: how many tokens a token sees, itself included; layer_types: which layers have
    it ("sliding_attention"), None for all. attention_bias: of q, k, v and o; qkv_bias: of q, k and
    v alone. qk_norm: a norm over each head of q and k. partial_rotary_factor: the share of a head
    that turns.
    """

    model_type: ClassVar[str] = "llama"
    defaults: ClassVar[Mapping[str, Any]] = _LLAMA
    bias_words: ClassVar[Mapping[str, str]] = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
    gguf: ClassVar[GGUFLayout | None] = GGUFLayout("llama", permutes=True)

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
    longrope_scaling: LongRopeScaling | None = None
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        return cls(
            **read_sizes(values, where),
            **read_rope(values, head_dim(values, where), where),
            attention_bias=flag(values, "attention_bias", where),
            mlp_bias=flag(values, "mlp_bias", where),
        )

    def write(self) -> dict[str, Any]:
        return {**super().write(), **write_rope(self)}

    @property
    def sizes(self) -> Sizes:
        """Layers, heads and widths."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        return Sizes(self.hidden_size, self.num_hidden_layers, heads, kv_heads, self.head_dim)

    @property
    def positions(self) -> int:
        """How many tokens the positions cover; growing rotations stretch that by their factor."""
        if self.dynamic_scaling is None:
            return self.max_position_embeddings
        return int(self.max_position_embeddings * self.dynamic_scaling.factor)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The function between the Linears of an MLP."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def stretching(self) -> Stretching | None:
        """How the rotations are slowed down; None: they are not."""
        ways = (self.llama3_scaling, self.yarn_scaling, self.dynamic_scaling, self.longrope_scaling)
        linear = LinearScaling(self.rope_factor) if self.rope_factor != 1.0 else None
        return next((way for way in ways if way is not None), linear)

    @property
    def rotary_dim(self) -> int:
        """How many values of a head turn with its position."""
        return int(self.head_dim * self.partial_rotary_factor)

    def slides(self, layer: int) -> bool:
        """Whether this layer has the window."""
        return self.layer_types is None or self.layer_types[layer] == SLIDING

    def window(self, layer: int) -> int | None:
        """How many tokens a token sees in this layer; None is all before it."""
        return self.sliding_window if self.slides(layer) else None


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """Mistral: a window, and no biases, whatever config.json says."""

    model_type: ClassVar[str] = "mistral"
    defaults: ClassVar[Mapping[str, Any]] = {
        **{k: v for k, v in _LLAMA.items() if k not in ("attention_bias", "mlp_bias")},
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }
    gguf: ClassVar[GGUFLayout | None] = None  # llama.cpp calls it a Llama

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        return cls(
            **read_sizes(values, where),
            **read_rope(values, head_dim(values, where), where),
            sliding_window=read_window(values, where),
        )

    def as_written(self) -> LlamaConfig:
        """With the biases that a merge has added it is a Llama, if nothing slides.

        Raises:
            UsageError: a Mistral that gained biases and needs its window: no config says both.
        """
        if not (self.attention_bias or self.mlp_bias):
            return self
        window = self.sliding_window
        if window is not None and window < self.max_position_embeddings:
            raise UsageError(
                f"a Mistral with a sliding_window of {window} has gained biases, which no "
                "config.json says together: keep the adapter beside its base instead of merging it"
            )
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return LlamaConfig(**{**fields, "sliding_window": None})


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Qwen 2 and 2.5: biases on q, k and v; a window from layer `max_window_layers` on, if at all.

    Bai et al. 2024 (arXiv:2407.10671).
    """

    model_type: ClassVar[str] = "qwen2"
    defaults: ClassVar[Mapping[str, Any]] = {
        **{k: v for k, v in _LLAMA.items() if k not in ("attention_bias", "mlp_bias")},
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }
    bias_words: ClassVar[Mapping[str, str]] = {}
    gguf: ClassVar[GGUFLayout | None] = GGUFLayout("qwen2")

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        return cls(**read_qwen(values, where), qkv_bias=True)

    def write(self) -> dict[str, Any]:
        types = None if self.layer_types is None else list(self.layer_types)
        used = {"use_sliding_window": self.sliding_window is not None, "layer_types": types}
        return {**super().write(), **used}


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Qwen 3: heads of their own width, a norm over each head of q and k, biases by the config.

    Qwen Team 2025 (arXiv:2505.09388).
    """

    model_type: ClassVar[str] = "qwen3"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Qwen2Config.defaults,
        "head_dim": 128,
        "attention_bias": False,
    }
    bias_words: ClassVar[Mapping[str, str]] = {"self_attn": "attention_bias"}
    gguf: ClassVar[GGUFLayout | None] = GGUFLayout(
        "qwen3", {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
    )

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        bias = flag(values, "attention_bias", where)
        return cls(**read_qwen(values, where), qk_norm=True, attention_bias=bias)


def read_sizes(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that every model of the family has, but for its rotations."""
    heads = size(values, "num_attention_heads", where)
    kv_heads = size(values, "num_key_value_heads", where, null=heads)
    width = head_dim(values, where)
    if heads % kv_heads or width % 2 or heads * width > 2**27:
        raise FormatError(
            f"{where}: {heads} heads over {kv_heads} key heads of width {width} do not fit; "
            "expected a multiple of the key heads and an even width; get the config anew"
        )
    return {
        "vocab_size": size(values, "vocab_size", where),
        "hidden_size": size(values, "hidden_size", where),
        "intermediate_size": size(values, "intermediate_size", where),
        "num_hidden_layers": size(values, "num_hidden_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "rms_norm_eps": number(values, "rms_norm_eps", where),
        "max_position_embeddings": size(values, "max_position_embeddings", where),
        "tie_word_embeddings": flag(values, "tie_word_embeddings", where),
        "hidden_act": read_activation(values, "hidden_act", where),
    }


def head_dim(values: dict[str, Any], where: str) -> int:
    """The width of a head, stated or the share of the model's."""
    hidden = size(values, "hidden_size", where)
    return size(values, "head_dim", where, hidden // size(values, "num_attention_heads", where))


def read_window(values: dict[str, Any], where: str) -> int | None:
    """`sliding_window`, which may be null."""
    has_window = values["sliding_window"] is not None
    return size(values, "sliding_window", where) if has_window else None


def read_layer_types(values: dict[str, Any], where: str) -> tuple[str, ...] | None:
    """`layer_types`: a word for each layer, or null."""
    found, layers = values.get("layer_types"), size(values, "num_hidden_layers", where)
    if found is None:
        return None
    if (
        not isinstance(found, list)
        or len(found) != layers
        or not all(word in (SLIDING, FULL) for word in found)
    ):
        raise FormatError(
            f"{where}: layer_types must be {layers} words, {SLIDING!r} or {FULL!r}; "
            f"found {found!r:.80}; mend the config, or get it anew"
        )
    return tuple(found)


def read_qwen(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that Qwen 2 and 3 share."""
    fields = {**read_sizes(values, where), **read_rope(values, head_dim(values, where), where)}
    types = read_layer_types(values, where)
    window = read_window(values, where) if flag(values, "use_sliding_window", where) else None
    if window is None:
        return fields
    if types is None:
        first = values["max_window_layers"]
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise FormatError(
                f"{where}: max_window_layers must be a whole number from 0, found {first!r}"
            )
        layers = range(fields["num_hidden_layers"])
        types = tuple(SLIDING if layer >= first else FULL for layer in layers)
    return {**fields, "sliding_window": window, "layer_types": types}
