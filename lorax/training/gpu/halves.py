"""The two halves of a Llama's layer, forward and backward, over kernels.

    attention   n = norm(x)          q, k, v = qkv(n)      o = attention(rope(q), rope(k), v)
                delta = o_proj(o)
    MLP         t = x + delta        n = norm(t)           a = silu(gate(n)) * up(n)
                y = t + down(a)

Attention itself is torch's (flash or cuDNN), with autograd inside: `attended` is the end of a small
graph that begins at q, k and v. So windows, packed documents and Qwen 3's norms of q and k are what
the plain layer has, and no second attention is written here.

What a half keeps for its backward is a dataclass. `slim` drops from it what one element-wise pass
makes again: n, and the copy of o that stands beside its path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorax.models.attention import Context, merge_heads
from lorax.models.llama import LlamaAttention, RMSNorm, Rope
from lorax.models.rope import rotate
from lorax.training.gpu.group import Gradients, Group


@dataclass(frozen=True)
class AttentionKept:
    """scale: of the norm. xh: [ n | h ]. heads: q, k, v (B, heads, T, D), and attended (B, T, HD)
    of them. oh: [ o | h ] of o_proj. hidden: each part's h of qkv, and of o_proj."""

    scale: Tensor
    heads: list[Tensor]
    attended: Tensor
    hidden: list[Tensor]
    o_hidden: list[Tensor]
    xh: Tensor | None = None
    oh: Tensor | None = None

    def slim(self) -> AttentionKept:
        """Without what `Attention.backward` makes again."""
        copies = [h.clone() for h in self.hidden], [h.clone() for h in self.o_hidden]
        return replace(self, xh=None, oh=None, hidden=copies[0], o_hidden=copies[1])


