"""Gemma 3's language model (Gemma Team 2025, arXiv:2503.19786), `gemma3_text` in config.json.

Gemma 2 (lorax/models/gemma2.py) with a norm over each head of q and k in the place of the cap on
the scores, and two kinds of layers: five see a window and turn by `rope_local_base_freq`, every
sixth sees everything and turns by `rope_theta`, stretched where the config says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lorax.errors import FormatError, UnsupportedModel
from lorax.models.config import GGUFLayout
from lorax.models.config_values import number, size
from lorax.models.gemma2 import (
    GEMMA,
    KEYS,
    NAMES,
    Gemma2,
    Gemma2Config,
    GemmaLayer,
    GemmaModel,
    GemmaRMSNorm,
    alternating,
    read_gemma,
    scalar_of,
)
from lorax.models.llama import LlamaAttention, LlamaModel, Rope
from lorax.models.llama_config import FULL, SLIDING, LlamaConfig, head_dim, read_layer_types
from lorax.models.rope import rotations
from lorax.models.rope_config import read_rope


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """The sizes and options of a Gemma 3; attn_logit_softcapping is kept and unused."""

    model_type: ClassVar[str] = "gemma3_text"
    defaults: ClassVar[Mapping[str, Any]] = {
        **GEMMA,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    }
    gguf: ClassVar[GGUFLayout | None] = GGUFLayout(
        "gemma3",
        {**NAMES, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
        {**KEYS, "rope.freq_base_swa": "rope_local_base_freq"},
        norm_offset=1.0,
        derived=scalar_of(62),
    )

    qk_norm: bool = True
    rope_local_base_freq: float = 10000.0

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        layers = size(values, "num_hidden_layers", where)
        period = size(values, "sliding_window_pattern", where)
        return cls(
            **read_gemma(values, where),
            **_read_ropes(values, where),
            layer_types=read_layer_types(values, where) or alternating(layers, period),
        )


def _read_ropes(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Both rotations: of transformers 5's nested rope_parameters, else of transformers 4's keys."""
    nested = values.get("rope_parameters")
    nested = {} if nested is None else nested
    if not isinstance(nested, dict):
        raise FormatError(
            f"{where}: rope_parameters must be an object, found {nested!r}"
            "; mend it, or get the config anew"
        )
    full, sliding = (nested.get(kind) or {} for kind in (FULL, SLIDING))
    if not isinstance(full, dict) or not isinstance(sliding, dict):
        raise FormatError(
            f"{where}: rope_parameters must hold an object for each kind of layer"
            f"; mend {FULL} and {SLIDING}"
        )
    if sliding.get("rope_type", sliding.get("type", "default")) != "default":
        raise UnsupportedModel(
            f"{where}: stretched rotations in {SLIDING} are not covered"
            "; expected rope_type default there"
        )
    stated = values.get("rope_scaling")
    if stated is not None and not isinstance(stated, dict):
        raise FormatError(
            f"{where}: rope_scaling must be an object, found {stated!r}"
            "; mend it, or get the config anew"
        )
    theta = {"rope_theta": values["rope_theta"]}
    scaling = {"rope_type": full.get("type", "default"), **theta, **full, **(stated or {})}
    if stated and "type" in stated and "rope_type" not in stated:
        scaling["rope_type"] = full.get("rope_type", stated["type"])
    local = sliding if "rope_theta" in sliding else {"rope_theta": values["rope_local_base_freq"]}
    outside = {k: v for k, v in values.items() if k not in ("rope_parameters", "rope_theta")}
    rope = read_rope({**outside, "rope_scaling": scaling}, head_dim(values, where), where)
    return {**rope, "rope_local_base_freq": number(local, "rope_theta", where)}


class Gemma3(Gemma2):
    """A Gemma 3 with its head: input_ids (B, T) int64 -> logits (B, T, V)."""

    config: Gemma3Config

    def new_body(self, config: LlamaConfig) -> LlamaModel:
        return Gemma3Model(config, gemma3_layer)


class Gemma3Model(GemmaModel):
    """Gemma's, with rotations of their own for the layers that slide."""

    config: Gemma3Config

    def ropes(self, start: int, x: Tensor) -> list[Rope]:
        """Each layer's rotations, of the positions start ... start + T."""
        local = dataclasses.replace(
            self.config,
            rope_theta=self.config.rope_local_base_freq,
            rope_factor=1.0,
            llama3_scaling=None,
            dynamic_scaling=None,
            yarn_scaling=None,
        )
        far, near = (rotations(c, start, x.shape[1], x) for c in (self.config, local))
        return [near if self.config.slides(i) else far for i in range(len(self.layers))]


def gemma3_layer(config: Gemma3Config, index: int) -> nn.Module:
    """Gemma 3's attention and MLP between four norms."""
    scale = config.query_pre_attn_scalar**-0.5
    return GemmaLayer(config, LlamaAttention(config, index, GemmaRMSNorm, scale))
