"""Linears with a common input, forward and backward by hand.

    y_i  = x W_i^T + b_i + s_i h_i B_i^T        h_i = d_i(x) A_i^T                 (M, out_i)
    dB_i = s_i dy_i^T h_i                                                          (out_i, r)
    dh_i = s_i dy_i B_i                                                            (M, r)
    dA_i = dh_i^T d_i(x)                                                           (r, in)
    dx   = sum of dy_i W_i + d_i(dh_i A_i)                                         (M, in)

d_i is dropout. autograd would keep x once for each product, make a tensor of each term of dx, and
add them up one by one; here x is kept once and each product adds to the one before. The frozen W_i
has no gradient. Quantized weights are decoded twice and not kept, as in lorax/quant/linear.py.

A and B are float32; the products are computed in `products.computing_dtype` of x's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorax.training.fast import products
from lorax.training.fast.parts import Part

Factors = tuple[Tensor | None, Tensor | None]  # A (r, in) and B (out, r)


def project(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Each part's output, (..., out): of one input (..., in)."""
    factors = [factor for part in parts for factor in (part.A, part.B)]
    rows: tuple[Tensor, ...] = _Projections.apply(x.reshape(-1, x.shape[-1]), parts, *factors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in rows)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: Sequence[Part], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        computing = products.computing_dtype(x.dtype)
        noises = [drawn(part, x) for part in parts]
        xc = x.to(computing)
        found = [
            part_forward(part, xc, x.dtype, noise)
            for part, noise in zip(parts, noises, strict=True)
        ]
        ctx.parts = parts
        hidden = [h for _, h in found]
        ctx.save_for_backward(x, *factors, *noises, *hidden)
        return tuple(y.to(x.dtype) for y, _ in found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        n = len(ctx.parts)
        x, *saved = ctx.saved_tensors
        factors, noises, hidden = saved[: 2 * n], saved[2 * n : 3 * n], saved[3 * n :]
        computing = products.computing_dtype(x.dtype)
        xc = x.to(computing)
        dx, found = None, []
        for i, (part, dy) in enumerate(zip(ctx.parts, gradients, strict=True)):
            pair = factors[2 * i], factors[2 * i + 1]
            dy = dy.to(computing)
            dh, *own = path_backward(part, dy, xc, hidden[i], noises[i], pair)
            found += own
            if ctx.needs_input_grad[0]:
                dx = input_backward(part, dy, dh, noises[i], pair[0], x.dtype, dx)
        return None if dx is None else dx.to(x.dtype), None, *found


def drawn(part: Part, x: Tensor) -> Tensor | None:
    """Dropout's zeros and ones for x, (M, in) bool, with the numbers that F.dropout draws."""
    if not part.dropout:
        return None
    return torch.empty_like(x).bernoulli_(1 - part.dropout).bool()


def dropped(x: Tensor, noise: Tensor | None, part: Part) -> Tensor:
    """x (M, in) as dropout leaves it: zeroed, and the rest scaled up."""
    return x if noise is None else x * noise.to(x.dtype).div_(1 - part.dropout)


def part_forward(
    part: Part, x: Tensor, dtype: torch.dtype, noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y (M, out), and h (M, r) of the path, both in x's dtype; x (M, in) has the computing one.

    dtype: in which the model's values are held.
    """
    y = products.linear(x, part.weight(dtype, x.dtype))
    if part.bias is not None:
        y += part.bias
    if part.A is None or part.B is None:
        return y, None
    h = dropped(x, noise, part) @ part.A.to(x.dtype).t()
    return y.addmm_(h, part.B.to(x.dtype).t(), alpha=part.scaling), h


def path_backward(
    part: Part, dy: Tensor, x: Tensor, h: Tensor | None, noise: Tensor | None, pair: Factors
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh (M, r), dA (r, in) and dB (out, r); None without a path."""
    A, B = pair
    if h is None or A is None or B is None:
        return None, None, None
    dB = (dy.t() @ h).mul_(part.scaling)
    dh = (dy @ B.to(dy.dtype)).mul_(part.scaling)
    dA = dh.t() @ dropped(x, noise, part)
    return dh, dA.to(A.dtype), dB.to(B.dtype)


def input_backward(
    part: Part,
    dy: Tensor,
    dh: Tensor | None,
    noise: Tensor | None,
    A: Tensor | None,
    dtype: torch.dtype,
    dx: Tensor | None,
) -> Tensor:
    """dx (M, in) and this part's share of it, in place."""
    share = products.times(dy, part.weight(dtype, dy.dtype))
    dx = share if dx is None else dx.add_(share)
    if dh is None or A is None:
        return dx
    if noise is None:
        return dx.addmm_(dh, A.to(dy.dtype))
    return dx.add_(dropped(dh @ A.to(dy.dtype), noise, part))
