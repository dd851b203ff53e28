"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors, both ways.

    base_model.model.<path of the module>.lora_A.weight    (r, in)
    base_model.model.<path of the module>.lora_B.weight    (out, r)
    ....lora_B.bias (out,)    ....lora_magnitude_vector (out,)    where the config asks for them
    ....lora_embedding_A (r, vocab)    ....lora_embedding_B (dim, r)    of an embedding

Tensors are float32 as a rule. A file with a tensor too many or too few, or of another shape, is
refused: PEFT loads such a file without a word, and the adapter then is not what its author trained.
"""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorax.adapters.config import NOT_COVERED, LoRAConfig
from lorax.adapters.convert import plain_form, plain_tensors, start_is_lost
from lorax.adapters.inject import (
    adapter_config,
    adapter_layers,
    add_adapter,
    find_targets,
    require_adapter,
)
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.merge import unload_adapter
from lorax.adapters.started import ResidualLoRALinear
from lorax.data.tokenizer import Tokenizer
from lorax.errors import AdapterError, FormatError, UsageError
from lorax.formats.directory import written_directory
from lorax.formats.huggingface import load_model, load_tokenizer
from lorax.formats.json_files import read_json
from lorax.formats.safetensors_files import FLOATS, read_file, write_file
from lorax.models import Model
from lorax.models.gpt2 import GPT2

log = logging.getLogger("lorax")

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # whose format this is
_PREFIX = "base_model.model."

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- base_model:adapter:{base}
- lora
- lorax
---

# LoRA adapter

Trained with lorax: r = {r}, lora_alpha = {alpha}. PEFT and lorax load it:

    PeftModel.from_pretrained(model, "PATH")        lorax.load_adapter(model, "PATH")
"""


def read_adapter_config(path: str | os.PathLike[str]) -> tuple[LoRAConfig, str | None]:
    """The config of an adapter directory, and the base model that it names.

    Raises:
        FormatError: no such file, or damaged. AdapterError: a key that lorax does not cover.
    """
    directory = Path(path)
    file = directory / CONFIG
    if not file.is_file():
        raise FormatError(f"{directory}: no {CONFIG}; expected a PEFT adapter directory")
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type {values.get('peft_type')!r}; lorax reads LORA")
    _check_types(values, file)
    base = values.get("base_model_name_or_path")
    return LoRAConfig.from_dict(values, str(file)), base if isinstance(base, str) else None


def open_model(
    path: str,
    base: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    needs_adapter: bool = False,
) -> tuple[Model, Tokenizer]:
    """Load a model, or an adapter with its base, whichever lies at `path`; and its tokenizer.

    Args:
        path: a model (directory, Hub id, .gguf), an adapter's directory or a run's.
        base: the base of an adapter, where its config's own entry does not lead to it.
        dtype, device, quantization: as in `load_model`.
        needs_adapter: refuse a plain model.

    Raises:
        UsageError: an adapter that names no base, a plain model with a `base`, or one where an
            adapter is needed. And all that `load_model` and `load_adapter` raise.
    """
    if (Path(path) / "adapter" / CONFIG).is_file():  # a run's directory
        path = str(Path(path) / "adapter")
    is_adapter = (Path(path) / CONFIG).is_file()
    if not is_adapter:
        if needs_adapter or base is not None:
            raise UsageError(f"{path}: no {CONFIG} there; expected an adapter's directory")
        model = load_model(path, dtype, device, quantization)
        return model, load_tokenizer(path)
    stated = read_adapter_config(path)[1]
    base = base or stated
    if base is None:
        raise UsageError(f"{path}: the adapter names no base model; give one with --base")
    model = load_model(base, dtype, device, quantization)
    load_adapter(model, path)
    return model, load_tokenizer(base)


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], trainable: bool = False
) -> LoRAConfig:
    """Load a PEFT adapter directory into the model, in place.

    Args:
        model: a model without an adapter.
        path: the directory.
        trainable: whether the adapter requires gradients afterwards.

    Raises:
        AdapterError: a tensor is missing, unexpected, of another shape or not finite, or the
            config does not fit the model. The model is then as it was.
        FormatError: the directory is incomplete or damaged.
    """
    directory = Path(path)
    config, _ = read_adapter_config(directory)
    if not (directory / TENSORS).is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle: save it again as safetensors" if pickled else ""
        raise FormatError(f"{directory}: no {TENSORS}{hint}")
    tensors = read_file(directory / TENSORS)
    _check_start(model, config, str(directory / CONFIG))
    before = [parameter.requires_grad for parameter in model.parameters()]
    parameters = list(model.parameters())
    with torch.random.fork_rng(devices=[]):
        add_adapter(model, config)
    try:
        _load_tensors(model, tensors, str(directory / TENSORS))
    except AdapterError:
        unload_adapter(model)
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
        raise
    for layer in adapter_layers(model).values():
        for tensor in layer.tensors().values():
            tensor.requires_grad_(trainable)
    return config


