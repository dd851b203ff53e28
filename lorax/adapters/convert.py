"""From an adapter that starts inside the weight to a plain LoRA of the same function.

PEFT's file for PiSSA and OLoRA holds A, B and the word "pissa"; who loads it decomposes the base
again and takes the start out of it. Where that does not lead back to the same residual, the file
does not say what was trained. The difference to the base does, as a plain LoRA of rank 2r:

    s (B A - B0 A0) = s [B, B - B0] [A - A0; A0]

(PEFT offers [B, -B0] [A; A0] of a saved start, `path_initial_model_for_weight_conversion`. It is
the same product; ours has no large terms that cancel, which a 16-bit reader would round.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from torch import nn

from lorax.adapters.attached import attach_config, require_adapter
from lorax.adapters.config import LoRAConfig
from lorax.adapters.stated import adapter_config
from lorax.adapters.tables import is_tied
from lorax.errors import AdapterError
from lorax.models.model import Model
from lorax.models.replace import replace_module
from lorax.quant.linear import QuantizedLinear


def start_is_lost(
    model: nn.Module, config: LoRAConfig, bases: Mapping[str, nn.Module]
) -> str | None:
    """Why PEFT's file and the base do not determine the residual, or None where they do.

    bases: the modules that are adapted, or will be, by their paths. The reasons are measured
    against peft 0.21.2; docs/log.md has the figures.
    """
    how = config.init_lora_weights
    if how == "corda":
        return "corda takes its start out of the base, and PEFT's file does not hold it"
    if not config.starts_inside:
        return None
    if config.starts_at_random:
        return f"{how} draws its start at random, and PEFT's file does not hold it"
    quantized = [base for base in bases.values() if isinstance(base, QuantizedLinear)]
    if quantized:
        format = quantized[0].quantized.format
        return f"over a base in {format}, PEFT decomposes or rounds another weight ({how})"
    if how == "olora" and isinstance(model, Model) and model.transposed is not None:
        return "PEFT decomposes GPT-2's weights transposed (olora)"
    if "lm_head" in bases and is_tied(model):
        return f"PEFT takes the start of a tied head out of the embedding too ({how})"
    return None


def plain_form(config: LoRAConfig) -> LoRAConfig:
    """What to write in the place of `config` for the layers' `plain_tensors`: rank 2r, same s.

    Raises:
        AdapterError: LoftQ: a quantized base is no LoRA over the base that it came from.
    """
    if config.init_lora_weights == "loftq":
        raise AdapterError(
            "LoftQ's quantized base is no LoRA over the original; convert_to_lora(model) keeps "
            "the quantized base, then save_adapter, and save_model after unload_adapter"
        )
    # s = alpha / r, or alpha / sqrt(r): what keeps it where r doubles
    grows = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=grows * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: grows * alpha for key, alpha in config.alpha_pattern.items()},
    )


def convert_to_lora(model: nn.Module) -> None:
    """Turn an adapter that starts inside the weight into a plain LoRA, in place.

    PiSSA and OLoRA become LoRA of rank 2r over the same base. LoftQ's quantized weights become the
    base, and the original ones are let go: `unload_adapter` and `save_model` then give LoftQ's
    base. The model computes the same (dropout aside, which then is also the start's), but its
    trainable tensors are new ones: an optimizer must be built afresh.

    Raises:
        AdapterError: there is no adapter, it is merged, or it is a plain one already.
    """
    layers = require_adapter(model)
    config = adapter_config(model)
    if any(layer.merged is not None for layer in layers.values()):
        raise AdapterError("the adapter is merged; unmerge_adapter(model) first")
    if not config.starts_inside and config.init_lora_weights != "loftq":
        raise AdapterError(
            f"the adapter started with {config.init_lora_weights!r} and is a plain LoRA already"
            "; save it as it is"
        )
    if config.starts_inside:
        config = plain_form(config)
    else:
        config = dataclasses.replace(config, init_lora_weights=True, loftq_config={})
        if isinstance(model, Model):
            model.loaded_from = None  # the base is LoftQ's now
    for name, layer in layers.items():
        plain = layer.plain_layer()
        if plain is not None:  # token rows stay as they are
            replace_module(model, name, plain)
    attach_config(model, config)
