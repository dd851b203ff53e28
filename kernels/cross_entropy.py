"""Cross entropy over a frozen head: the loss and dX, a chunk of rows at a time.

    logits  = X W^T                            (rows, V), cuBLAS, into one buffer used again
    loss    = log sum exp(logits) - logits[target]
    logits <- exp(logits - log sum) - onehot   in place: one kernel, a program a row
    dX      = logits W                         cuBLAS, straight into its rows of dX

With V = 128,256 and 2,048 tokens the whole logits would be 525 MB in bf16 and 1.05 GB in float32;
here they are those of a chunk: 512 rows, 131 MB. Fewer would fill a product's tiles badly (261 rows
are 68 % of three tiles of 128) and read the head more often, twice a chunk. The kernel reads each
logit twice and writes it once; the sum runs over the vocabulary online, with the largest logit so
far taken out (Milakov and Gimelshein, arXiv:1805.02867).

A target of -100 (any that is negative) counts nothing: loss 0 and a row of zeros in dX.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorax.kernels.launch import empty, launch

CHUNK_BYTES, CHUNK_ROWS = 2**27, 512  # as many rows as fit, in multiples, and never fewer
COLUMNS = 4096


@triton.jit
def _softmax_gradient_kernel(
    logits, targets, losses, V, stride, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, V, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        part = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(part, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(part - shift), 0)
        largest = larger
    log_sum = tl.where(largest == float("-inf"), 0.0, largest) + tl.log(total)
    counted = target >= 0
    at_target = tl.load(logits + target, mask=counted, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(counted, log_sum - at_target, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before any thread overwrites it
        for begin in range(0, V, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            part = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(part - log_sum) - tl.where(column == target, 1.0, 0.0)
            p = tl.where(counted, p, 0.0).to(logits.dtype.element_ty)
            tl.store(logits + column, p, mask=column < V)


def chunk_rows(V: int, value_bytes: int) -> int:
    """How many rows of V logits are in hand at once: a multiple of CHUNK_ROWS."""
    rows = CHUNK_BYTES // max(1, V * value_bytes)
    return max(CHUNK_ROWS, rows - rows % CHUNK_ROWS)


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The summed cross entropy of hidden W^T against targets, and its gradient for hidden.

    Args:
        hidden: (N, C), any strides.
        weight: (V, C), the frozen head, of hidden's dtype.
        targets: (N,) int64; a negative one counts nothing.
        gradient: whether to compute dX.

    Returns:
        the loss, () float32, and dX (N, C) in hidden's dtype, or None.
    """
    rows_in_all, V = hidden.shape[0], weight.shape[0]
    step = chunk_rows(V, hidden.element_size())
    losses = empty((rows_in_all,), torch.float32, hidden.device)
    dx = empty(tuple(hidden.shape), hidden.dtype, hidden.device) if gradient else None
    buffer = empty((min(step, rows_in_all), V), hidden.dtype, hidden.device)
    for begin in range(0, rows_in_all, step):
        end = min(begin + step, rows_in_all)
        logits = torch.mm(hidden[begin:end], weight.t(), out=buffer[: end - begin])
        softmax_gradient(logits, targets[begin:end], losses[begin:end], gradient)
        if dx is not None:
            torch.mm(logits, weight, out=dx[begin:end])
    return losses.sum(), dx


def softmax_gradient(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    """Write each row's loss into losses (N,); turn logits (N, V) into softmax - onehot, in place.

    logits may have a row stride; without `gradient` they stay as they are.
    """
    rows, V = logits.shape
    launch(
        _softmax_gradient_kernel,
        (rows,),
        logits,
        targets,
        losses,
        V,
        logits.stride(0),
        GRADIENT=gradient,
        COLUMNS=min(COLUMNS, triton.next_power_of_2(max(V, 1))),
        num_warps=8,
        enable_fp_fusion=True,
    )
