"""config.json for a model that is written: what its origin's says, and what has changed since.

A model from a directory keeps every key of its config.json, in the dialect that it is in, those
that lorax does not know, too. Changed are the keys of what is different now: the dtype, whether the
head is the embedding, the rows of the vocabulary, biases that a merge has added. What holds for the
old files only is left out. A model from elsewhere (.gguf) gets a config.json from its own values.
"""

import dataclasses
from typing import Any

import torch

from lorax.errors import UsageError
from lorax.formats.model_config import GPT2_ALIASES, ModelConfig, read_config
from lorax.formats.rope_config import ROPE_FIELDS, ROPE_KEYS, write_rope
from lorax.models import Model
from lorax.models.gpt2 import GPT2Config
from lorax.models.llama import LlamaConfig

# The path it was loaded from once, code beside the old files, and how their weights are quantized.
STALE = ("_name_or_path", "_commit_hash", "auto_map", "quantization_config")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def write_config(model: Model, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Give config.json's content for a model as it stands.

    dtype: what its weights are written in, if that is not what they are in.

    Raises:
        UsageError: a Mistral that gained biases and needs its window: no config says both.
    """
    dtype = dtype or model.get_parameter(model.embedding_name).dtype
    name = str(dtype).removeprefix("torch.")
    stated = dict(model.origin.config) if model.origin is not None else {}
    config = dataclasses.replace(model.config, tie_word_embeddings=is_tied(model))
    if isinstance(config, LlamaConfig) and _needs_another_family(config, stated):
        config = dataclasses.replace(config, sliding_window=None)
        stated = {k: v for k, v in stated.items() if k not in ("sliding_window", *ROPE_KEYS)}
        kept = stated | _values(config)
    elif stated:
        kept = _with_changes(stated, _values(config), _values(read_config(stated, "config.json")))
    else:
        kept = _values(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in stated] or ["torch_dtype"]
    kept |= dict.fromkeys(keys, name)
    kept["architectures"] = kept.get("architectures") or [_CLASSES[kept["model_type"]]]
    return {key: value for key, value in kept.items() if key not in STALE}


def _needs_another_family(config: LlamaConfig, stated: dict[str, Any]) -> bool:
    """Whether this is a Mistral with biases, which only a Llama's config has words for."""
    has_bias = config.attention_bias or config.mlp_bias
    if stated.get("model_type") != "mistral" or not has_bias:
        return False
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        raise UsageError(
            f"a Mistral with a sliding_window of {window} has gained biases, which no config.json "
            "says together: keep the adapter beside its base instead of merging it"
        )
    return True


def is_tied(model: Model) -> bool:
    """Whether the head is the embedding; a head that was quantized is not."""
    weight = getattr(model.lm_head, "weight", None)
    return weight is model.get_parameter(model.embedding_name)


def _with_changes(
    stated: dict[str, Any], now: dict[str, Any], then: dict[str, Any]
) -> dict[str, Any]:
    """What was stated, with the values that are not what they were."""
    changed = {key: value for key, value in now.items() if value != then[key]}
    names = {key: alias for alias, key in GPT2_ALIASES.items() if alias in stated}
    kept = dict(stated)
    if any(key in ROPE_KEYS for key in changed):  # one dialect, not the half of two
        changed |= {key: now[key] for key in ROPE_KEYS if key in now}
        kept = {key: value for key, value in kept.items() if key not in ROPE_KEYS}
    return kept | {names.get(key, key): value for key, value in changed.items()}


def _values(config: ModelConfig) -> dict[str, Any]:
    """The config's values under config.json's keys."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, GPT2Config):
        return {"architectures": [_CLASSES["gpt2"]], "model_type": "gpt2", **values}
    kind = "llama" if config.sliding_window is None else "mistral"
    other = ("attention_bias", "mlp_bias") if kind == "mistral" else ("sliding_window",)
    values = {k: v for k, v in values.items() if k not in (*other, *ROPE_FIELDS)}
    head = {"architectures": [_CLASSES[kind]], "model_type": kind}
    return {**head, **values, **write_rope(config)}
