"""config.json for a model that is written: what its origin's says, and what has changed since.

A model from a directory keeps every key of its config.json, in the dialect that it is in, those
that lorax does not know, too. Changed are the keys of what is different now: the dtype, whether the
head is the embedding, the rows of the vocabulary, biases that a merge has added. What holds for the
old files only is left out. A model from elsewhere (.gguf) gets a config.json from its own values.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from lorax.formats.model_config import read_config
from lorax.models.config import ModelConfig
from lorax.models.families import find_family
from lorax.models.model import Model
from lorax.models.rope_config import ROPE_KEYS

# The path it was loaded from once, code beside the old files, and how their weights are quantized.
STALE = ("_name_or_path", "_commit_hash", "auto_map", "quantization_config")


def write_config(model: Model, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Give config.json's content for a model as it stands.

    dtype: what its weights are written in, if that is not what they are in.

    Raises:
        UsageError: no config says what the model has become.
    """
    dtype = dtype or model.get_parameter(model.embedding_name).dtype
    name = str(dtype).removeprefix("torch.")
    stated = dict(model.origin.config) if model.origin is not None else {}
    before = dataclasses.replace(model.config, tie_word_embeddings=is_tied(model))
    config = before.as_written()
    if config.model_type != before.model_type:
        stated = {k: v for k, v in stated.items() if k not in {*before.write(), *ROPE_KEYS}}
        kept = stated | _values(config)
    elif stated:
        then = read_config(stated, "config.json")
        kept = _with_changes(stated, _values(config), _values(then), config.aliases)
    else:
        kept = _values(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in stated] or ["torch_dtype"]
    kept |= dict.fromkeys(keys, name)
    kept["architectures"] = kept.get("architectures") or _values(config)["architectures"]
    return {key: value for key, value in kept.items() if key not in STALE}


def is_tied(model: Model) -> bool:
    """Whether the head is the embedding; a head that was quantized is not."""
    weight = getattr(model.lm_head, "weight", None)
    return weight is model.get_parameter(model.embedding_name)


def _with_changes(
    stated: dict[str, Any], now: dict[str, Any], then: dict[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """What was stated, with the values that are not what they were."""
    changed = {key: value for key, value in now.items() if value != then[key]}
    names = {key: alias for alias, key in aliases.items() if alias in stated}
    kept = dict(stated)
    if any(key in ROPE_KEYS for key in changed):  # one dialect, not the half of two
        changed |= {key: now[key] for key in ROPE_KEYS if key in now}
        kept = {key: value for key, value in kept.items() if key not in ROPE_KEYS}
    return kept | {names.get(key, key): value for key, value in changed.items()}


def _values(config: ModelConfig) -> dict[str, Any]:
    """The config's values under config.json's keys."""
    family = find_family(config.model_type, "config.json")
    head = {"architectures": [family.architecture], "model_type": config.model_type}
    return {**head, **config.write()}
