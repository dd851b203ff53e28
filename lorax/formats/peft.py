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
from pathlib import Path

import torch
from torch import Tensor, nn

from lorax.adapters.attached import (
    adapter_layers,
    replaced_parameters,
    require_adapter,
    require_none,
)
from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.convert import plain_form, start_is_lost
from lorax.adapters.inject import insert_adapter
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.merge import unload_adapter
from lorax.adapters.modules_to_save import put_table
from lorax.adapters.stated import stated_config
from lorax.adapters.tables import is_language_model
from lorax.adapters.targets import find_targets, missing_targets
from lorax.adapters.trainable_tokens import rows_of
from lorax.adapters.variants import variant_of
from lorax.errors import AdapterError, FormatError, LoraxError
from lorax.formats import fingerprint
from lorax.formats.base_copies import (
    base_copies,
    check_tensor,
    file_name,
    take_base_copies,
    without_wrappers,
)
from lorax.formats.declared_size import check_declared_size
from lorax.formats.peft_directory import (
    CONFIG,
    PREFIX,
    TENSORS,
    find_adapter,
    read_adapter_config,
    write_peft_directory,
)
from lorax.formats.safetensors_files import read_file, read_metadata
from lorax.formats.vocabulary import match_vocabulary
from lorax.models.model import Model

log = logging.getLogger("lorax")


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    trainable: bool = False,
    *,
    check_base: bool = True,
    check_adapter: bool = True,
    resize_vocabulary: bool = False,
) -> AdapterConfig:
    """Load a PEFT adapter directory into the model, in place.

    Args:
        model: a model without an adapter.
        path: the directory, or one above it that holds no other adapter.
        trainable: whether the adapter requires gradients afterwards.
        check_base: refuse an adapter whose fingerprint is that of another base. Reads the base's
            files once more, the first time. False, where you know that the bases are the same.
        check_adapter: refuse an adapter that was changed since lorax saved it.
        resize_vocabulary: give embedding and head as many rows as the file's have; they stay so.

    Names in the config that the model lacks are passed over, as in PEFT, with a line in the log.

    Raises:
        AdapterError: a tensor is missing, unexpected, of another shape or not finite, the config
            does not fit the model, the vocabulary has another size, or the fingerprint does not
            hold. The model is then as it was.
        FormatError: the directory is incomplete or damaged.
    """
    directory = find_adapter(path)
    config, _ = read_adapter_config(directory)
    if not (directory / TENSORS).is_file():
        raise FormatError(_no_tensors(directory))
    where = str(directory / TENSORS)
    tensors = read_file(directory / TENSORS)
    undo = None
    if not adapter_layers(model):
        undo = match_vocabulary(model, tensors, resize_vocabulary, where)
    try:
        _check_fingerprint(model, config, tensors, directory / TENSORS, check_base, check_adapter)
        _insert(model, config, tensors, directory, resized=undo is not None)
    except LoraxError:
        if undo is not None:
            undo()
        raise
    for layer in adapter_layers(model).values():
        for tensor in layer.tensors().values():
            tensor.requires_grad_(trainable)
    for replacement in replaced_parameters(model):
        replacement.trained.requires_grad_(trainable and replacement.trains)
    return config


def _no_tensors(directory: Path) -> str:
    """What to say where the tensors' file is missing."""
    if not (directory / "adapter_model.bin").is_file():
        return f"{directory}: no {TENSORS}; get the directory anew, or save the adapter again"
    return (
        f"{directory}: no {TENSORS}; adapter_model.bin is a pickle, which can run code when it is "
        "read. If you trust it, let PEFT convert it: peft.PeftModel.from_pretrained("
        f"transformers.AutoModelForCausalLM.from_pretrained(BASE), {str(directory)!r})"
        f".save_pretrained({str(directory)!r})"
    )


def _check_fingerprint(
    model: nn.Module,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    file: Path,
    check_base: bool,
    check_adapter: bool,
) -> None:
    stated = read_metadata(file).get(fingerprint.KEY)
    if stated is None:
        return
    found = fingerprint.parse(stated, str(file))
    if check_adapter:
        fingerprint.check_adapter(found, config, tensors, str(file))
    if check_base:
        fingerprint.check_base(found, model, str(file))


