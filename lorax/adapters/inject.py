"""Inject adapters: select targets, wrap them, enable and disable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lorax.adapters.attached import (
    around_modules,
    attach_config,
    replaced_parameters,
    require_adapter,
    require_none,
    variant_of,
)
from lorax.adapters.config import LOST, SETTLED, LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.targets import expand_targets, find_targets, missing_targets
from lorax.errors import AdapterError
from lorax.models.replace import replace_module

if TYPE_CHECKING:
    from lorax.adapters.beside import Beside
    from lorax.adapters.variants import Variant


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
        variant.resolved("add")(model, config, tokenizer)
        return
    config = around_modules(config)
    config.check_start()
    config = expand_targets(model, config)
    for line in missing_targets(model, config):
        raise AdapterError(line)
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
        variant.resolved("insert")(model, config)
        return
    config = expand_targets(model, around_modules(config))
    targets = find_targets(model, config)
    beside = _beside(model, config, targets)
    layers = _started_layers(model, variant, targets, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer.train(model.training))
    if beside is not None:
        beside.put()
    attach_config(model, config)


def _beside(model: nn.Module, config: LoRAConfig, targets: dict[str, nn.Module]) -> Beside | None:
    """What is trained of the model itself: rows, whole modules, biases; mostly nothing."""
    whole = config.modules_to_save or config.bias != "none" or config.ensure_weight_tying
    if not whole and config.trainable_token_indices is None:
        return None
    from lorax.adapters.beside import Beside

    return Beside(model, config, targets)


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
    kind: type[AdapterLayer] | None = variant.resolved("embedding" if is_table else "layer")
    if kind is None:
        found = f"{variant.title} goes with Linears; this is a {type(base).__name__}"
        raise AdapterError(f"{name}: {found}; leave it out of target_modules")
    return kind


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
