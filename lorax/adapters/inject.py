"""Adapters into a model and out of it: which modules, put in place, counted, switched off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lorax.adapters.adalora import AdaLoRAConfig, AdaLoRALinear
from lorax.adapters.config import DEFAULT_TARGETS, LoRAConfig
from lorax.adapters.dora import DoRAEmbedding, DoRALinear
from lorax.adapters.embedding import LoRAEmbedding
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.adapters.prompt import Encodes, PromptTuningConfig, add_prompt
from lorax.adapters.replaced import find_parameters, replace_parameters, replaced_parameters
from lorax.adapters.started import LoftQLinear, ResidualLoRALinear
from lorax.adapters.tokens import find_rows, put_rows
from lorax.errors import AdapterError
from lorax.models import Model
from lorax.models.gpt2 import GPT2
from lorax.models.replace import replace_module
from lorax.quant.linear import QuantizedLinear


def add_adapter(
    model: nn.Module, config: LoRAConfig | PromptTuningConfig, tokenizer: Encodes | None = None
) -> None:
    """Put an adapter into the model, in place; afterwards the adapter alone requires gradients.

    Args:
        model: a model without an adapter.
        config: what, and where: a LoRAConfig, an AdaLoRAConfig or a PromptTuningConfig.
        tokenizer: the model's, for a prompt that starts as a text; nothing else asks for it.

    Raises:
        AdapterError: the model has an adapter already, a target matches no module or one that is
            neither Linear nor Embedding, a pattern matches no target, or something asks to be
            trained twice over. The model is then as it was.
    """
    if adapter_layers(model):
        raise AdapterError("the model has an adapter already; unload_adapter(model) first")
    if isinstance(config, PromptTuningConfig):
        add_prompt(model, config, tokenizer)
        return
    config = expand_targets(model, config)
    targets = _targets(model, config)
    _check_patterns(config, list(targets))
    rows = find_rows(model, config)
    whole = find_parameters(model, config, {*targets, *rows})
    _check_start(model, targets, config)
    layers = {name: _started_layer(name, base, config) for name, base in targets.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer.train(model.training))
    put_rows(model, rows)
    replace_parameters(model, whole)
    model.adapter_config = config  # type: ignore[assignment]


def _layer(name: str, base: nn.Module, config: LoRAConfig) -> AdapterLayer:
    """The variant that the config asks for, around the module of that path."""
    size = config.rank(name), config.scaling(name)
    if isinstance(base, nn.Embedding):
        if config.lora_bias or isinstance(config, AdaLoRAConfig):
            kind = "lora_bias" if config.lora_bias else "AdaLoRA"
            raise AdapterError(f"{kind} goes with Linears; this is an Embedding")
        return (DoRAEmbedding if config.use_dora else LoRAEmbedding)(base, *size)
    linear = base, *size, config.lora_dropout
    if config.starts_inside:
        return ResidualLoRALinear(*linear)
    if config.init_lora_weights == "loftq":
        times, format = config.loftq_config["loftq_iter"], config.loftq_config.get("loftq_format")
        return LoftQLinear(*linear, iterations=times, format=format or "nf4")
    if isinstance(config, AdaLoRAConfig):
        return AdaLoRALinear(*linear)
    if config.use_dora:
        return DoRALinear(*linear)
    return LoRALinear(*linear, config.lora_bias)


def _check_start(model: nn.Module, targets: dict[str, nn.Module], config: LoRAConfig) -> None:
    """What cannot be started as asked, and could not be written as PEFT's file either."""
    how = config.init_lora_weights
    if not config.starts_inside and how != "loftq":
        return
    for name, module in targets.items():
        if not _is_linear(module):
            kind = type(module).__name__
            raise AdapterError(f"{name} is a {kind}; init_lora_weights = {how!r} goes with Linears")
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    if how == "loftq" and "lm_head" in targets and tied:
        raise AdapterError("lm_head is tied to the embedding; LoftQ cannot quantize one of them")


def _started_layer(name: str, base: nn.Module, config: LoRAConfig) -> AdapterLayer:
    try:
        layer = _layer(name, base, config)
        layer.initialize(config.init_lora_weights)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None
    return layer


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers by their paths."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer)}


def require_adapter(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers, of which there must be some."""
    layers = adapter_layers(model)
    if not layers:
        raise AdapterError("the model has no adapter; add_adapter or load_adapter first")
    return layers


def adapter_config(model: nn.Module) -> LoRAConfig:
    """The config of the model's LoRA of any kind, its targets written out."""
    config = stated_config(model)
    if isinstance(config, PromptTuningConfig):
        raise AdapterError("the model's adapter is a tuned prompt; expected a LoRA")
    return config


def stated_config(model: nn.Module) -> LoRAConfig | PromptTuningConfig:
    """The config of the model's adapter, whatever it is."""
    require_adapter(model)
    config = model.adapter_config
    assert isinstance(config, LoRAConfig | PromptTuningConfig)
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

    LoftQ's quantized copies stand for parameters that are counted already.
    """
    plain = list(model.parameters())
    copies = [m.quantized for m in model.modules() if isinstance(m, LoftQLinear)]
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
    """Write out target_modules: None by the model's kind, "all-linear" by its Linears' paths."""
    if config.target_modules is None:
        kind = "gpt2" if isinstance(model, GPT2) else "llama"
        return dataclasses.replace(config, target_modules=DEFAULT_TARGETS[kind])
    if config.target_modules != "all-linear":
        return config
    names = [n for n, m in model.named_modules() if _is_linear(m) and n != "lm_head"]
    return dataclasses.replace(config, target_modules=names)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | QuantizedLinear)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that `add_adapter` would adapt, by their paths."""
    return _targets(model, expand_targets(model, config))


def _targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    unmatched = config.unmatched(modules)
    if unmatched:
        linears = sorted({name.rpartition(".")[2] for name, m in modules.items() if _is_linear(m)})
        raise AdapterError(
            f"target_modules: {unmatched} match no module; the Linears are called {linears}"
        )
    targets = {name: module for name, module in modules.items() if config.selects(name)}
    if not targets:
        raise AdapterError(
            "no module is left to adapt: exclude_modules or layers_to_transform take them all out"
        )
    for name, module in targets.items():
        if not _is_linear(module) and not isinstance(module, nn.Embedding):
            kind = type(module).__name__
            raise AdapterError(
                f"target_modules: {name} is a {kind}; lorax adapts Linears and Embeddings"
            )
    return targets


def _check_patterns(config: LoRAConfig, targets: list[str]) -> None:
    if isinstance(config, AdaLoRAConfig):
        strangers = set(config.rank_pattern or ()) - {f"{name}.lora_E" for name in targets}
        if strangers:
            raise AdapterError(f"rank_pattern: {min(strangers)!r} belongs to no adapted module")
        return
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(config, key).items():
            alone = dataclasses.replace(
                config, r=1, lora_alpha=1, rank_pattern={pattern: 2}, alpha_pattern={}
            )
            if not any(alone.rank(name) == 2 for name in targets):
                raise AdapterError(f"{key}: {pattern!r} (for {value}) matches no adapted module")
