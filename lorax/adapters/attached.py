"""What adapter a model has: its layers by their paths, and its config."""

from __future__ import annotations

from torch import nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.variants import variant_of
from lorax.errors import AdapterError


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
    return around_modules(config)


def stated_config(model: nn.Module) -> AdapterConfig:
    """The config of the model's adapter, whatever it is."""
    require_adapter(model)
    config = model.adapter_config
    assert isinstance(config, AdapterConfig)
    return config


def attach_config(model: nn.Module, config: AdapterConfig) -> None:
    """Note which adapter the model has; any nn.Module can have one."""
    model.__dict__["adapter_config"] = config


def around_modules(config: AdapterConfig) -> LoRAConfig:
    """The config of a variant that wraps modules, all of which pick them as LoRA does."""
    assert isinstance(config, LoRAConfig)
    return config
