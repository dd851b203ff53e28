"""Cross entropy behind a frozen head, a chunk of rows at a time: fewer passes over the logits.

    z = x W^T - max        e = exp(z)        S = sum of e
    loss = log S - z[target]                 dx = (e - S onehot) W / S

lorax/training/loss.py says what is computed. Here exp is taken once, in place, and the division by
S is left to dx, which is C wide and not V. A head that has to be converted for its products is
converted in blocks of the vocabulary, so that no copy of it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorax.models.watched import is_watched
from lorax.training.fast import products
from lorax.training.fast.parts import takes
from lorax.training.loss import CHUNK_LOGITS, head_loss

BLOCK = 2**13  # rows of a head that are converted at a time


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
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for x, t, dx in _chunks(rows, hidden, targets, gradient):
            logits = _logits(x, weight)  # (rows, V), float32
            top = logits.amax(1, keepdim=True)
            reached = logits.gather(1, t[:, None])
            e = logits.sub_(top).exp_()
            total = e.sum(1, keepdim=True)
            loss += (total.log() + top - reached).sum()
            if dx is not None:
                e.scatter_add_(1, t[:, None], -total)
                dx.copy_(_back(e, weight).div_(total))
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None  # a 0-d factor keeps the gradient's dtype


def _chunks(
    rows: int, hidden: Tensor, targets: Tensor, gradient: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        yield hidden[part], targets[part], None if gradient is None else gradient[part]


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32: (M, C), (V, C) -> (M, V)."""
    computing = products.computing_dtype(x.dtype)
    if computing == x.dtype:
        return products.linear(x, weight).float()
    x = x.to(computing)
    logits = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    for start in range(0, weight.shape[0], BLOCK):
        block = products.converted(weight[start : start + BLOCK], computing)
        logits[:, start : start + BLOCK] = products.linear(x, block)
    return logits


def _back(e: Tensor, weight: Tensor) -> Tensor:
    """e W in float32: (M, V) float32, (V, C) -> (M, C)."""
    computing = products.computing_dtype(weight.dtype)
    if computing == weight.dtype:
        return products.times(e.to(computing), weight).float()
    dx = e.new_zeros(e.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], BLOCK):
        block = products.converted(weight[start : start + BLOCK], computing)
        dx += products.times(e[:, start : start + BLOCK], block)
    return dx
