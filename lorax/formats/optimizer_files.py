"""An optimizer's state_dict as one safetensors file: tensors and numbers, no pickle.

    state.ID.NAME      a parameter's tensors, as they are (0.exp_avg, 0.step, ...)
    metadata           {"lorax_optimizer": JSON of the parameter groups}: numbers, true, null,
                       strings, lists of those; ID stands in a group's "params"

JSON writes float64 so that reading gives the same bits, so a run that goes on from this file goes
on bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorax.errors import FormatError, UsageError
from lorax.formats.json_files import parse_json
from lorax.formats.safetensors_files import read_file, write_file

KEY = "lorax_optimizer"


def save_optimizer_state(state_dict: Mapping[str, Any], path: Path) -> None:
    """Write what `optimizer.state_dict()` gives.

    Raises:
        UsageError: a group or a state holds what is neither a tensor nor a plain value.
    """
    tensors: dict[str, Tensor] = {}
    for index, state in state_dict["state"].items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise UsageError(
                    f"the state's {name} is a {type(value).__name__}; expected a tensor"
                )
            tensors[f"state.{index}.{name}"] = value
    groups = [
        {key: _plain(value, key) for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    metadata = {KEY: json.dumps({"param_groups": groups}, allow_nan=False)}
    write_file(tensors, path, metadata)


def load_optimizer_state(path: Path) -> dict[str, Any]:
    """Read a state_dict back, for `optimizer.load_state_dict`.

    Raises:
        FormatError: the file is damaged, or is no optimizer's state.
    """
    groups = _groups(path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read_file(path).items():
        parts = name.split(".")
        if len(parts) != 3 or parts[0] != "state" or not parts[1].isdecimal():
            raise FormatError(f"{path}: tensor {name!r}; expected state.NUMBER.NAME")
        state.setdefault(int(parts[1]), {})[parts[2]] = tensor
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _groups(path: Path) -> list[dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error})") from None
    if KEY not in metadata:
        raise FormatError(f"{path}: no {KEY} in its metadata; it is no optimizer's state")
    groups = parse_json(metadata[KEY], f"{path}: {KEY}").get("param_groups")
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise FormatError(f"{path}: {KEY} must hold a list of param_groups with their params")
    for group in groups:
        if isinstance(group.get("betas"), list):
            group["betas"] = tuple(group["betas"])
    return groups


def _is_group(group: Any) -> bool:
    params = group.get("params") if isinstance(group, dict) else None
    return isinstance(params, list) and all(type(index) is int for index in params)


def _plain(value: Any, key: str) -> Any:
    """A group's value as JSON has it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(one, key) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"the group's {key} is a {type(value).__name__}; expected a plain value")
