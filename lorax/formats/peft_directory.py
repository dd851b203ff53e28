"""PEFT's adapter directory as files: adapter_config.json, adapter_model.safetensors, README.md.

The config is read with PEFT's defaults, checked key by key and type by type; the tensors go as they
are. What they mean for a model is lorax/formats/peft.py's.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorax.adapters.adalora import AdaLoRAConfig
from lorax.adapters.config import NOT_COVERED, LoRAConfig
from lorax.adapters.prompt import PromptTuningConfig
from lorax.errors import AdapterError, FormatError, require
from lorax.formats import fingerprint
from lorax.formats.directory import written_directory
from lorax.formats.json_files import read_json
from lorax.formats.safetensors_files import write_file

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # whose format this is
PREFIX = "base_model.model."
CONFIGS: dict[str, type[LoRAConfig] | type[PromptTuningConfig]] = {
    kind.peft_type: kind for kind in (LoRAConfig, AdaLoRAConfig, PromptTuningConfig)
}

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- base_model:adapter:{base}
{tags}- lorax
---

# {kind} adapter

Trained with lorax: {sizes}. PEFT and lorax load it:

    PeftModel.from_pretrained(model, "PATH")        lorax.load_adapter(model, "PATH")
"""


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """The directory that holds the adapter: `path`, or its only sub-directory that does.

    PEFT puts an adapter which is not called "default" into a sub-directory of its name.

    Raises:
        EnvironmentProblem: no such path. FormatError: no adapter is there, or there are several,
            which are named.
    """
    directory = require(path)
    if (directory / CONFIG).is_file():
        return directory
    below = sorted(file.parent for file in directory.glob(f"[!.]*/{CONFIG}"))
    if not below:
        hint = ""
        if (directory / "model" / "config.json").is_file():
            hint = "; full fine-tuning leaves none, its model/ stands alone"
        raise FormatError(f"{directory}: no {CONFIG}; expected a PEFT adapter directory{hint}")
    if len(below) > 1:
        names = ", ".join(folder.name for folder in below)
        raise FormatError(
            f"{directory}: several adapters lie there ({names}); give the path of one of them"
        )
    return below[0]


def is_adapter(directory: Path) -> bool:
    """Whether an adapter lies there or below; a model may have some below and stays a model."""
    if (directory / CONFIG).is_file():
        return True
    is_model = (directory / "config.json").is_file()
    return not is_model and any(directory.glob(f"[!.]*/{CONFIG}"))


def read_adapter_config(
    path: str | os.PathLike[str],
) -> tuple[LoRAConfig | PromptTuningConfig, str | None]:
    """The config of an adapter directory, and the base model that it names.

    Raises:
        FormatError: no such file, or damaged. AdapterError: a key that lorax does not cover.
    """
    file = find_adapter(path) / CONFIG
    values = read_json(file)
    kind = CONFIGS.get(str(values.get("peft_type")))
    if kind is None:
        raise AdapterError(
            f"{file}: peft_type {values.get('peft_type')!r}; lorax reads {', '.join(CONFIGS)}"
        )
    if kind is not PromptTuningConfig:
        _check_types(values, file)
    base = values.get("base_model_name_or_path")
    return kind.from_dict(values, str(file)), base if isinstance(base, str) else None


def write_peft_directory(
    path: str | os.PathLike[str],
    config: LoRAConfig | PromptTuningConfig,
    tensors: dict[str, Tensor],
    base: str | None,
    mark: str | None = None,
) -> None:
    """Write tensors under PEFT's names, config and card.

    base: the base model's name. mark: the fingerprint; without one it loads as a stranger's.

    Raises:
        AdapterError, EnvironmentProblem: as `save_adapter`.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name} is not finite; an adapter like that is not saved")
    with written_directory(Path(path), replace=True) as directory:
        write_file(tensors, directory / TENSORS, {fingerprint.KEY: mark} if mark else None)
        text = json.dumps(_peft_config(config, base), indent=2, sort_keys=False) + "\n"
        (directory / CONFIG).write_text(text)
        (directory / "README.md").write_text(_card(config, base or "unknown"))


def _card(config: LoRAConfig | PromptTuningConfig, base: str) -> str:
    """The model card: README.md."""
    if isinstance(config, PromptTuningConfig):
        kind, tags, sizes = "Prompt tuning", "", f"{config.num_virtual_tokens} virtual tokens"
    elif isinstance(config, AdaLoRAConfig):
        kind, tags = "AdaLoRA", ""
        sizes = f"init_r = {config.init_r}, target_r = {config.target_r}"
    else:
        kind, tags = "LoRA", "- lora\n"
        sizes = f"r = {config.r}, lora_alpha = {config.lora_alpha}"
    return _CARD.format(base=base, kind=kind, tags=tags, sizes=sizes)


def _peft_config(config: LoRAConfig | PromptTuningConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json's content, with the keys that PEFT writes, in its order."""
    values: dict[str, Any] = {
        **dataclasses.asdict(config),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": config.peft_type,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }
    if isinstance(config, PromptTuningConfig):
        values["modules_to_save"] = None
        if config.prompt_tuning_init == "TEXT":  # PEFT does not read the file without a name
            values["tokenizer_name_or_path"] = config.tokenizer_name_or_path or base or "unknown"
    else:
        values |= NOT_COVERED
        values["megatron_core"] = "megatron.core"
        values["qalora_group_size"] = 16
    return dict(sorted(values.items()))


def _check_types(values: dict[str, Any], file: Path) -> None:
    """A value of an impossible type is the file's fault and says so."""
    names = list | str | None
    kinds: dict[str, Any] = {
        "target_modules": names,
        "exclude_modules": names,
        "rank_pattern": dict | None,
        "alpha_pattern": dict | None,
        "lora_dropout": int | float,
        "use_rslora": bool,
        "fan_in_fan_out": bool,
        "init_lora_weights": bool | str,
        "bias": str,
        "layers_to_transform": list | int | None,
        "layers_pattern": names,
        "use_dora": bool,
        "lora_bias": bool,
        "modules_to_save": list | None,
        "trainable_token_indices": list | dict | None,
        "ensure_weight_tying": bool,
        "loftq_config": dict | None,
        "target_r": int,
        "init_r": int,
        "tinit": int,
        "tfinal": int,
        "deltaT": int,
        "beta1": int | float,
        "beta2": int | float,
        "orth_reg_weight": int | float,
        "total_step": int | None,
    }
    for key, kind in kinds.items():
        if key in values and not isinstance(values[key], kind):
            raise FormatError(f"{file}: {key} = {values[key]!r} has the wrong type")
        if isinstance(values.get(key), list):
            numbers = ("layers_to_transform", "trainable_token_indices")
            inner = int if key in numbers else str
            if not all(isinstance(item, inner) for item in values[key]):
                raise FormatError(f"{file}: {key} = {values[key]!r} has an entry of the wrong type")
    for key in ("rank_pattern", "alpha_pattern", "loftq_config"):
        values[key] = values.get(key) or {}
    if values["peft_type"] == AdaLoRAConfig.peft_type:
        values["rank_pattern"] = values["rank_pattern"] or None
