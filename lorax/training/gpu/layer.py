"""A Llama's layer as one autograd Function, which keeps what `gradient_checkpointing` says.

    false        all that a product or attention made: nothing but a = silu(g) u is made again
    "selective"  the same without the norms' outputs and copies: one element-wise pass makes them
    true         the layer's input x alone; all is computed again but down_proj's base product,
                 whose output nobody needs

Bytes kept of a token and layer of Llama-3-8B in bfloat16, r = 16: 134,000, 101,000 and 8,200.

Attention and MLP could be two Functions. They are one because the MLP's backward needs t = x +
delta before attention's backward runs: apart, either both x and t are kept or attention is
computed again twice. The gradients that pass beside a half are added by its norm's kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorax.training.gpu.halves import MLP, Attention


def run_layer(x: Tensor, attention: Attention, mlp: MLP, keep: bool | str) -> Tensor:
    """(B, T, C) -> (B, T, C), with gradients for x and every factor.

    keep: what `gradient_checkpointing` is: False, True or "selective".
    """
    groups = attention.qkv, attention.o, mlp.gate_up, mlp.down
    factors = [f for group in groups for part in group.parts for f in (part.A, part.B)]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = _Layer.apply(rows, attention, mlp, keep, *factors)
    return y.view(x.shape)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Attention,
        mlp: MLP,
        keep: bool | str,
        *factors: Tensor | None,
    ) -> Tensor:
        delta, of_attention = attention.forward(x)
        y, of_mlp = mlp.forward(x, delta)
        ctx.halves, ctx.kept = (attention, mlp), None
        if keep is False:
            ctx.kept = of_attention, of_mlp
        elif keep == "selective":
            ctx.kept = of_attention.slim(), of_mlp.slim()
        ctx.save_for_backward(x, *factors)  # the factors: a step between is noticed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        attention, mlp = ctx.halves
        x, dy = ctx.saved_tensors[0], gradients[0].contiguous()
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            delta, of_attention = attention.forward(x)
            kept = of_attention, mlp.forward(x, delta, whole=False)[1]
            del delta
        dt, of_mlp = mlp.backward(dy, kept[1])
        kept = kept[0]
        dx, found = attention.backward(x, dt, dt, kept, ctx.needs_input_grad[0])
        return dx, None, None, None, *found, *of_mlp
