"""Cross entropy behind a frozen head, a block of the vocabulary at a time: no logits in memory.

    z = x W_b^T                     of block b: (rows, BLOCK), which stays in the caches
    m' = max(m, z)                  the largest so far; what stands there is scaled by exp(m - m')
    S += sum of exp(z - m')         A += exp(z - m') W_b
    loss = log S + m - z[target]    dx = A / S - W[target]

lorax/training/loss.py says what is computed. The running maximum is that of online softmax
(Milakov & Gimelshein 2018, arXiv:1805.02867). 508 tokens of SmolLM2 take two cores 0.38 s, and with
whole rows of logits, 32 MB of them at a time, 0.51 s. A head that has to be converted for its
products is converted block by block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorax.models.watched import is_watched
from lorax.training.fast import products
from lorax.training.fast.parts import takes
from lorax.training.loss import head_loss

ROWS = 512  # tokens together
BLOCK = 2**11  # rows of the head: 4 MB of logits; measured best of 2**10 to 2**13


def fast_head_loss(
    hidden: Tensor, head: nn.Module, targets: Tensor, cap: float | None = None
) -> Tensor:
    """`head_loss` of hidden (N, C) and targets (N,), by hand where the head allows it."""
    known = type(head) is nn.Linear and head.bias is None and not is_watched(head)
    if not known or head.weight.requires_grad or cap is not None or not takes(hidden):
        return head_loss(hidden, head, targets, cap)
    weight = head.weight
    assert isinstance(weight, Tensor)
    loss: Tensor = _HeadLoss.apply(hidden, weight, targets)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            loss += _rows_loss(
                hidden[rows], weight, targets[rows], None if gradient is None else gradient[rows]
            )
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None  # a 0-d factor keeps the gradient's dtype


def _rows_loss(x: Tensor, weight: Tensor, targets: Tensor, dx: Tensor | None) -> Tensor:
    """The summed loss of x (N, C) and targets (N,); its gradient goes into dx (N, C)."""
    computing = products.computing_dtype(x.dtype)
    xc, N = x.to(computing), x.shape[0]
    top = torch.full((N, 1), -torch.inf)
    total, reached = torch.zeros(N, 1), torch.empty(N, 1)
    summed = torch.zeros(x.shape)
    for start in range(0, weight.shape[0], BLOCK):
        block = products.converted(weight[start : start + BLOCK], computing)
        logits = products.linear(xc, block).float()
        mine = ((targets >= start) & (targets < start + len(block))).nonzero()[:, 0]
        reached[mine, 0] = logits[mine, targets[mine] - start]
        larger = torch.maximum(top, logits.amax(1, keepdim=True))
        shrink = (top - larger).exp_()
        e, top = logits.sub_(larger).exp_(), larger
        total.mul_(shrink).add_(e.sum(1, keepdim=True))
        if dx is not None:
            summed.mul_(shrink).add_(products.times(e.to(computing), block))
    if dx is not None:
        dx.copy_(summed.div_(total).sub_(weight[targets]))
    return (total.log_().add_(top) - reached).sum()
