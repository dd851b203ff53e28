"""Adapters into a model and out of it: which modules, put in place, counted, switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorax.adapters.config import DEFAULT_TARGETS, LOST, SETTLED, LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.fit import (
    LONG,
    check_fit,
    is_linear,
    missing_targets,
    shortest_names,
)
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.modules_to_save import find_parameters, replace_parameters, replaced_parameters
from lorax.adapters.tables import head_path, is_language_model
from lorax.adapters.trainable_tokens import find_rows, put_rows
from lorax.adapters.variants import Variant, resolved, variant_of
from lorax.errors import AdapterError
from lorax.models import Model
from lorax.models.gpt2 import GPT2
from lorax.models.replace import replace_module
from lorax.quant.linear import QuantizedLinear


def add_adapter(model: nn.Module, config: AdapterConfig, tokenizer: Any = None) -> None:
    """Put an adapter into the model, in place; afterwards the adapter alone requires gradients.

    Args:
        model: a model without an adapter.
        config: what, and where: the config of a registered variant, such as a LoRAConfig.
        tokenizer: the model's, for a prompt that starts as a text; nothing else asks for it.

    Raises:
        AdapterError: the model has an adapter already, a target matches no module or one that is
            neither Linear nor Embedding, a pattern matches no target, or something asks to be
            trained twice over. The model is then as it was.
    """
    require_none(model)
    variant = variant_of(config)
    if variant.add is not None:
        resolved(variant.add)(model, config, tokenizer)
        return
    config = _around_modules(config)
    if config.init_lora_weights in (*SETTLED, *LOST):
        raise AdapterError(
            f"init_lora_weights = {config.init_lora_weights!r}: lorax loads such an adapter, and "
            "starts none; take true, 'gaussian', 'pissa', 'olora' or 'loftq'"
        )
    config = expand_targets(model, config)
    check_fit(model, config)
    for line in config.unmatched_patterns(find_targets(model, config)):
        raise AdapterError(line)
    insert_adapter(model, config)


def insert_adapter(model: nn.Module, config: AdapterConfig) -> None:
    """`add_adapter` for a config that a file states: names which the model lacks are passed over.

    How A and B start is not looked at where nothing of it is left in a trained adapter.

    Raises:
        AdapterError: as `add_adapter`.
    """
    variant = variant_of(config)
    if variant.insert is not None:
        resolved(variant.insert)(model, config)
        return
    config = expand_targets(model, _around_modules(config))
    targets = find_targets(model, config)
    rows = find_rows(model, config)
    whole = find_parameters(model, config, {*targets, *rows})
    layers = _started_layers(model, variant, targets, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer.train(model.training))
    put_rows(model, rows)
    replace_parameters(model, whole)
    model.adapter_config = config  # type: ignore[assignment]


def _started_layers(
    model: nn.Module, variant: Variant, targets: dict[str, nn.Module], config: LoRAConfig
) -> dict[str, AdapterLayer]:
    """The variant's layers around these modules, initialized."""
    how = config.init_lora_weights
    how = True if how in (*SETTLED, *LOST) else how
    kinds = {name: _kind(variant, name, base) for name, base in targets.items()}
    shared: dict[type[AdapterLayer], Any] = {}
    for kind in dict.fromkeys(kinds.values()):
        of_kind = {name: base for name, base in targets.items() if kinds[name] is kind}
        shared[kind] = kind.prepare(model, of_kind, config)
    layers = {}
    for name, base in targets.items():
        try:
            layers[name] = kinds[name].wrap(base, name, config, shared[kinds[name]])
            layers[name].initialize(how)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from None
    return layers


def _kind(variant: Variant, name: str, base: nn.Module) -> type[AdapterLayer]:
    """The variant's layer class for that module."""
    is_table = isinstance(base, nn.Embedding)
    kind: type[AdapterLayer] | None = resolved(variant.embedding if is_table else variant.layer)
    if kind is None:
        raise AdapterError(
            f"{name}: {variant.title} goes with Linears; this is a {type(base).__name__}"
        )
    return kind


def _around_modules(config: AdapterConfig) -> LoRAConfig:
    """The config of a variant that wraps modules, all of which pick them as LoRA does."""
    assert isinstance(config, LoRAConfig)
    return config


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers by their paths."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer)}


