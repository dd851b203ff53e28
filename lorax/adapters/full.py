"""Full fine-tuning: every weight is trained, and there is no adapter. No torch until it starts."""

from __future__ import annotations

from typing import Any

from lorax.adapters.variants import Variant, register_variant
from lorax.errors import RecipeError


def train_everything(model: Any) -> None:
    """Let every parameter require gradients; the model is then that of no file.

    Raises:
        RecipeError: a weight is quantized.
    """
    from lorax.quant.linear import QuantizedLinear

    quantized = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    if quantized:
        raise RecipeError(
            f"model.path: its checkpoint is quantized ({quantized[0]} and {len(quantized) - 1} "
            "more), and quantized weights are frozen; adapter.method = 'full' needs plain ones"
            "; give a checkpoint that is not quantized, or another adapter.method"
        )
    model.loaded_from = None  # its weights will be those of no file
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _refuses(recipe: Any) -> str | None:
    """Full fine-tuning moves the weights themselves, by less than 16 bits can hold."""
    if recipe.model.quantization is not None:
        return (
            f"model.quantization = {recipe.model.quantization!r}: a quantized weight is "
            "frozen; adapter.method = 'full' trains every weight, so leave it out"
        )
    if recipe.model.dtype == "bfloat16":
        return (
            "model.dtype = 'bfloat16': its 8 bits lose a step that is 0.4 % of a "
            "weight or less; adapter.method = 'full' trains in float32 ('auto' means that)"
        )
    if recipe.train.parallel == "fsdp":
        return (
            "train.parallel = 'fsdp' shards the frozen base, and adapter.method = 'full' trains "
            "every weight; use 'ddp', or train an adapter"
        )
    return None


register_variant(
    Variant(
        "full",
        None,
        title="Full fine-tuning",
        summary=lambda config: "every weight is trained, in float32",
        refuses=_refuses,
        has_b=False,
        trains_base=True,
    )
)
