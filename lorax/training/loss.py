"""Cross entropy over a vocabulary, without keeping the logits.

N trained tokens and a vocabulary of V give logits (N, V): for 4 x 512 tokens and V = 128,256 that
is 1 GB in float32, and as much again for their gradient. Two savings change no number:

- Only hidden states that predict a trained token go through the head, not prompts and padding.
- A frozen head needs no gradient of its own, and that of the hidden states is known together with
  the loss: dX = (softmax(X W^T) - onehot) W. So both are computed for a chunk of rows at a time and
  the chunk's logits are dropped. On CUDA a Triton kernel computes the chunk's softmax.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.backend import uses_triton
from lorax.models import Model
from lorax.models.attention import Context, soft_cap

CHUNK_LOGITS = 2**23  # 32 MiB in float32


def summed_loss(
    model: Model, input_ids: Tensor, labels: Tensor, context: Context | None = None
) -> Tensor:
    """Sum of -log p over the trained tokens: () float32.

    input_ids, labels: (B, T) int64. labels[b, t] is the token at position t, or -100 for a token
    that is not trained; it is predicted from positions 0 ... t - 1.
    context: Documents that are packed in (1, T); the label of each one's first token is -100.
    """
    hidden = model.hidden_states(input_ids, context)[:, :-1]  # (B, T - 1, C)
    places = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # one wait for a GPU, not two
    hidden, targets = hidden[places], labels[:, 1:][places]  # (N, C), (N,)
    if type(model).logits is not Model.logits:  # a family whose head does more
        return F.cross_entropy(model.logits(hidden).float(), targets, reduction="sum")
    loss = getattr(model, "head_loss", head_loss)  # training/fast sets one of its own
    return loss(hidden, model.lm_head, targets, model.logit_cap)


def head_loss(hidden: Tensor, head: nn.Module, targets: Tensor, cap: float | None = None) -> Tensor:
    """Sum of cross entropies of hidden (N, C) behind `head`, against targets (N,).

    cap: c of c * tanh(logits / c), where the model has one behind its head.
    """
    if isinstance(head, nn.Linear) and not head.weight.requires_grad and head.bias is None:
        if uses_triton(hidden) and cap is None:
            from lorax.training.fused_loss import cross_entropy_frozen_head

            return cross_entropy_frozen_head(hidden, head.weight, targets)
        return _FrozenHeadLoss.apply(hidden, head.weight, targets, cap)
    return F.cross_entropy(soft_cap(head(hidden), cap).float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = soft_cap(F.linear(hidden[part], weight), cap).float()  # (rows, V)
            slope = None if cap is None or gradient is None else 1 - (logits / cap).square()
            log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
            places = targets[part, None]
            loss += (log_sum - logits.gather(1, places)).sum()
            if gradient is not None:
                p = logits.sub_(log_sum).exp_()
                p.scatter_add_(1, places, torch.full_like(log_sum, -1.0))
                p = p if slope is None else p.mul_(slope)  # through c * tanh(x / c)
                gradient[part] = p.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None  # a 0-d factor keeps the gradient's dtype