def require_adapter(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers, of which there must be some."""
    layers = adapter_layers(model)
    if not layers:
        raise AdapterError("the model has no adapter; add_adapter or load_adapter first")
    return layers


def require_none(model: nn.Module) -> None:
    """Refuse a model that has an adapter."""
    if adapter_layers(model):
        raise AdapterError("the model has an adapter already; unload_adapter(model) first")


def adapter_config(model: nn.Module) -> LoRAConfig:
    """The config of the model's adapter, of any variant around modules, its targets written out."""
    config = stated_config(model)
    variant = variant_of(config)
    if not variant.is_around_modules:
        raise AdapterError(f"the model's adapter is {variant.title}; expected one around modules")
    return _around_modules(config)


def stated_config(model: nn.Module) -> AdapterConfig:
    """The config of the model's adapter, whatever it is."""
    require_adapter(model)
    config = model.adapter_config
    assert isinstance(config, AdapterConfig)
    return config


@contextmanager
def disabled_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the `with` the model computes as its base alone, as it was loaded."""
    layers = require_adapter(model).values()
    before = [layer.enabled for layer in layers]
    replaced = [r for r in replaced_parameters(model) if r.is_in_place(model)]
    for replacement in replaced:
        replacement.put(model, trained=False)
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        for replacement in replaced:
            replacement.put(model, trained=True)


def embedding_weight(model: Model) -> Tensor:
    """The embedding's own weight (vocab, dim), adapted or not: its dtype is the base's."""
    module = model.get_submodule(model.embedding_name.removesuffix(".weight"))
    table = module.base_layer if isinstance(module, AdapterLayer) else module
    assert isinstance(table, nn.Embedding)
    return table.weight


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantized weight counts as many as it has values.

    Copies of the base that a layer keeps (LoftQ's) stand for parameters that are counted already.
    """
    plain = list(model.parameters())
    copies = [copy for layer in adapter_layers(model).values() for copy in layer.copies()]
    bases = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m not in copies]
    quantized = [base.quantized for base in bases]
    everything = sum(p.numel() for p in plain) + sum(q.shape.numel() for q in quantized)
    return sum(p.numel() for p in plain if p.requires_grad), everything


def print_trainable_parameters(model: nn.Module) -> None:
    """Print one line, as PEFT does."""
    trainable, everything = count_parameters(model)
    print(
        f"trainable params: {trainable:,d} || all params: {everything:,d} || "
        f"trainable%: {100 * trainable / everything:.4f}"
    )


def expand_targets(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Write out target_modules as PEFT does: by the model's kind, by its Linears, in short.

    None takes what is usual for the model, "all-linear" all Linears but a language model's head. A
    list of 20 paths or more is condensed to the shortest names that match the same modules.

    Raises:
        AdapterError: None, for a module that is none of lorax's models.
    """
    targets = config.target_modules
    names = [name for name, _ in model.named_modules()]
    if targets is None:
        if not is_language_model(model):
            raise AdapterError(
                f"target_modules is not given, and what is usual for a {type(model).__name__} is "
                "not known; give names or 'all-linear'"
            )
        targets = DEFAULT_TARGETS["gpt2" if isinstance(model, GPT2) else "llama"]
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        head = head_path(model)
        targets = [n for n, m in model.named_modules() if is_linear(m) and n != head]
    if isinstance(targets, list) and len(set(targets)) >= LONG:
        ends = tuple(f".{name}" for name in targets)
        others = [n for n in names if n not in set(targets) and not n.endswith(ends)]
        short = shortest_names(set(targets), others)
        targets = short if len(short) < len(set(targets)) else targets
    return config if targets is config.target_modules else replace(config, target_modules=targets)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that `add_adapter` would adapt, by their paths.

    Raises:
        AdapterError: there is none, or one is neither Linear nor Embedding.
    """
    config = expand_targets(model, config)
    modules = {name: module for name, module in model.named_modules() if name}
    targets = {name: module for name, module in modules.items() if config.selects(name)}
    if not targets:
        for line in missing_targets(model, config):
            raise AdapterError(line)
        raise AdapterError(
            "no module is left to adapt: exclude_modules or layers_to_transform take them all out"
        )
    for name, module in targets.items():
        if not is_linear(module) and not isinstance(module, nn.Embedding):
            kind = type(module).__name__
            raise AdapterError(
                f"target_modules: {name} is a {kind}; lorax adapts Linears and Embeddings"
            )
    return targets