@dataclass(frozen=True)
class Attention:
    """Of one call: x is (B * T, C)."""

    module: LlamaAttention
    norm: RMSNorm
    qkv: Group
    o: Group
    rope: Rope
    context: Context
    batch: int

    def forward(self, x: Tensor) -> tuple[Tensor, AttentionKept]:
        """delta (M, C), and what the backward takes."""
        xh, scale = self._normed(x)
        self.qkv.add_hidden(xh)
        heads, attended = self._attend(self.qkv.forward(xh))
        oh = self._beside_path(attended)
        self.o.add_hidden(oh)
        delta = self.o.forward(oh)
        hidden = self.qkv.paths(xh), self.o.paths(oh)
        return delta, AttentionKept(scale, heads, attended, *hidden, xh, oh)

    def backward(
        self, x: Tensor, ddelta: Tensor, beside: Tensor, kept: AttentionKept, wants_dx: bool
    ) -> tuple[Tensor | None, Gradients]:
        """dx (M, C), `beside` (M, C) in it; and the factors' gradients: q, k, v, o."""
        M, k = x.shape[0], self.qkv.kernels
        dyh = self.o.gradient(M, x)
        dyh[:, : x.shape[1]].copy_(ddelta)
        do = self.o.backward(dyh)
        assert do is not None
        o = kept.oh if kept.oh is not None else self._beside_path(kept.attended)
        of_o = self.o.factor_gradients(dyh, o[:, : do.shape[1]], kept.o_hidden)
        del o, dyh
        dyh = self._heads_back(do.view(kept.attended.shape), kept)
        dn = self.qkv.backward(dyh, wants_dx)
        xh = kept.xh if kept.xh is not None else self._normed(x)[0]
        of_qkv = self.qkv.factor_gradients(dyh, xh[:, : x.shape[1]], kept.hidden)
        if dn is None:
            return None, [*of_qkv, *of_o]
        dx = k.norm_backward(dn, x, self.norm.weight, kept.scale, beside)
        return dx, [*of_qkv, *of_o]

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        xh = self.qkv.input(x.shape[0], x)
        n = xh[:, : x.shape[1]]
        return xh, self.qkv.kernels.norm(x, self.norm.weight, self.norm.eps, out=n)[2]

    def _beside_path(self, attended: Tensor) -> Tensor:
        """[ o | room for h ]."""
        o = attended.detach().flatten(0, 1)
        oh = self.o.input(o.shape[0], o)
        oh[:, : o.shape[1]].copy_(o)
        return oh

    @property
    def _turns_in_place(self) -> bool:
        """Whether the kernel turns q and k; else the plain rotation does, inside autograd."""
        return not self.module.has_norms and self.rope[0].shape[-1] == self.module.head_dim

    def _attend(self, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """q, k, v of y (M, (H + 2 K) D), and what attention makes of them: (B, T, H D)."""
        D, module = self.module.head_dim, self.module
        widths = [n // D for n in self.qkv.widths]
        if self._turns_in_place:
            self.qkv.kernels.rope_(y, *self.rope, widths[0] + widths[1])
        parts = y.view(self.batch, -1, sum(widths), D).split(widths, 2)
        heads = [part.transpose(1, 2).requires_grad_() for part in parts]  # (B, heads, T, D)
        how = {"window": module.window, "scale": module.scale, "cap": module.cap}
        with torch.enable_grad():
            query, key, value = heads
            if module.has_norms:
                query, key = module.q_norm(query), module.k_norm(key)
            if not self._turns_in_place:
                query, key = rotate(query, *self.rope), rotate(key, *self.rope)
            attended = merge_heads(self.context.attend(module.index, query, key, value, **how))
        return heads, attended

    def _heads_back(self, do: Tensor, kept: AttentionKept) -> Tensor:
        """[ dy | room for dh ] of qkv."""
        found = torch.autograd.grad(kept.attended, kept.heads, do)
        rows = [part.transpose(1, 2).flatten(2).flatten(0, 1) for part in found]  # (M, heads * D)
        N = sum(self.qkv.widths)
        dyh = self.qkv.gradient(rows[0].shape[0], rows[0])
        torch.cat(rows, 1, out=dyh[:, :N])
        if self._turns_in_place:
            turning = sum(self.qkv.widths[:2]) // self.module.head_dim
            self.qkv.kernels.rope_(dyh, *self.rope, turning, back=True)
        return dyh


@dataclass(frozen=True)
class MLPKept:
    """total: t (M, C). scale: of its norm. both: [ gate | up ]. hidden: each part's h of gate and
    up, and of down. xh: [ n | h ]."""

    total: Tensor
    scale: Tensor
    both: Tensor
    hidden: list[Tensor]
    down_hidden: list[Tensor]
    xh: Tensor | None = None

    def slim(self) -> MLPKept:
        """Without what `MLP.backward` makes again."""
        return replace(self, xh=None, hidden=[h.clone() for h in self.hidden])


@dataclass(frozen=True)
class MLP:
    """Of one call."""

    norm: RMSNorm
    gate_up: Group
    down: Group

    def forward(self, x: Tensor, delta: Tensor, whole: bool = True) -> tuple[Any, MLPKept]:
        """y (M, C) and what the backward takes; whole = False leaves y out (None)."""
        kernels = self.gate_up.kernels
        xh = self.gate_up.input(x.shape[0], x)
        n = xh[:, : x.shape[1]]
        total, _, scale = kernels.norm(x, self.norm.weight, self.norm.eps, delta, n)
        self.gate_up.add_hidden(xh)
        both = self.gate_up.forward(xh)
        ah = self.down.input(x.shape[0], x)
        kernels.swiglu(both, ah[:, : both.shape[1] // 2])
        self.down.add_hidden(ah)
        y = self.down.forward(ah, total) if whole else None
        down_hidden = [h.clone() for h in self.down.paths(ah)]  # a is made again, only h is kept
        return y, MLPKept(total, scale, both, self.gate_up.paths(xh), down_hidden, xh)

    def backward(self, dy: Tensor, kept: MLPKept) -> tuple[Tensor, Gradients]:
        """dt (M, C), what flows past the MLP in it; and the factors' gradients: gate, up, down."""
        M, C = dy.shape
        kernels = self.gate_up.kernels
        dyh = self.down.gradient(M, dy)
        dyh[:, :C].copy_(dy)
        da = self.down.backward(dyh)
        assert da is not None
        dbh = self.gate_up.gradient(M, dy)
        _, a = kernels.swiglu_backward(da, kept.both, dbh[:, : kept.both.shape[1]])
        of_down = self.down.factor_gradients(dyh, a, kept.down_hidden)
        del da, a, dyh
        dn = self.gate_up.backward(dbh)
        xh = kept.xh
        if xh is None:
            xh = self.gate_up.input(M, dy)
            kernels.norm(kept.total, self.norm.weight, self.norm.eps, out=xh[:, :C])
        of_both = self.gate_up.factor_gradients(dbh, xh[:, :C], kept.hidden)
        dt = kernels.norm_backward(dn, kept.total, self.norm.weight, kept.scale, dy)
        return dt, [*of_both, *of_down]
