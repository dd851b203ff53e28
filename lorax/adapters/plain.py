"""Plain LoRA, rsLoRA and `lora_bias` as variants: what each says about itself (variants.py)."""

from __future__ import annotations

from typing import Any

from lorax.adapters.config import LOST, SETTLED, LoRAConfig
from lorax.adapters.variants import Variant, register_variant


def _size(config: LoRAConfig) -> str:
    return f"of rank {config.r}, lora_alpha {config.lora_alpha:g}"


def _refuses(recipe: Any) -> str | None:
    """A word of loaded adapters is none to start with."""
    how = recipe.adapter.init_lora_weights
    if how not in (*SETTLED, *LOST):
        return None
    return (
        f"adapter.init_lora_weights = {how!r}: lorax loads such an adapter, and starts none; take "
        "true, 'gaussian', 'pissa', 'olora' or 'loftq'"
    )


_LINEAR, _TABLE = "lorax.adapters.lora:LoRALinear", "lorax.adapters.embedding:LoRAEmbedding"
register_variant(
    Variant(
        "lora",
        LoRAConfig,
        title="LoRA",
        in_peft=True,
        summary=lambda config: f"LoRA {_size(config)}",
        layer=_LINEAR,
        embedding=_TABLE,
        refuses=_refuses,
        tags=("lora",),
    )
)
register_variant(
    Variant(
        "rslora",
        LoRAConfig,
        title="rsLoRA",
        in_peft=True,
        summary=lambda config: f"rsLoRA {_size(config)} (scaled by alpha / sqrt(r))",
        layer=_LINEAR,
        embedding=_TABLE,
        chosen=lambda config: config.use_rslora,
        tags=("lora",),
    )
)
register_variant(
    Variant(
        "lora_bias",
        LoRAConfig,
        title="lora_bias",
        in_peft=True,
        summary=lambda config: f"LoRA {_size(config)}, B with a bias",
        layer=_LINEAR,
        chosen=lambda config: config.lora_bias,
        tags=("lora",),
        no_matrix="has lora_bias = True: it is no low-rank matrix alone, and there is no adding or "
        "comparing it",
    )
)
