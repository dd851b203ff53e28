"""An optimizer's state_dict as one safetensors file: tensors and numbers, no pickle.

    state.ID.NAME      a parameter's tensors, as they are (0.exp_avg, 0.step, ...)
    metadata           {"lorax_optimizer": JSON of the parameter groups}: numbers, true, null,
                       strings, lists of those; ID stands in a group's "params"

JSON writes float64 so that reading gives the same bits, so a run that goes on from this file goes
on bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lorax.errors import FormatError, UsageError
from lorax.formats.json_files import parse_json
from lorax.formats.safetensors_files import TensorFiles, open_file, read_file, write_file

KEY = "lorax_optimizer"


@dataclass(frozen=True)
class StateTensor:
    """What a file's header says of one tensor: whose it is, its name, dtype and shape."""

    parameter: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many values the tensor has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that they take."""
        return self.values * self.dtype.itemsize


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
    for key, tensor in read_file(path).items():
        index, name = _split(key, path)
        state.setdefault(index, {})[name] = tensor
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def read_state_header(path: Path) -> list[StateTensor]:
    """What tensors a state's file holds, in the parameters' order, without reading them.

    Raises:
        FormatError: as `load_optimizer_state`.
    """
    _groups(path)
    files = TensorFiles([path])
    found = []
    for key in files.names:
        index, name = _split(key, path)
        found.append(StateTensor(index, name, files.dtype(key), files.shape(key)))
    return sorted(found, key=lambda tensor: (tensor.parameter, tensor.name))


def find_optimizer_state(directory: Path) -> Path | None:
    """The optimizer's state among a directory's safetensors files; None where there is none."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with open_file(path) as file:
                if KEY in (file.metadata() or {}):
                    return path
        except (SafetensorError, OSError, ValueError, RuntimeError):
            continue
    return None


def _split(key: str, path: Path) -> tuple[int, str]:
    """state.NUMBER.NAME as (NUMBER, NAME)."""
    parts = key.split(".")
    if len(parts) != 3 or parts[0] != "state" or not parts[1].isdecimal():
        raise FormatError(f"{path}: tensor {key!r}; expected state.NUMBER.NAME")
    return int(parts[1]), parts[2]


def _groups(path: Path) -> list[dict[str, Any]]:
    try:
        with open_file(path) as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{path}: not a readable safetensors file ({error}); get the file anew, or take "
            "another checkpoint"
        ) from None
    if KEY not in metadata:
        raise FormatError(
            f"{path}: no {KEY} in its metadata; it is no optimizer's state; give a file that "
            "save_optimizer_state wrote"
        )
    groups = parse_json(metadata[KEY], f"{path}: {KEY}").get("param_groups")
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise FormatError(
            f"{path}: {KEY} must hold a list of param_groups: params and finite numbers; "
            "get the file anew, or take another checkpoint"
        )
    for group in groups:
        if isinstance(group.get("betas"), list):
            group["betas"] = tuple(group["betas"])
    return groups


def _is_group(group: Any) -> bool:
    params = group.get("params") if isinstance(group, dict) else None
    if not isinstance(params, list) or not all(type(index) is int for index in params):
        return False
    return all(math.isfinite(value) for value in group.values() if isinstance(value, float))


def _plain(value: Any, key: str) -> Any:
    """A group's value as JSON has it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(one, key) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"the group's {key} is a {type(value).__name__}; expected a plain value")
