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
from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import default_of
from lorax.adapters.prompt import PromptTuningConfig
from lorax.errors import AdapterError, FormatError, require
from lorax.formats import fingerprint
from lorax.formats.adapter_card import CARD, card, may_write
from lorax.formats.directory import written_directory
from lorax.formats.json_files import read_json
from lorax.formats.safetensors_files import write_file

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 4 * 2**20  # AdaLoRA's masks and trained tokens' numbers are the longest part
CONFIGS: dict[str, type[LoRAConfig] | type[PromptTuningConfig]] = {
    kind.peft_type: kind for kind in (LoRAConfig, AdaLoRAConfig, PromptTuningConfig)
}

# The keys that every file has; all others only where they are not at rest. PEFT 0.10, vLLM and
# others stop at a key that they do not know, so a plain LoRA must have none that is younger.
_ALWAYS = {
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
}


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
    values = read_json(file, max_bytes=MAX_CONFIG_BYTES)
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
        values = _peft_config(config, base)
        text = json.dumps(values, indent=2) + "\n"
        (directory / CONFIG).write_text(text, encoding="utf-8")
        if may_write(Path(path)):
            (directory / CARD).write_text(card(config, base, values["task_type"]), encoding="utf-8")


def _peft_config(config: LoRAConfig | PromptTuningConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json's content, in PEFT's order."""
    values: dict[str, Any] = dataclasses.asdict(config)
    at_rest = {each.name: default_of(each) for each in dataclasses.fields(config)}
    always = _ALWAYS
    if not isinstance(config, LoRAConfig):
        always = set(values)
        if config.prompt_tuning_init == "TEXT":  # PEFT does not read the file without a name
            values["tokenizer_name_or_path"] = config.tokenizer_name_or_path or base or "unknown"
    elif isinstance(config, AdaLoRAConfig):
        always = _ALWAYS | (set(values) - {f.name for f in dataclasses.fields(LoRAConfig)})
    values = {key: v for key, v in values.items() if key in always or v != at_rest[key]}
    for key in ("peft_version", "runtime_config"):
        values.pop(key, None)
    stated = (values.get(key) for key in ("task_type", "auto_mapping"))
    task = values.get("task_type") if any(stated) else "CAUSAL_LM"
    values |= {"base_model_name_or_path": base, "inference_mode": True}
    values |= {"peft_type": config.peft_type, "task_type": task}
    return dict(sorted(values.items()))


def _check_types(values: dict[str, Any], file: Path) -> None:
    """A value of an impossible type is the file's fault and says so."""
    names = list | str | None
    kinds: dict[str, Any] = {
        "task_type": str,
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
        if values.get(key) is not None and not isinstance(values[key], kind):
            raise FormatError(f"{file}: {key} = {values[key]!r} has the wrong type")
        if isinstance(values.get(key), list):
            numbers = ("layers_to_transform", "trainable_token_indices")
            inner = int if key in numbers else str
            if not all(isinstance(item, inner) for item in values[key]):
                raise FormatError(f"{file}: {key} = {values[key]!r} has an entry of the wrong type")
