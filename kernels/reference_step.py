"""The slow twins of the training step's kernels (step.py), in plain PyTorch, for any device.

Written for reading and for tests: what each kernel computes, with the same signature. Sums of
products are float32 here as there; what a kernel rounds, its twin rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax.kernels import reference
from lorax.kernels.drop import Drop
from lorax.kernels.weight import PackedWeight

MASK = 2**32 - 1
MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def norm(
    x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of norm.norm."""
    total = x if delta is None else x + delta
    scale = torch.rsqrt(total.float().square().mean(1) + eps)
    y = weight * (total.float() * scale[:, None]).to(x.dtype)
    return total, y if out is None else out.copy_(y), scale


def norm_backward(
    dy: Tensor, total: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None = None
) -> Tensor:
    """Twin of norm.norm_backward."""
    n = total.float() * scale[:, None]
    dn = dy.float() * weight.float()
    dx = (dn - n * (dn * n).mean(1, keepdim=True)) * scale[:, None]
    return (dx if beside is None else dx + beside.float()).to(total.dtype)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, heads: int, back: bool = False) -> Tensor:
    """Twin of rope.rope_."""
    T, D = cos.shape
    turning = x[:, : heads * D].unflatten(1, (heads, D)).unflatten(0, (-1, T)).float()
    c, s = cos.float()[:, None], (-sin if back else sin).float()[:, None]  # (T, 1, D)
    first, second = turning.chunk(2, -1)
    turned = turning * c + torch.cat([-second, first], -1) * s
    x[:, : heads * D] = turned.to(x.dtype).flatten(0, 1).flatten(1)
    return x


def swiglu(both: Tensor, out: Tensor | None = None) -> Tensor:
    """Twin of swiglu.swiglu."""
    g, u = both.float().chunk(2, 1)
    a = (F.silu(g) * u).to(both.dtype)
    return a if out is None else out.copy_(a)


def swiglu_backward(da: Tensor, both: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Twin of swiglu.swiglu_backward."""
    (g, u), d = both.float().chunk(2, 1), da.float()
    s = torch.sigmoid(g)
    a = (g * s * u).to(both.dtype)
    dboth = torch.cat([d * u * s * (1 + g * (1 - s)), d * g * s], 1).to(both.dtype)
    return dboth if out is None else out.copy_(dboth), a


def philox(seed: Tensor, counter: Tensor, site: int, rounds: int = 10) -> list[Tensor]:
    """Philox 4x32: four words (0 ... 2^32 - 1, int64) for each counter (int64) and site."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    c0, c1, c2, c3 = counter & MASK, torch.full_like(counter, site), counter * 0, counter * 0
    A, B = MULTIPLIERS
    for _ in range(rounds):
        high_b, low_b = _product(B, c2)
        high_a, low_a = _product(A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return [c0, c1, c2, c3]


def _product(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of constant * x, both below 2^32, within int64."""
    above, below = constant * (x >> 16), constant * (x & 0xFFFF)
    middle = above + (below >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (below & 0xFFFF)


def kept(drop: Drop, M: int, C: int) -> Tensor:
    """Which values of (M, C) stay: bool."""
    groups = -(-C // 4)
    counter = torch.arange(M * groups, device=drop.seed.device)
    words = torch.stack(philox(drop.seed, counter, drop.site), 1).view(M, 4 * groups)[:, :C]
    return torch.where(words >= 2**31, words - 2**32, words) >= drop.threshold


def _dropped(x: Tensor, drop: Drop | None) -> Tensor:
    """x (M, C) with zeros; the scale comes behind the product."""
    return x if drop is None else torch.where(kept(drop, *x.shape), x, 0)


def _scaled(scaling: float, drop: Drop | None) -> float:
    return scaling if drop is None else scaling * drop.scale


def add_dropped(dx: Tensor, dh: Tensor, A: Tensor, drop: Drop) -> Tensor:
    """Twin of dropout.add_dropped."""
    path = (dh.float() @ A.to(dh.dtype).float()) * drop.scale
    return dx.copy_(dx.float() + torch.where(kept(drop, *dx.shape), path, 0))


def down(
    x: Tensor,
    A: Tensor,
    scaling: float = 1.0,
    out: Tensor | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """Twin of lora.down."""
    rows = x.reshape(-1, x.shape[-1])
    h = reference.down(_dropped(rows, drop), A, _scaled(scaling, drop))
    return h.view(*x.shape[:-1], A.shape[0]) if out is None else out.copy_(h)


def cross(left: Tensor, right: Tensor, scaling: float = 1.0, drop: Drop | None = None) -> Tensor:
    """Twin of lora.cross."""
    right = right.reshape(-1, right.shape[-1])
    return reference.cross(left, _dropped(right, drop), _scaled(scaling, drop))


Factor = tuple[Tensor, float]


def decode_columns(
    weights: Sequence[PackedWeight], factors: Sequence[Factor | None], out: Tensor
) -> Tensor:
    """Twin of extended.decode_columns."""
    K = weights[0].shape[1]
    paths = [
        out.new_zeros(w.shape[0], 0) if f is None else (f[0].float() * f[1]).to(out.dtype)
        for w, f in zip(weights, factors, strict=True)
    ]
    diagonal = torch.block_diag(*paths)
    out[:, :K] = torch.cat([_dense(w, out.dtype) for w in weights])
    out[:, K:] = F.pad(diagonal, (0, out.shape[1] - K - diagonal.shape[1]))
    return out


def decode_rows(
    weights: Sequence[PackedWeight], factors: Sequence[Factor | None], out: Tensor
) -> Tensor:
    """Twin of extended.decode_rows."""
    paths = [(f[0].float() * f[1]).to(out.dtype) for f in factors if f is not None]
    below = torch.cat([*(_dense(w, out.dtype) for w in weights), *paths])
    return out.copy_(F.pad(below, (0, 0, 0, out.shape[0] - below.shape[0])))


def products(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    paths: Sequence[tuple[Tensor, Tensor, float] | None],
) -> Tensor:
    """Twin of narrow.products."""
    found = []
    for weight, bias, path in zip(weights, biases, paths, strict=True):
        low = None if path is None else (reference.down(x, path[0]), path[1], path[2])
        found.append(reference.matmul(x, weight, bias, low))
    return torch.cat(found, 1)


def _dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    return reference.dequantize(weight, out)