def save_adapter(model: nn.Module, path: str | os.PathLike[str], plain: bool | None = None) -> None:
    """Write the model's adapter as a PEFT directory; files of the same names are replaced.

    Args:
        model: a model with an adapter.
        path: the directory.
        plain: for PiSSA and OLoRA, whether to write the difference to the base as a plain LoRA of
            rank 2r, which any base of these weights takes; False writes PEFT's own form. By
            default PEFT's, unless loading it would not give the same model: then the plain one,
            and the log says why.

    Raises:
        AdapterError: there is no adapter, it is not finite, or it has not the form that was asked.
        EnvironmentProblem: the disk is full or refuses; what was there before is intact.
    """
    config, tensors = _in_form(model, plain)
    config = dataclasses.replace(config, fan_in_fan_out=_fan_in_fan_out(model, config))
    tensors |= _base_copies(model, config)
    write_peft_directory(path, config, tensors, getattr(model, "name_or_path", "") or None)


def write_peft_directory(
    path: str | os.PathLike[str], config: LoRAConfig, tensors: dict[str, Tensor], base: str | None
) -> None:
    """Write tensors under PEFT's names, config and card; `base` is the base model's name.

    Raises:
        AdapterError, EnvironmentProblem: as `save_adapter`.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name} is not finite; an adapter like that is not saved")
    with written_directory(Path(path), replace=True) as directory:
        write_file(tensors, directory / TENSORS)
        text = json.dumps(_peft_config(config, base), indent=2, sort_keys=False) + "\n"
        (directory / CONFIG).write_text(text)
        card = _CARD.format(base=base or "unknown", r=config.r, alpha=config.lora_alpha)
        (directory / "README.md").write_text(card)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    tensors = {}
    for name, layer in require_adapter(model).items():
        for below, tensor in layer.tensors().items():
            tensors[f"{_PREFIX}{name}.{below}"] = tensor.detach()
    return tensors


def _in_form(model: nn.Module, plain: bool | None) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The config and tensors to write: as they are, or as a plain LoRA."""
    config, layers = adapter_config(model), require_adapter(model)
    bases = {name: layer.base_layer for name, layer in layers.items()}
    lost = start_is_lost(model, config, bases)
    if plain is False and lost is not None:
        raise AdapterError(f"{lost}: it can only be saved as a plain LoRA")
    if plain is None and lost is not None:
        log.warning("saving as a plain LoRA of rank 2r: %s", lost)
        plain = True
    if config.loftq_config.get("loftq_format", "nf4") != "nf4":
        log.warning("PEFT knows no loftq_format and will quantize this base to plain NF4")
    tensors = adapter_tensors(model)
    if not plain or not (config.starts_inside or config.init_lora_weights == "loftq"):
        return config, tensors
    for name, layer in layers.items():
        for below, tensor in plain_tensors(layer).items():
            tensors[f"{_PREFIX}{name}.{below}"] = tensor
    return plain_form(config), tensors


