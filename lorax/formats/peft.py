"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors, both ways.

    base_model.model.<path of the module>.lora_A.weight    (r, in)
    base_model.model.<path of the module>.lora_B.weight    (out, r)
    ....lora_B.bias (out,)    ....lora_magnitude_vector (out,)    where the config asks for them
    ....lora_embedding_A (r, vocab)    ....lora_embedding_B (dim, r)    of an embedding

AdaLoRA's are `....lora_A` (r_l, in), `....lora_E` (r_l, 1) and `....lora_B` (out, r_l), pruned by
the config's rank_pattern, down to r_l = 0. A tuned prompt is `prompt_embeddings` (n, C).

Tensors are float32 as a rule. A file with a tensor too many or too few, or of another shape, is
refused: PEFT loads such a file without a word, and the adapter then is not what its author trained.
What lorax saves carries a fingerprint of the base and of the adapter itself (fingerprint.py).
"""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorax.adapters.adalora import AdaLoRAConfig
from lorax.adapters.config import NOT_COVERED, LoRAConfig
from lorax.adapters.convert import plain_form, plain_tensors, start_is_lost
from lorax.adapters.inject import (
    adapter_layers,
    add_adapter,
    find_targets,
    require_adapter,
    stated_config,
)
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.merge import unload_adapter
from lorax.adapters.prompt import PromptTuning, PromptTuningConfig, insert_prompt
from lorax.adapters.replaced import replaced_parameters
from lorax.adapters.started import ResidualLoRALinear
from lorax.data.tokenizer import Tokenizer
from lorax.errors import AdapterError, FormatError, UsageError
from lorax.formats import fingerprint
from lorax.formats.directory import written_directory
from lorax.formats.huggingface import as_stored, load_model, load_tokenizer
from lorax.formats.json_files import read_json
from lorax.formats.safetensors_files import FLOATS, read_file, read_metadata, write_file
from lorax.models import Model
from lorax.models.gpt2 import GPT2

log = logging.getLogger("lorax")

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # whose format this is
_PREFIX = "base_model.model."
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
        FormatError: there is none, or there are several, which are named.
    """
    directory = Path(path)
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


def _is_adapter(directory: Path) -> bool:
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


