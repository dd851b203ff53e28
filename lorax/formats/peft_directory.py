"""PEFT's adapter directory as files: adapter_config.json, adapter_model.safetensors, README.md.

The config is read with PEFT's defaults, checked key by key and type by type; the tensors go as they
are. What they mean for a model is lorax/formats/peft.py's.
"""

import dataclasses
import json
import os
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_files import default_of
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.variants import needed_of_file
from lorax.errors import AdapterError, FormatError
from lorax.files import require
from lorax.formats import fingerprint
from lorax.formats.adapter_card import CARD, card, may_write
from lorax.formats.directory import written_directory
from lorax.formats.instead import instead_of_adapter
from lorax.formats.json_files import read_json
from lorax.formats.safetensors_files import write_file

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 4 * 2**20  # AdaLoRA's masks and trained tokens' numbers are the longest part

# Of LoRA's keys, those that every file has; the others only where they are not the default. PEFT
# 0.10, vLLM and others stop at a key that they do not know, so a plain LoRA must have none that is
# younger. What a variant has of its own is always there.
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
        raise FormatError(
            f"{directory}: no {CONFIG}; expected a PEFT adapter directory; "
            f"{instead_of_adapter(directory)}"
        )
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
) -> tuple[AdapterConfig, str | None]:
    """The config of an adapter directory, and the base model that it names.

    Raises:
        FormatError: no such file, or damaged. AdapterError: a key that lorax does not cover.
    """
    file = find_adapter(path) / CONFIG
    values = read_json(file, max_bytes=MAX_CONFIG_BYTES)
    kind = needed_of_file(values, str(file)).config
    assert kind is not None
    _check_types(kind, values, file)
    base = values.get("base_model_name_or_path")
    return kind.from_dict(values, str(file)), base if isinstance(base, str) else None


def write_peft_directory(
    path: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    base: str | None,
    mark: str | None = None,
) -> None:
    """Write adapter_model.safetensors, adapter_config.json and the card, all of them or none.

    tensors: under PEFT's names. base: the base model's name. mark: the fingerprint of that base;
        without one the directory loads as a stranger's, over any base that fits.

    Raises:
        AdapterError: a tensor is not finite. EnvironmentProblem: the disk refuses.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{name} is not finite; an adapter like that is not saved; train it again with a "
                "lower learning rate"
            )
    with written_directory(Path(path), replace=True) as directory:
        write_file(tensors, directory / TENSORS, {fingerprint.KEY: mark} if mark else None)
        values = _peft_config(config, base)
        text = json.dumps(values, indent=2) + "\n"
        (directory / CONFIG).write_text(text, encoding="utf-8")
        if may_write(Path(path)):
            (directory / CARD).write_text(card(config, base, values["task_type"]), encoding="utf-8")


def _peft_config(config: AdapterConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json's content, in PEFT's order."""
    written: Any = config.for_file(base)
    values: dict[str, Any] = dataclasses.asdict(written)
    values = {key: v for key, v in values.items() if key in _ALWAYS or not _is_rest(written, key)}
    for key in ("peft_version", "runtime_config"):
        values.pop(key, None)
    stated = (values.get(key) for key in ("task_type", "auto_mapping"))
    task = values.get("task_type") if any(stated) else "CAUSAL_LM"
    values |= {"base_model_name_or_path": base, "inference_mode": True}
    values |= {"peft_type": written.peft_type, "task_type": task}
    return dict(sorted(values.items()))


def _is_rest(config: AdapterConfig, key: str) -> bool:
    """Whether a field of LoRAConfig says what PEFT takes where its key is not there.

    A plugin's own default for such a field is none: who reads the file may have another one.
    """
    fields = {each.name: each for each in dataclasses.fields(LoRAConfig)}
    if key not in fields:
        return False
    own = {each.name: each for each in dataclasses.fields(config)}[key]
    value, theirs = getattr(config, key), default_of(fields[key])
    return value == default_of(own) and (value == theirs or not (value or theirs))


def _check_types(kind: type[AdapterConfig], values: dict[str, Any], file: Path) -> None:
    """A value of another type than the config's field is the file's fault and says so."""
    hints, described = get_type_hints(kind), dataclasses.fields(kind)
    for key in (field.name for field in described):
        value = values.get(key)
        if value is not None and not _fits(value, hints[key]):
            raise FormatError(
                f"{file}: {key} = {value!r} has the wrong type; "
                "mend it there, or save the adapter again with PEFT"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of that annotation; numbers are the config's own to judge."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint in (int, float):
        return not isinstance(value, str | list | dict)
    if origin in (UnionType, Union):
        return any(_fits(value, each) for each in inside)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inside[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inside[1]) for item in value.values())
    return isinstance(value, hint)
