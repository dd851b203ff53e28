"""SwiGLU with its three Linears, forward and backward by hand.

    g, u = gate(x), up(x)        a = silu(g) * u        y = down(a)

autograd keeps x, g, silu(g), u and a; here a and silu(g) are computed again from g and u, which
costs one element-wise pass and saves two tensors of the inner width in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax.training.fast import products
from lorax.training.fast.parts import Part
from lorax.training.fast.projections import (
    drawn,
    input_backward,
    part_forward,
    path_backward,
)

Parts = tuple[Part, Part, Part]  # gate, up, down


def swiglu_mlp(x: Tensor, gate: Part, up: Part, down: Part) -> Tensor:
    """down(silu(gate(x)) * up(x)): (..., C) -> (..., C)."""
    parts = gate, up, down
    factors = [factor for part in parts for factor in (part.A, part.B)]
    y: Tensor = _SwiGLU.apply(x.reshape(-1, x.shape[-1]), parts, *factors)
    return y.view(x.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts, *factors: Tensor | None) -> Tensor:
        gate, up, down = parts
        xc = x.to(products.computing_dtype(x.dtype))
        noises = [drawn(gate, x), drawn(up, x)]
        g, h_gate = part_forward(gate, xc, x.dtype, noises[0])
        u, h_up = part_forward(up, xc, x.dtype, noises[1])
        g, u = g.to(x.dtype), u.to(x.dtype)
        a = F.silu(g.to(_wide(x))).mul_(u).to(x.dtype)
        noises.append(drawn(down, a))
        y, h_down = part_forward(down, a.to(xc.dtype), x.dtype, noises[2])
        ctx.parts = parts
        ctx.save_for_backward(x, g, u, *factors, *noises, h_gate, h_up, h_down)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, g, u, *saved = ctx.saved_tensors
        factors, noises, hidden = saved[:6], saved[6:9], saved[9:]
        gate, up, down = ctx.parts
        computing = products.computing_dtype(x.dtype)
        dy = gradients[0].to(computing)
        g = g.to(_wide(x))
        s = F.silu(g)
        a = (s * u).to(computing)
        dh, *of_down = path_backward(down, dy, a, hidden[2], noises[2], factors[4:])
        da = input_backward(down, dy, dh, noises[2], factors[4], x.dtype, None).to(g.dtype)
        du = s.mul_(da).to(computing)
        dg = torch.ops.aten.silu_backward(da.mul_(u), g).to(computing)
        xc = x.to(computing)
        dx, found = None, []
        for i, (part, d) in enumerate(((gate, dg), (up, du))):
            pair = factors[2 * i], factors[2 * i + 1]
            dh, *own = path_backward(part, d, xc, hidden[i], noises[i], pair)
            found += own
            if ctx.needs_input_grad[0]:
                dx = input_backward(part, d, dh, noises[i], pair[0], x.dtype, dx)
        return None if dx is None else dx.to(x.dtype), None, *found, *of_down


def _wide(x: Tensor) -> torch.dtype:
    """Of element-wise work on x: float32, or float64; rounded once behind it."""
    return torch.promote_types(x.dtype, torch.float32)
