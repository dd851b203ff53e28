"""What a model says of the adapter that it has."""

from __future__ import annotations

from torch import nn

from lorax.adapters.attached import around_modules, require_adapter, variant_of
from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.errors import AdapterError


def stated_config(model: nn.Module) -> AdapterConfig:
    """The config of the model's adapter, whatever it is; an AdapterError where there is none."""
    require_adapter(model)
    config = model.adapter_config
    assert isinstance(config, AdapterConfig)
    return config


def adapter_config(model: nn.Module) -> LoRAConfig:
    """The config of the model's adapter, of any variant around modules, its targets written out."""
    config = stated_config(model)
    variant = variant_of(config)
    if not variant.is_around_modules:
        raise AdapterError(
            f"the model's adapter is {variant.title}; expected one around modules, such as LoRA; "
            "load or add one of those"
        )
    return around_modules(config)
