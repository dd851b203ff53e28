"""The config of a model: what config.json says, under Hugging Face's names; no torch.

A family derives its own from `ModelConfig` (llama_config.py, gpt2.py, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class GGUFLayout:
    """How llama.cpp's files hold a family.

    architecture: `general.architecture`.
    names: a layer's tensor names there -> here, where they differ from a Llama's; None: no more.
    keys: of metadata, below the architecture -> of config.json, beside those of a Llama.
    permutes: whether the rows of q and k are reordered for ggml's rotation of neighbours.
    norm_offset: what was added to the norms' weights.
    derived: config.json's values so far -> those that the file leaves to its readers' code.
    """

    architecture: str
    names: Mapping[str, str | None] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    permutes: bool = False
    norm_offset: float = 0.0
    derived: Callable[[dict[str, Any]], dict[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and options of a model, under Hugging Face's names.

    model_type: config.json's word for the family.
    defaults: every key that the family reads -> what a missing one means (transformers' defaults).
    aliases: another name of a key -> the key; where both stand, the other name counts.
    bias_words: a part of a layer ("self_attn") -> the key that gives all its Linears a bias.
    gguf: how llama.cpp's files hold it; None: they are not read.
    """

    model_type: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    bias_words: ClassVar[Mapping[str, str]] = {}
    gguf: ClassVar[GGUFLayout | None] = None

    vocab_size: int
    tie_word_embeddings: bool = False

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Self:
        """Translate config.json's content, its missing keys filled in with `defaults`.

        Raises:
            UnsupportedModel: an option is not covered. FormatError: a value is impossible.
        """
        raise NotImplementedError

    def write(self) -> dict[str, Any]:
        """The values under config.json's keys."""
        return {key: getattr(self, key) for key in self.defaults if hasattr(self, key)}

    def as_written(self) -> ModelConfig:
        """The config to write: another family's, where this one has no words for what changed."""
        return self

    @property
    def sizes(self) -> Sizes:
        """Layers, heads and widths."""
        raise NotImplementedError

    @property
    def positions(self) -> int:
        """How many tokens the positions cover."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sizes:
    """What caches and adapters ask about a model's shape."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