def _check_start(model: nn.Module, config: LoRAConfig, where: str) -> None:
    """Refuse a file that does not determine its residual, before anything is decomposed."""
    if not config.starts_inside or adapter_layers(model):
        return
    lost = start_is_lost(model, config, find_targets(model, config))
    if lost is not None:
        raise AdapterError(
            f"{where}: {lost}; save the adapter as a plain LoRA where it was trained "
            "(lorax: save_adapter(plain=True), PEFT: save_pretrained("
            "path_initial_model_for_weight_conversion=...)) and load that"
        )


def _load_tensors(model: nn.Module, found: dict[str, Tensor], where: str) -> None:
    expected = adapter_tensors(model)
    found = _without_base_copies(model, found, where)
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        parts = [f"{len(missing)} missing (first {missing[0]})"] if missing else []
        parts += [f"{len(unexpected)} unexpected (first {unexpected[0]})"] if unexpected else []
        raise AdapterError(f"{where}: tensors do not fit the config and model: {', '.join(parts)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype not in FLOATS:
            raise AdapterError(
                f"{where}: {name} is {tuple(tensor.shape)} {tensor.dtype}; "
                f"expected {tuple(expected[name].shape)}, floating"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{where}: {name} is not finite")
    for name, tensor in found.items():
        expected[name].copy_(tensor)


def _base_copies(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    """The whole tables that PEFT puts beside an adapted embedding and an adapted head.

    It does so where one of the two names below is a target by itself: not for a path that ends in
    it, not for GPT-2's wte alone, and not together with trainable_token_indices.
    """
    layers = adapter_layers(model)
    targets, known = config.target_modules or [], ("embed_tokens", "lm_head")
    if isinstance(targets, str):
        targets = [name.rpartition(".")[2] for name in layers]
    if config.trainable_token_indices or not any(name in targets for name in known):
        return {}
    plain = config.init_lora_weights in (True, False, "gaussian")
    tables = (str(model.embedding_name).removesuffix(".weight"), "lm_head")
    return {
        f"{_PREFIX}{name}.base_layer.weight": (
            layers[name].base_weight() if plain else layers[name].stored_base()
        ).clone()
        for name in tables
        if name in layers and isinstance(layers[name].base_layer, nn.Linear | nn.Embedding)
    }


def _without_base_copies(
    model: nn.Module, found: dict[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Take out the copies of the base's own weights that PEFT puts beside an adapted head or table.

    A copy that differs from this model's weight belongs to another base, and is refused.
    """
    rest = dict(found)
    for name, layer in adapter_layers(model).items():
        copy = rest.pop(f"{_PREFIX}{name}.base_layer.weight", None)
        if copy is None:
            continue
        weight = layer.stored_base()
        if copy.shape != weight.shape or not _is_same_base(layer, copy.to(weight), weight):
            raise AdapterError(
                f"{where}: {name}.base_layer.weight differs from the model's; "
                "the adapter was trained on another base"
            )
    return rest


def _is_same_base(layer: AdapterLayer, copy: Tensor, weight: Tensor) -> bool:
    """Equal bits; where a decomposition lies between, equal up to rounding."""
    if torch.equal(copy, weight):
        return True
    if not isinstance(layer, ResidualLoRALinear):
        return False
    size = layer.base_weight().abs().max()
    return bool((copy - weight).abs().max() <= 8 * torch.finfo(weight.dtype).eps * size)


def _peft_config(config: LoRAConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json's content, with the keys that PEFT writes, in its order."""
    values: dict[str, Any] = {
        **NOT_COVERED,
        **dataclasses.asdict(config),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "megatron_core": "megatron.core",
        "peft_type": config.peft_type,
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted(values.items()))


def _fan_in_fan_out(model: nn.Module, config: LoRAConfig) -> bool:
    """PEFT's word for GPT-2's Conv1D: what the last of the adapted Linears is."""
    layers = adapter_layers(model).items()
    linears = [n for n, layer in layers if not isinstance(layer.base_layer, nn.Embedding)]
    if not linears:
        return config.fan_in_fan_out
    return isinstance(model, GPT2) and linears[-1] != "lm_head"


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
        "loftq_config": dict | None,
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
