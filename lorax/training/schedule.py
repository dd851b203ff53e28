"""The learning rate of each optimizer step.

From the end of the warm-up on, transformers' schedulers of these names give the same. Its warm-up
begins at zero, so that the first step changes nothing, and a run of one step is no run; here the
line begins one step earlier.
"""

import math

from lorax.training.recipe import Recipe


def total_steps(recipe: Recipe, rows: int) -> int:
    """How many optimizer steps the recipe takes over this many rows."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    return math.ceil(recipe.train.epochs * math.ceil(rows / recipe.train.batch_size))


def warmup_steps(total: int, ratio: float) -> int:
    """How many steps the rate climbs."""
    return math.ceil(total * ratio)


def rate_factor(kind: str, step: int, total: int, warmup: int) -> float:
    """The share of the peak rate at `step` (from 0): a line up, then constant, line or cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
