"""Optimizers: AdamW in 32 and in 8 bits, each also with its states in paged memory, and LoRA+."""

from lorax.optim.adamw import AdamW
from lorax.optim.adamw8bit import AdamW8bit
from lorax.optim.lora_plus import lora_plus_groups
from lorax.optim.paged import PagedAdamW, PagedAdamW8bit

__all__ = ["AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "lora_plus_groups"]
