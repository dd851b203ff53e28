"""The learning rate of each optimizer step, as transformers' schedulers of these names give it."""

import math


def warmup_steps(total: int, ratio: float) -> int:
    """How many steps the rate climbs."""
    return math.ceil(total * ratio)


def rate_factor(kind: str, step: int, total: int, warmup: int) -> float:
    """The share of the peak rate at `step` (from 0): up a line, then constant, a line or a cosine.

    The first step of a warm-up has rate 0, as in transformers.
    """
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