def open_model(
    path: str,
    base: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    needs_adapter: bool = False,
    check_base: bool = True,
) -> tuple[Model, Tokenizer]:
    """Load a model, or an adapter with its base, whichever lies at `path`; and its tokenizer.

    Args:
        path: a model (directory, Hub id, .gguf), an adapter's directory or a run's, which has
            an adapter/ or, after full fine-tuning, a model/.
        base: the base of an adapter, where its config's own entry does not lead to it.
        dtype, device, quantization: as in `load_model`.
        needs_adapter: refuse a plain model.
        check_base: as in `load_adapter`.

    Raises:
        UsageError: an adapter that names no base, a plain model with a `base`, or one where an
            adapter is needed. And all that `load_model` and `load_adapter` raise.
    """
    if (Path(path) / "adapter" / CONFIG).is_file():  # a run's directory
        path = str(Path(path) / "adapter")
    elif (Path(path) / "model" / "config.json").is_file():  # of full fine-tuning
        path = str(Path(path) / "model")
    is_adapter = _is_adapter(Path(path))
    if not is_adapter:
        if needs_adapter or base is not None:
            raise UsageError(
                f"{path}: no {CONFIG} there; expected an adapter's directory (a model that was "
                "fine-tuned in full has none)"
            )
        model = load_model(path, dtype, device, quantization)
        return model, load_tokenizer(path)
    stated = read_adapter_config(path)[1]
    base = base or stated
    if base is None:
        raise UsageError(f"{path}: the adapter names no base model; give one with --base")
    model = load_model(base, dtype, device, quantization)
    load_adapter(model, path, check_base=check_base)
    return model, load_tokenizer(base)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    trainable: bool = False,
    *,
    check_base: bool = True,
    check_adapter: bool = True,
) -> LoRAConfig | PromptTuningConfig:
    """Load a PEFT adapter directory into the model, in place.

    Args:
        model: a model without an adapter.
        path: the directory, or one above it that holds no other adapter.
        trainable: whether the adapter requires gradients afterwards.
        check_base: refuse an adapter whose fingerprint is that of another base. Reads the base's
            files once more, the first time. False, where you know that the bases are the same.
        check_adapter: refuse an adapter that was changed since lorax saved it.

    Raises:
        AdapterError: a tensor is missing, unexpected, of another shape or not finite, the config
            does not fit the model, or the fingerprint does not hold. The model is then as it was.
        FormatError: the directory is incomplete or damaged.
    """
    directory = find_adapter(path)
    config, _ = read_adapter_config(directory)
    if not (directory / TENSORS).is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle: save it again as safetensors" if pickled else ""
        raise FormatError(f"{directory}: no {TENSORS}{hint}")
    tensors = read_file(directory / TENSORS)
    stated = read_metadata(directory / TENSORS).get(fingerprint.KEY)
    if stated is not None:
        where = str(directory / TENSORS)
        found = fingerprint.parse(stated, where)
        if check_adapter:
            fingerprint.check_adapter(found, config, tensors, where)
        if check_base:
            fingerprint.check_base(found, model, where)
    if isinstance(config, LoRAConfig):
        _check_start(model, config, str(directory / CONFIG))
    before = [parameter.requires_grad for parameter in model.parameters()]
    parameters = list(model.parameters())
    if isinstance(config, PromptTuningConfig):
        insert_prompt(model, config)
    else:
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
    for replacement in replaced_parameters(model):
        replacement.trained.requires_grad_(trainable)
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
    config: LoRAConfig | PromptTuningConfig = stated_config(model)
    if isinstance(config, PromptTuningConfig):
        tensors = adapter_tensors(model)
    else:
        config, tensors = _in_form(model, config, plain)
        config = dataclasses.replace(config, fan_in_fan_out=_fan_in_fan_out(model, config))
        tensors |= _base_copies(model, config)
    base = getattr(model, "name_or_path", "") or None
    mark = fingerprint.describe(model, config, tensors)
    write_peft_directory(path, config, tensors, base, mark)


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


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    tensors = {}
    for name, layer in require_adapter(model).items():
        for below, tensor in layer.tensors().items():
            tensors[_stored_name(name, layer, below)] = tensor.detach()
    for replacement in replaced_parameters(model):
        for place in replacement.places:
            whole = replacement.trained.detach()
            if isinstance(model, GPT2):
                whole = as_stored(place, whole)
            tensors[_PREFIX + place] = whole.clone() if place in replacement.places[1:] else whole
    return tensors


def _stored_name(name: str, layer: AdapterLayer, below: str) -> str:
    """PEFT's name for the tensor `below` of the layer of that path."""
    return below if isinstance(layer, PromptTuning) else f"{_PREFIX}{name}.{below}"


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


def _in_form(
    model: nn.Module, config: LoRAConfig, plain: bool | None
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The config and tensors to write: as they are, or as a plain LoRA."""
    layers = require_adapter(model)
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
    return _without_wrappers(model, rest, where)


def _without_wrappers(model: nn.Module, found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Take out what PEFT writes twice or thrice under bias = "all" and modules_to_save.

    Beside `ln_f.bias` there is the same once more as `ln_f.modules_to_save.bias`, and the base's
    own as `ln_f.original_module.bias`.
    """
    rest = dict(found)
    for replacement in replaced_parameters(model):
        copies = [rest[_PREFIX + p] for p in replacement.places if _PREFIX + p in rest]
        if not all(torch.equal(copy, copies[0]) for copy in copies):
            raise AdapterError(f"{where}: {replacement.places} are tied, but differ there")
        for place in replacement.places:
            module, _, name = (_PREFIX + place).rpartition(".")
            again = rest.pop(f"{module}.modules_to_save.{name}", None)
            if again is not None and not torch.equal(again, rest.get(_PREFIX + place, again[:0])):
                raise AdapterError(f"{where}: {place} stands there twice, with other values")
            base = rest.pop(f"{module}.original_module.{name}", None)
            original = replacement.original
            if base is not None and not torch.equal(base.to(original), original):
                raise AdapterError(
                    f"{where}: {place} of the base differs from the model's; "
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
