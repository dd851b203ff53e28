"""A layer's insides computed again in the backward pass: all of them, or the cheap ones.

gradient_checkpointing = true         nothing of a layer is kept but its input
gradient_checkpointing = "selective"  what matrix products and attention gave is kept; norms,
                                      activations, rotations and sums are computed again
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lorax.backend import bound

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recomputed(policy: bool | str, layer: nn.Module, *inputs: Any) -> Tensor:
    """layer(*inputs), recomputed as `policy` (True or "selective") says."""
    kept: dict[str, Any] = {}
    if policy == "selective":
        kept["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(bound(layer), *inputs, use_reentrant=False, **kept)
    return result


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operator in KEPT and torch.is_grad_enabled()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
