"""Clipping by the norm of all gradients, without waiting for it.

    norm     of all gradients together, float32
    factor   min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it

On CUDA the norm is computed on the device and the factor stays there: AdamW's kernel multiplies by
it as it reads the gradients, so nothing is read back and no gradient is written again. The numbers
are those of `clip_grad_norm_`, which everything else takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lorax.optim.adamw import AdamW
from lorax.optim.fused import KERNEL_DTYPES


def clip(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    most: float,
    now: Callable[[list[nn.Parameter], float], Tensor],
) -> Tensor:
    """The norm before clipping to `most`: in the optimizer's next step where it can, else `now`."""
    if isinstance(optimizer, AdamW) and clips_later(optimizer, parameters):
        return clip_later(optimizer, parameters, most)
    return now(parameters, most)


def clips_later(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the next step multiplies these parameters' gradients itself."""
    gradients = _gradients(parameters)
    on_device = all(g.is_cuda and g.dtype in KERNEL_DTYPES for g in gradients)
    return bool(gradients) and on_device and isinstance(optimizer, AdamW)


def clip_later(optimizer: AdamW, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Have the next step clip to the norm `most` (0: do not); the norm before it, ()."""
    norm = nn.utils.get_total_norm(_gradients(parameters))
    factor = (most or math.inf) / (norm.float() + 1e-6)
    # An infinite norm makes it 0, and 0 times infinity no number: the step is left out for either.
    optimizer.factor = torch.where(norm.isfinite(), factor.clamp(max=1.0), math.nan)
    return norm


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
