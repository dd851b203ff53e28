"""An adapter's directory as data to calculate with, and back: `lorax.adapters.arithmetic.Adapter`.

No base model is needed, so only a LoRA that is a low-rank matrix by itself can be read: what takes
its start out of the base, quantizes or scales it is refused, by what its variant says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from lorax.adapters.arithmetic import Adapter, LowRank, check_low_rank
from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.variants import variant_of
from lorax.errors import AdapterError, FormatError, UsageError
from lorax.formats.peft_directory import (
    CONFIG,
    PREFIX,
    TENSORS,
    find_adapter,
    read_adapter_config,
    write_peft_directory,
)
from lorax.formats.safetensors_files import FLOATS, read_file

log = logging.getLogger("lorax")
_A, _B = ".lora_A.weight", ".lora_B.weight"


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT LoRA directory as data.

    Raises:
        FormatError: the directory is incomplete or damaged.
        AdapterError: the adapter is more than a low-rank matrix beside the weight, or its tensors
            do not fit its config.
    """
    directory = find_adapter(path)
    config, base = read_adapter_config(directory)
    config = _checked(config, str(directory / CONFIG))
    file = directory / TENSORS
    if not file.is_file():
        raise FormatError(
            f"{directory}: no {TENSORS}; get the directory anew, or save the adapter again"
        )
    tensors = read_file(file)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or tensor.dim() != 2:
            kind = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise AdapterError(
                f"{file}: {name} is {kind}; expected a matrix, floating; get the file anew"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{file}: {name} is not finite; get the file anew, or train the adapter again"
            )
    modules = {_module(name, str(file)) for name in tensors}
    names = sorted(name for name in modules if name is not None)
    layers = {name: _layer(name, tensors, config, str(file)) for name in names}
    if not layers:
        raise AdapterError(
            f"{file}: no lora_A and lora_B in it; expected one pair at least; give another adapter"
        )
    return Adapter(layers, base, config)


def write_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter as a PEFT directory; files of the same names are replaced.

    Raises:
        AdapterError: a tensor is not finite.
        EnvironmentProblem: the disk is full or refuses; what was there before is intact.
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors[PREFIX + name + _A] = layer.A.float().contiguous()
        tensors[PREFIX + name + _B] = layer.B.float().contiguous()
    write_peft_directory(path, adapter.plain_config(), tensors, adapter.base)


def weighted_sum(paths: Sequence[str | os.PathLike[str]], weights: Sequence[float]) -> Adapter:
    """The sum of adapters' directories, each times its weight (1 where none are given); exact.

    Raises:
        UsageError: no directory, or not as many weights as directories.
        AdapterError, FormatError: as `read_adapter`; shapes that do not fit, or adapters of other
            bases that have no module in common. Other names of one base are a line in the log.
    """
    weights = list(weights) or [1.0] * len(paths)
    if not paths or len(weights) != len(paths):
        raise UsageError(f"{len(paths)} adapters and {len(weights)} weights; expected one for each")
    adapters = [read_adapter(path) for path in paths]
    for adapter in adapters[1:]:
        _check_base(adapters[0], adapter)
    first, *others = (weight * adapter for adapter, weight in zip(adapters, weights, strict=True))
    return sum(others, first)


def _check_base(first: Adapter, other: Adapter) -> None:
    bases = f"{first.base!r} and {other.base!r}"
    if first.base == other.base:
        return
    if first.layers.keys().isdisjoint(other.layers):
        raise AdapterError(
            f"the adapters name the bases {bases}, and adapt no module in common; "
            "expected adapters of one base; leave one out"
        )
    log.warning("the adapters name the bases %s; their sum needs these to be the same", bases)


def _checked(config: AdapterConfig, where: str) -> LoRAConfig:
    """The config of a low-rank matrix by itself."""
    check_low_rank(config, where)
    why = variant_of(config).no_matrix_alone
    if why:
        raise AdapterError(f"{where}: {why}")
    assert isinstance(config, LoRAConfig)
    return config


def _module(name: str, where: str) -> str | None:
    """The path of the module that a tensor belongs to; None for a copy of the base's weight."""
    path = name.removeprefix(PREFIX)
    for end in (_A, _B):
        if path != name and path.endswith(end):
            return path.removesuffix(end)
    if path.endswith(".base_layer.weight"):
        return None
    raise AdapterError(
        f"{where}: {name} is no lora_A or lora_B of a Linear; expected these alone; "
        "load the adapter over its base instead"
    )


def _layer(name: str, tensors: dict[str, Tensor], config: LoRAConfig, where: str) -> LowRank:
    A, B = (tensors.get(PREFIX + name + end) for end in (_A, _B))
    if A is None or B is None:
        raise AdapterError(
            f"{where}: {name} has only one of lora_A and lora_B; expected both; "
            "get the file anew, or save the adapter again"
        )
    if A.shape[0] != B.shape[1] or A.shape[0] != config.rank(name):
        raise AdapterError(
            f"{where}: {name} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}; "
            f"expected rank {config.rank(name)}; get config and tensors from one save"
        )
    return LowRank(A, B, config.scaling(name))
