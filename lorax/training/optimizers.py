"""The recipe's optimizer: by name, with or without LoRA+, and what it has to tell each step."""

from __future__ import annotations

import dataclasses

from torch import nn

from lorax.errors import UsageError
from lorax.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, lora_plus_groups
from lorax.training.metrics import Line
from lorax.training.recipe import TrainSection

OPTIMIZERS: dict[str, type[AdamW]] = {
    "adamw": AdamW,
    "adamw-8bit": AdamW8bit,
    "paged-adamw": PagedAdamW,
    "paged-adamw-8bit": PagedAdamW8bit,
}


def build_optimizer(model: nn.Module, settings: TrainSection) -> AdamW:
    """The optimizer of [train] over the model's trainable parameters.

    One parameter group; with lora_plus_ratio two, a rate each.

    Raises:
        UsageError: nothing is trainable, or the ratio is not above 0.
    """
    rate, decay, ratio = settings.learning_rate, settings.weight_decay, settings.lora_plus_ratio
    if ratio is None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            raise UsageError("train: the model has no trainable parameter; add_adapter first")
        groups = [{"params": trainable, "lr": rate, "weight_decay": decay}]
    else:
        groups = lora_plus_groups(model, rate, ratio, decay)
    return OPTIMIZERS[settings.optimizer](
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )


def set_rates(optimizer: AdamW, base_rates: list[float], factor: float) -> None:
    """Set each group's rate to its base rate times the schedule's factor."""
    for group, base in zip(optimizer.param_groups, base_rates, strict=True):
        group["lr"] = base * factor


def paging_line(optimizer: AdamW) -> Line:
    """What a paged optimizer moved since the run's start, for metrics.jsonl; nothing for others.

    `managed_bytes`, `prefetched_in_bytes`, `prefetched_out_bytes`, `waited_seconds`. Without a GPU
    nothing is paged, and nothing is written down.
    """
    if not isinstance(optimizer, PagedAdamW | PagedAdamW8bit):
        return {}
    counters = optimizer.paging
    return dataclasses.asdict(counters) if counters.managed_bytes else {}