def _insert(
    model: nn.Module,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    directory: Path,
    resized: bool,
) -> None:
    """Put the adapter in, with its tensors; where they do not fit, leave the model as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    require_none(model)
    check_declared_size(model, config, tensors, str(directory / TENSORS))
    if variant_of(config).is_around_modules:
        assert isinstance(config, LoRAConfig)
        _check_start(model, config, str(directory / CONFIG))
        _say_what_is_missing(model, config, str(directory / CONFIG))
    with torch.random.fork_rng(devices=[]):
        insert_adapter(model, config)
    try:
        _load_tensors(model, tensors, str(directory / TENSORS), resized)
    except AdapterError:
        unload_adapter(model)
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        raise


def _say_what_is_missing(model: nn.Module, config: LoRAConfig, where: str) -> None:
    """One line for the names that PEFT passes over, and one where its file says too little."""
    lines = missing_targets(model, config)
    lines += config.unmatched_patterns(list(find_targets(model, config)))
    if lines:
        log.warning("%s: passed over, as in PEFT: %s", where, "; ".join(lines))
    if config.init_lora_weights == "lora_ga":
        log.warning(
            "%s: lora_ga took its start out of the base in training, and PEFT's file does not hold "
            "it; loaded as PEFT loads it, which is what was trained only over that changed base",
            where,
        )


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
    config = stated_config(model)
    if not variant_of(config).is_around_modules:
        tensors = adapter_tensors(model)
    else:
        assert isinstance(config, LoRAConfig)
        config, tensors = _in_form(model, config, plain)
        config = dataclasses.replace(config, fan_in_fan_out=_fan_in_fan_out(model, config))
        if not is_language_model(model) and config.task_type is None:
            config = dataclasses.replace(config, auto_mapping=_auto_mapping(model))
        tensors |= base_copies(model, config)
    base = getattr(model, "name_or_path", "") or getattr(config, "base_model_name_or_path", None)
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
            if isinstance(model, Model):
                whole = model.as_stored(place, whole)
            name = PREFIX + file_name(model, place)
            tensors[name] = whole.clone() if place in replacement.places[1:] else whole
    return tensors


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """What PEFT writes down where it has no task_type: the class of the base, for AutoPeftModel."""
    kind = type(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _stored_name(name: str, layer: AdapterLayer, below: str) -> str:
    """PEFT's name for the tensor `below` of the layer of that path."""
    return f"{PREFIX}{name}.{below}" if layer.has_path else below


def _in_form(
    model: nn.Module, config: LoRAConfig, plain: bool | None
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The config and tensors to write: as they are, or as a plain LoRA."""
    layers = require_adapter(model)
    bases = {name: layer.base_layer for name, layer in layers.items()}
    lost = start_is_lost(model, config, bases)
    if plain is False and lost is not None:
        raise AdapterError(f"{lost}: it can only be saved as a plain LoRA; leave plain=False out")
    if plain is None and lost is not None:
        log.warning("saving as a plain LoRA of rank 2r: %s", lost)
        plain = True
    say = variant_of(config).saving
    note = say(config) if say is not None else None
    if note is not None:
        log.warning("%s", note)
    tensors = adapter_tensors(model)
    if not plain or not any(layer.moves_base for layer in layers.values()):
        return config, tensors
    for name, layer in layers.items():
        for below, tensor in layer.plain_tensors().items():
            tensors[f"{PREFIX}{name}.{below}"] = tensor
    return plain_form(config), tensors


def _check_start(model: nn.Module, config: LoRAConfig, where: str) -> None:
    """Refuse a file that does not determine its residual, before anything is decomposed."""
    lost = start_is_lost(model, config, find_targets(model, config))
    if lost is not None:
        raise AdapterError(
            f"{where}: {lost}; save the adapter as a plain LoRA where it was trained "
            "(lorax: save_adapter(plain=True), PEFT: save_pretrained("
            "path_initial_model_for_weight_conversion=...)) and load that"
        )


def _load_tensors(model: nn.Module, found: dict[str, Tensor], where: str, resized: bool) -> None:
    expected = adapter_tensors(model)
    tables, found = take_base_copies(model, found, where, keep=resized)
    found = without_wrappers(model, found, where)
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        parts = [f"{len(missing)} missing (first {missing[0]})"] if missing else []
        parts += [f"{len(unexpected)} unexpected (first {unexpected[0]})"] if unexpected else []
        raise AdapterError(
            f"{where}: tensors do not fit the config and model: {', '.join(parts)}; "
            "get config and tensors from one save, and load them over their base"
        )
    for name, tensor in found.items():
        check_tensor(name, tensor, expected[name], where)
    for name, tensor in found.items():
        expected[name].copy_(tensor)
    if tables and not resized:
        names = ", ".join(places[0] for places, _ in tables)
        log.warning("%s: %s differ from the base's and are used instead, as in PEFT", where, names)
    for places, table in tables:
        put_table(model, places, table)


def _fan_in_fan_out(model: nn.Module, config: LoRAConfig) -> bool:
    """PEFT's word for GPT-2's Conv1D: what the last of the adapted Linears is."""
    layers = adapter_layers(model)
    rows = rows_of(layers)
    linears = [
        name
        for name, layer in layers.items()
        if name not in rows and not isinstance(layer.base_layer, nn.Embedding)
    ]
    if not linears:
        return config.fan_in_fan_out
    return isinstance(model, Model) and model.transposed is not None and linears[-1] != "lm_head"
