"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns faster than A.

B starts at zero and is (out, r); A starts random and is (r, in). With one rate for both, the wider
the model, the less the features move that B should learn. LoRA+ gives B `ratio` times A's rate
(the paper finds about 16; 1 is plain AdamW, bit for bit):

    lora_A, lora_embedding_A, everything else of two dimensions      learning_rate
    lora_B, lora_embedding_B, and whatever has one dimension         learning_rate * ratio
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorax.errors import UsageError

FAST_NAMES = ("lora_B", "lora_embedding_B")


def lora_plus_groups(
    model: nn.Module, learning_rate: float, ratio: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups of the model's trainable parameters, for any optimizer.

    Args:
        model: with an adapter; what does not require a gradient is left out.
        learning_rate: for A.
        ratio: B's rate over A's, above 0.
        weight_decay: for both groups, decoupled: each step shrinks by its own rate times this.

    Returns:
        One group for each rate, in the model's order: {"params", "lr", "weight_decay"}. A group
        without parameters is left out.

    Raises:
        UsageError: nothing is trainable, or the ratio is not above 0.
    """
    if not ratio > 0:
        raise UsageError(f"LoRA+: ratio = {ratio}; expected a number above 0 (1 is plain AdamW)")
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fast if _is_fast(name, parameter) else slow).append(parameter)
    if not slow and not fast:
        raise UsageError("LoRA+: the model has no trainable parameter; add_adapter first")
    groups = [(slow, learning_rate), (fast, learning_rate * ratio)]
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay}
        for parameters, rate in groups
        if parameters
    ]


def _is_fast(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 1 or any(part in FAST_NAMES for part in name.split("."))
