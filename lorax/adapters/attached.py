"""What adapter a model has: its layers by their paths, its replaced parameters, its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.layer import AdapterLayer
from lorax.errors import AdapterError

if TYPE_CHECKING:
    from lorax.adapters.modules_to_save import Replacement
    from lorax.adapters.variants import Variant


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers by their paths."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer)}


def require_adapter(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers by their paths; an AdapterError where there is none."""
    layers = adapter_layers(model)
    if not layers:
        raise AdapterError("the model has no adapter; add_adapter or load_adapter first")
    return layers


def require_none(model: nn.Module) -> None:
    """Refuse, as an AdapterError, a model that has an adapter."""
    if adapter_layers(model):
        raise AdapterError("the model has an adapter already; unload_adapter(model) first")


def replaced_parameters(model: nn.Module) -> list[Replacement]:
    """The model's replaced parameters, in its own order; none without an adapter that has any."""
    return getattr(model, "_replaced_parameters", [])


def variant_of(config: Any) -> Variant:
    """The variant that a config asks for, out of the table of all that are registered.

    Raises:
        AdapterError: it is of a class that nobody registered.
    """
    from lorax.adapters import variants  # which imports each variant's file

    return variants.variant_of(config)


def attach_config(model: nn.Module, config: AdapterConfig) -> None:
    """Note which adapter the model has; any nn.Module can have one."""
    model.__dict__["adapter_config"] = config


def around_modules(config: AdapterConfig) -> LoRAConfig:
    """The config of a variant that wraps modules, all of which pick them as LoRA does."""
    assert isinstance(config, LoRAConfig)
    return config
