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
import logging
import os

import torch
from torch import Tensor, nn

from lorax.adapters.config import LoRAConfig
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
from lorax.adapters.tokens import TokenRows
from lorax.errors import AdapterError, FormatError
from lorax.formats import fingerprint
from lorax.formats.huggingface import as_stored
from lorax.formats.peft_directory import (
    CONFIG,
    PREFIX,
    TENSORS,
    find_adapter,
    read_adapter_config,
    write_peft_directory,
)
from lorax.formats.safetensors_files import FLOATS, read_file, read_metadata
from lorax.models.gpt2 import GPT2

log = logging.getLogger("lorax")


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
            tensors[PREFIX + place] = whole.clone() if place in replacement.places[1:] else whole
    return tensors


def _stored_name(name: str, layer: AdapterLayer, below: str) -> str:
    """PEFT's name for the tensor `below` of the layer of that path."""
    return below if isinstance(layer, PromptTuning) else f"{PREFIX}{name}.{below}"


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
            tensors[f"{PREFIX}{name}.{below}"] = tensor
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
        f"{PREFIX}{name}.base_layer.weight": (
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
        copy = rest.pop(f"{PREFIX}{name}.base_layer.weight", None)
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
        copies = [rest[PREFIX + p] for p in replacement.places if PREFIX + p in rest]
        if not all(torch.equal(copy, copies[0]) for copy in copies):
            raise AdapterError(f"{where}: {replacement.places} are tied, but differ there")
        for place in replacement.places:
            module, _, name = (PREFIX + place).rpartition(".")
            again = rest.pop(f"{module}.modules_to_save.{name}", None)
            if again is not None and not torch.equal(again, rest.get(PREFIX + place, again[:0])):
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


def _fan_in_fan_out(model: nn.Module, config: LoRAConfig) -> bool:
    """PEFT's word for GPT-2's Conv1D: what the last of the adapted Linears is."""
    layers = adapter_layers(model).items()
    linears = [
        name
        for name, layer in layers
        if not isinstance(layer, TokenRows) and not isinstance(layer.base_layer, nn.Embedding)
    ]
    if not linears:
        return config.fan_in_fan_out
    return isinstance(model, GPT2) and linears[-1] != "lm_head"
